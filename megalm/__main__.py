"""``python -m megalm``: the same as ``megalm``, for launchers that start a Python module."""

# ruff: noqa: E402 - the folder that Python puts first must not be looked into for what follows
from megalm.launch.isolation import shield

shield()

import sys

from megalm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
