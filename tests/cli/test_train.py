"""``megalm train`` as a user runs it: four gloo ranks on this machine, started, interrupted, killed and continued."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runs import Running
from fork_server import run_megalm, server

from megalm.launch.logs import log_path

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent


class Run:
    """One run in a folder of its own."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.folder = folder / "runs/tiny"
        self.overrides = [
            "model=quickstart",
            "model.num_layers=2",
            "model.hidden_size=32",
            "model.num_heads=2",
            "model.sequence_length=32",
            "parallel=tp2_pp2",
            "engine=fp32_zero1",
            f"data.path={dataset}",
            "optim.lr=1e-3",
            "train.steps=2000",
            "train.global_batch_size=4",
            "train.micro_batch_size=2",
            "train.validation_samples=4",
            "logging=plain",
            "report.plot=false",
            f"run.dir={folder}/runs",
            "run.name=tiny",
        ]
        self._output = folder / "output"

    def start(self, *overrides: str, launcher: tuple[str, ...] = (), **environment: str) -> Running:
        arguments = ["train", *self.overrides, *overrides]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", **environment}
        with self._output.open("wb") as output:
            if not launcher:
                return server().fork(run_megalm, arguments, environment=env, stdout=output, stderr=subprocess.STDOUT)
            return subprocess.Popen(
                [*launcher, "-m", "megalm", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
            )

    def finish(self, *overrides: str, launcher: tuple[str, ...] = ()) -> int:
        return self.start(*overrides, launcher=launcher).wait(timeout=150)

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def steps(self) -> list[int]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [row["step"] for row in rows if "loss" in row]

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in (self.folder / "checkpoints").glob("step-*"))

    def pids(self) -> list[int]:
        """Process ids of the newest attempt's ranks, from their logs."""
        texts = [log_path(self.folder, rank).read_text() for rank in range(4)]
        return [int(text.rpartition("pid ")[2].split()[0]) for text in texts]

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: max(self.steps, default=0) >= step, 120, lambda: self.output)


def wait_until(condition, timeout_seconds, explain=lambda: ""):
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.05)


def are_running(pids):
    found = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):
            found.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z")
    return any(found)


@pytest.fixture
def run(tmp_path, tiny_dataset):
    return Run(tmp_path, tiny_dataset)


def test_a_killed_rank_ends_the_run(run):
    rank = 0  # which hosts the store that the others ask who failed; of another rank, see unit/launch
    process = run.start()
    run.wait_for_step(2)
    pids = run.pids()
    os.kill(pids[rank], signal.SIGKILL)
    killed = time.monotonic()
    assert process.wait(timeout=60) == 128 + signal.SIGKILL, run.output
    assert time.monotonic() - killed < 20
    assert f"rank {rank} was killed (SIGKILL)" in run.output and f"logs/rank-{rank}.log" in run.output
    assert "Traceback" not in run.output, "what other ranks suffer in consequence is in their logs"
    assert not are_running(pids)


def test_ranks_do_not_outlive_a_killed_launcher(run):
    process = run.start()
    run.wait_for_step(1)
    pids = run.pids()
    process.kill()
    process.wait()
    wait_until(lambda: not are_running(pids), 10)


def test_a_bug_in_one_rank_is_shown_once_and_ends_all(run, tmp_path):
    """Rank 3 finds a broken module; the others, waiting for it in a collective, must neither hang nor complain."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "if sys.argv[0] == '-m' and sys.orig_argv[3:4] == ['3']:\n"
        "    sys.modules['megalm.training.saving'] = None\n"
    )
    process = run.start(launcher=(sys.executable,), PYTHONPATH=str(site))
    assert process.wait(timeout=90) == 70, run.output
    assert run.output.count("Traceback") == 1, run.output
    assert "rank 3 failed" in run.output and "logs/rank-3.log" in run.output
    assert "Traceback" in log_path(run.folder, 3).read_text()


TORCHRUN = (str(BIN / "torchrun"), "--nproc-per-node=4")
MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "4", sys.executable)
LAUNCHERS = [
    pytest.param(TORCHRUN, id="torchrun"),
    pytest.param(
        MPIRUN,
        id="mpirun",
        marks=pytest.mark.skipif(
            shutil.which("mpirun", path=f"{BIN}:{os.environ['PATH']}") is None, reason="no mpirun"
        ),
    ),
]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_say_a_bad_config_once(run, launcher):
    code = run.finish("parallel.tp=4", "train.steps=0", launcher=launcher)
    assert code == (1 if launcher is TORCHRUN else 2), run.output
    assert run.output.count("parallel.tp=4: ") == 1
    assert run.output.count("train.steps=0: ") == 1
    assert "megalm/launch/worker.py" not in run.output
    assert not run.folder.exists()
