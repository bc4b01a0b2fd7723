"""Every start of a run keeps the config that it was started with: ``config.yaml`` is the newest, the others stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from megalm.config.compose import save_config
from megalm.config.schema import Config
from megalm.runs.folder import ATTEMPTS_FOLDER, CONFIG_FILE


def keep_config(config: Config, run_dir: Path) -> tuple[int, str]:
    """Write the config of a start as ``config.yaml`` and as ``attempts/N.yaml``.

    Returns:
        N, which counts from 1, and the latter's path in the run's folder.
    """
    folder, current = run_dir / ATTEMPTS_FOLDER, run_dir / CONFIG_FILE
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.stem) for path in folder.glob("*.yaml") if path.stem.isdecimal()]
    if not numbers and current.exists():  # of a version that kept one config only
        shutil.copyfile(current, folder / "1.yaml")
        numbers = [1]
    number = max(numbers, default=0) + 1
    name = f"{ATTEMPTS_FOLDER}/{number}.yaml"
    save_config(config, run_dir / name)
    save_config(config, current)
    return number, name
