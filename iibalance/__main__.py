"""``python -m iibalance`` and the ``iibalance`` command."""

import gc
import os
import sys

# This must stand before torch loads OpenMP. Threads that spin while they wait cost a small model a
# factor of 7 as soon as another process wants a core: 74.5 against 10.6 s for three epochs of
# digits on 2 busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _import() -> None:
    """What all commands need, which stays for good.

    Accelerate collects garbage after every training, and going through those objects would take it
    0.2 s each time.
    """
    import iibalance.training.run  # noqa: F401

    gc.collect()
    gc.freeze()


def main() -> int:
    """Run the command line and return its exit code."""
    from iibalance.cli import run

    return run(sys.argv[1:], _import)


if __name__ == "__main__":
    sys.exit(main())
