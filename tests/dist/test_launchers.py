"""One command line, any launcher: the losses of 20 steps are the same to the last bit.

``tests/slurm`` compares sbatch with the same reference.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_runs import TWENTY_STEPS, losses_of, run

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": (str(BIN / "torchrun"), "--nproc-per-node=4", "-m", "megalm"),
    "mpirun": (
        str(BIN / "mpirun"),
        "--allow-run-as-root",
        "--oversubscribe",
        "-np",
        "4",
        sys.executable,
        "-m",
        "megalm",
    ),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_twenty_steps_are_bit_equal(launcher: str, twenty_local_steps, tiny_dataset: Path, tmp_path: Path) -> None:
    if not Path(LAUNCHERS[launcher][0]).exists():
        pytest.skip(f"{launcher} is not installed beside {sys.executable}")
    overrides = [*TWENTY_STEPS, f"data.path={tiny_dataset}", f"run.dir={tmp_path}", "run.name=other"]
    code, output = run(overrides, command=LAUNCHERS[launcher])
    assert code == 0, output
    assert len(twenty_local_steps) == 20
    assert losses_of(tmp_path / "other") == twenty_local_steps
    assert output.count("done     20 of 20 steps") == 1, "rank 0 alone speaks"
