"""``python -m megalm``: the same as ``megalm``, for launchers that start a Python module."""

import sys

from megalm.cli import main

sys.exit(main())
