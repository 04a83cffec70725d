"""``python -m iibalance`` and the ``iibalance`` command."""

import os
import sys

# This must stand before torch loads OpenMP. Threads that spin while they wait cost a small model a
# factor of 7 as soon as another process wants a core: 74.5 against 10.6 s for three epochs of
# digits on 2 busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> int:
    """Run the command line and return its exit code."""
    try:
        from iibalance.cli import run

        return run(sys.argv[1:])
    except KeyboardInterrupt:  # before or after what `run` looks after
        print("iibalance: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
