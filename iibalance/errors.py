"""The one exception that means "your input, not our code"."""


class InputError(ValueError):
    """Something the user gave cannot be used: the message names it, says what is wrong and what to do, in one line.

    The command line prints the message alone and exits with code 2; in Python it is an ordinary ``ValueError``.

    >>> raise InputError("targets: row 3 holds 7, outside 0..4")
    Traceback (most recent call last):
        ...
    iibalance.errors.InputError: targets: row 3 holds 7, outside 0..4
    """
