"""``python -m iibalance`` and the ``iibalance`` command."""

import gc
import os
import sys

# Before torch loads OpenMP: threads that spin while they wait cost a small model a factor of 7 as soon as another process wants a core
# (10.6 against 74.5 s for three epochs of digits on 2 busy cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> int:
    """Run the command line and return its exit code."""
    from iibalance.cli import run

    gc.collect()
    gc.freeze()  # what the imports made stays for good: Accelerate collects after every training, 0.2 s each time otherwise
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
