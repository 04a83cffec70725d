"""Keep pytest from importing the examples for their docstrings: they need libraries of the extra
``examples``. tests/test_examples.py runs them, each in a process of its own.
"""

collect_ignore_glob = ["*.py"]
