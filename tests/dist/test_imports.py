"""What a rank imports: on a shared file system every file that it opens is opened by all ranks at the same moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_runs import TINY

from megalm.launch.store import free_port_listener
from megalm.plan.preflight import make_plan

pytestmark = pytest.mark.slow

FOR_RANK_ZERO_ALONE = ("rich", "tensorboard", "wandb", "matplotlib", "PIL", "megalm.training.callbacks.console")
FOR_OTHER_COMMANDS = (
    "datasets",
    "hydra",
    "jinja2.nativetypes",
    "megalm.cli",
    "megalm.convert",
    "megalm.data.prepare",
    "megalm.evaluate",
    "megalm.generate",
    "megalm.plan.preflight",
    "megalm.verify",
    "mwparserfromhell",
    "pandas",
    "pyarrow",
    "scipy",
    "transformers",
    "triton",
    "urllib3",
    "webdataset",
)
BUDGETS = {"before torch": 290, "megalm": 220, "torch and what it imports": 1950, "deepspeed and what it imports": 640}
"""Files, at most. With torch 2.13 and DeepSpeed 0.19.8 on Python 3.11 they are 247, 189, 1,832 and 584. Of torch's, 800
are of its compiler and of sympy, which torch.optim imports when an optimizer is made."""
TORCHS = ("torch", "torchgen", "sympy", "mpmath", "numpy", "dill", "tqdm", "functorch", "setuptools")
"""setuptools is torch.utils.cpp_extension's, and grows from release to release."""


@pytest.fixture(scope="module")
def rank_one(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> dict[str, Any]:
    """What rank 1 of two has opened and imported in a whole run; the second one, when Python has cached bytecode."""
    folder = tmp_path_factory.mktemp("imports")
    for name in ("first", "second"):
        overrides = ["parallel.tp=1", "parallel.pp=2", "train.steps=2", f"data.path={tiny_dataset}"]
        plan = make_plan([*TINY, *overrides, f"run.dir={folder}", f"run.name={name}", "logging.tensorboard=true"], 2)
        (folder / "plan.json").write_text(plan.to_json())
        found = _train(folder / "plan.json")
    return found


def _train(plan: Path) -> dict[str, Any]:
    listener = free_port_listener()
    port = listener.getsockname()[1]
    listener.close()
    script = Path(__file__).parent / "rank_imports.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), "2", str(port), plan],
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    found: dict[str, Any] = json.loads(plan.with_name("rank1.json").read_text())
    return found


@pytest.mark.parametrize("package", [*FOR_RANK_ZERO_ALONE, *FOR_OTHER_COMMANDS])
def test_a_rank_imports_nothing_that_it_does_not_use(rank_one: dict[str, Any], package: str) -> None:
    imported = [name for name in rank_one["modules"] if name == package or name.startswith(f"{package}.")]
    assert not imported


def test_a_rank_opens_no_more_files_than_its_budget(rank_one: dict[str, Any]) -> None:
    opened = rank_one["opened"]
    torchs = sum(opened.get(name, 0) for name in TORCHS) + opened["python"]
    found = {
        "before torch": rank_one["before_torch"],
        "megalm": opened["megalm"],
        "torch and what it imports": torchs,
        "deepspeed and what it imports": sum(opened.values()) - torchs - opened["megalm"],
    }
    assert all(found[what] <= most for what, most in BUDGETS.items()), found
