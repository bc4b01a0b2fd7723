"""Which modules megalm's processes import: the installed ones, whatever lies in the folder that a user works in.

``python -m`` looks for every module in the working folder first, and so does each process that ``multiprocessing``
starts: a user's ``random.py`` or ``tokenizers.py`` would stand in for a library. Imported before anything else: no
module is needed here that Python has not loaded itself when it begins.
"""

from __future__ import annotations

import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120 - pathlib could be the user's
_SAFE = "PYTHONSAFEPATH"
_NO_PLUGINS = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYDANTIC_DISABLE_PLUGINS": "__all__"}
"""torch and pydantic (of DeepSpeed) each look for plugins in every installed distribution: two files of each, on every
rank. megalm uses none: torch's are for devices other than CPUs and CUDA."""


def shield() -> None:
    """Look for modules nowhere in the working folder, here and in processes that are started later.

    A checkout that is not installed is found, after everything else.
    """
    os.environ[_SAFE] = "1"
    first = sys.path[0] if sys.path and not sys.flags.safe_path else None
    if first is not None and first in ("", _working_folder()):
        del sys.path[0]
    if _is_checkout():
        sys.path[:] = [*(entry for entry in sys.path if entry != _ROOT), _ROOT]


def look_for_no_plugins() -> None:
    """Have libraries open no file of distributions that have nothing to do with them, unless the user wants it."""
    for name, value in _NO_PLUGINS.items():
        os.environ.setdefault(name, value)


def child_environment(environment: dict[str, str]) -> dict[str, str]:
    """What a Python of megalm's gets: an environment in which it finds the modules that this process has found."""
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if _is_checkout() and _ROOT not in paths:
        paths.append(_ROOT)  # the child shields itself, which puts it last
    return {**environment, _SAFE: "1", **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


def _is_checkout() -> bool:
    """Whether megalm lies in its repository, and not among installed packages."""
    return os.path.isfile(os.path.join(_ROOT, "conf", "config.yaml"))  # noqa: PTH113, PTH118


def _working_folder() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:  # it has been removed
        return None
