"""What is done with arguments around jsonargparse: what it cannot read, and says badly."""

from __future__ import annotations

import json
import re
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from iibalance.config import CompareData
from iibalance.errors import InputError


def read_configs(arguments: Sequence[str]) -> Iterator[dict]:
    """The content of every ``--config`` file; jsonargparse does not say which it cannot parse."""
    following = [*arguments[1:], ""]
    for argument, value in zip(arguments, following):
        name, equals, text = argument.partition("=")
        path = Path(text if equals else value).expanduser()
        if name != "--config" or not path.is_file():
            continue
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise InputError(f"{path}: is not a readable YAML file ({error})") from None
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise InputError(f"{path}: expected options by name")
        yield content


def one_data_set(arguments: Sequence[str], contents: Sequence[dict]) -> list[str]:
    """What ``compare`` is given as ``--data.path`` and so on, as the ``--data`` of one data set.

    It is called after its file, or after its source. ``contents``: of the configuration files.

    >>> one_data_set(["compare", "--data.path", "clips.npz"], [])[1][:27]
    '--data={"clips": {"name": "'
    """
    arguments = list(arguments)
    if arguments[:1] != ["compare"]:
        return arguments
    names, own, rest = {field.name for field in fields(CompareData)}, [], []
    several = [content["data"] for content in contents if "data" in content]
    waiting = iter(arguments)
    for argument in waiting:
        option, equals, value = argument.partition("=")
        first, _, below = option.partition(".")
        if first != "--data":
            rest.append(argument)
            continue
        words = [argument] if equals else [argument, *islice(waiting, 1)]
        if below.partition(".")[0] in names:
            own += words
        else:
            rest += words
            given = _parsed(value if equals else "".join(words[1:]))
            if below and "." not in below and not isinstance(given, dict):
                options = [f"--data.{name}" for name in sorted(names)]
                raise InputError(_unknown(option, "iibalance train", options))
            several.append({below: {} if "." in below else given} if below else given)
    for sets in several:
        if not isinstance(sets, dict) or not all(isinstance(one, dict) for one in sets.values()):
            raise InputError(
                "data: expected data sets by name, such as {clips: {path: clips.npz}}; "
                "one set alone can be given as --data.path clips.npz"
            )
    if not own:
        return arguments
    if several:
        raise InputError(
            "data: give one data set by options such as --data.path, or several by name "
            "(--data, or data in the configuration file), not both"
        )
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(CompareData, "data")
    data = parser.instantiate(parser.parse_args(own)).data
    label = Path(data.path).stem if data.path else data.name
    label = "".join(letter if letter.isalnum() or letter in "_+." else "_" for letter in label)
    return [*rest, f"--data={json.dumps({label: asdict(data)})}"]


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Any:
    """What the parser makes of the arguments.

    Raises :class:`~iibalance.errors.InputError` for options that there are not, with the nearest
    one that there is, and for those that are missing.
    """
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        chosen = parser._subcommands_action
        commands = {} if chosen is None else chosen.choices
        command = next((word for word in arguments if word in commands), None)
        actions = (commands[command] if command else parser)._actions
        given, _, names = str(error).partition(" arguments: ")
        missing = str(error).partition("the following arguments are required: ")[2]
        if given == "unrecognized":
            options = [name for action in actions for name in action.option_strings]
            place = f"iibalance {command}" if command else "iibalance"
            raise InputError(_unknown(names.split()[0], place, options)) from None
        if missing and command:
            paths = [name.removeprefix(f"{command}.") for name in missing.split(", ")]
            raise InputError(_missing(paths, command, actions)) from None
        raise


def _unknown(word: str, place: str, options: Sequence[str]) -> str:
    """What to say of a word that is no option of ``place``, a command, and no option's value."""
    word = word.partition("=")[0]
    if not word.startswith("-"):
        return f"{word}: belongs to no option; put a value that holds spaces in quotes"
    # jsonargparse has a form that ends in + of each option that takes a list.
    options = [name for name in options if name[-1] != "+"]
    nearest = [name for name in options if name.endswith(f".{word.lstrip('-')}")]
    # At difflib's own cutoff, 0.6, --data.path is near to whatever begins with --data.
    nearest = nearest or get_close_matches(word, options, 1, cutoff=0.75)
    advice = f"did you mean {nearest[0]}?" if nearest else f"{place} --help lists them"
    return f"{word}: no such option; {advice}"


def _missing(paths: Sequence[str], command: str, actions: Sequence[Any]) -> str:
    """What a command needs and was not given: as it is typed, with its help."""
    needed = {action.dest: action for action in actions}
    texts = [
        f"{(needed[path].option_strings or [path])[0]} ({needed[path].help})" for path in paths
    ]
    return f"{command} needs {' and '.join(texts)}"


def in_plain_words(text: str) -> str:
    """An error's text in one line, and without Python's types where jsonargparse names them.

    >>> in_plain_words('Parser key "epochs": Expected a <class \\'int\\'>. Got value: many')
    'epochs: many cannot be used; give an integer'
    """
    text = " ".join(text.split())
    found = re.fullmatch(r'Parser key "([\w.]+)": Expected an? (.+)\. Got value: (.*)', text)
    if found is None:
        return text
    option, kind, value = found.groups()
    for known, words in _KINDS.items():
        kind = re.sub(known, words, kind)
    quoted = ", in quotes" if value == "False" else ""  # what YAML makes of a bare no
    return f"{option}: {value} cannot be used; give {kind}{quoted}"


_KINDS = {
    r"<class 'int'>": "an integer",
    r"<class 'float'>": "a number",
    r"<class 'bool'>": "true or false",
    r"<class 'dict'>": "values by name, such as '{name: value}'",
    r"typing\.Literal\[(.*)\]": r"one of \1",
}
