"""``slurm/train.sbatch`` on a real SLURM: two nodes, two ranks on each."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runs import TINY, TWENTY_STEPS, losses_of

from tests.slurm.cluster import SlurmCluster, missing_requirement

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "slurm/train.sbatch"

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(missing_requirement() is not None, reason=str(missing_requirement())),
]

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    root = Path("/tmp") / f"megalm-slurm-{tmp_path_factory.getbasetemp().name}-{time.time_ns()}"
    root.mkdir(mode=0o755)
    cluster = SlurmCluster(root, nodes=2)
    yield cluster
    cluster.stop()
    shutil.rmtree(root, ignore_errors=True)


def submit(cluster: SlurmCluster, folder: Path, *overrides: str) -> str:
    options = ["--parsable", "--nodes=2", "--ntasks-per-node=2", f"--output={folder}/job-%j.out"]
    return cluster.run("sbatch", *options, str(SCRIPT), *overrides, cwd=folder, MEGALM_PYTHON=sys.executable).strip()


def tiny(dataset: Path, folder: Path, name: str, steps: int) -> list[str]:
    return [
        "model=quickstart",
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.num_heads=2",
        "model.sequence_length=32",
        "parallel=tp2_pp2",
        "engine=fp32_zero1",
        f"data.path={dataset}",
        "optim.lr=1e-3",
        f"train.steps={steps}",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "train.validation_samples=4",
        "logging=plain",
        "report.plot=false",
        f"run.dir={folder}/runs",
        f"run.name={name}",
    ]


def steps_of(run: Path) -> list[int]:
    if not (run / "metrics.jsonl").exists():
        return []
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [row["step"] for row in rows if "loss" in row]


def test_signal_saves_requeues_and_resumes(cluster: SlurmCluster, tiny_dataset: Path, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, *tiny(tiny_dataset, tmp_path, "requeued", steps=120))
    run = tmp_path / "runs/requeued"
    cluster.wait_for_job(job, lambda _: len(steps_of(run)) >= 5, timeout_seconds=120)

    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for_job(job, lambda state: state["Restarts"] == "1", timeout_seconds=60)
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert len(saved) == 1, saved
    step = int(saved[0].removeprefix("step-"))
    assert 5 <= step < 120

    state = cluster.wait_for_job(job, lambda state: state["JobState"] in ENDED, timeout_seconds=200)
    output = (tmp_path / f"job-{job}.out").read_text()
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), output
    # Every step was taken once, in two attempts that wrote to the same files.
    assert steps_of(run) == list(range(1, 121))
    assert "SIGUSR1" in output and "saved; requeued" in output
    assert f"{saved[0]}" in output.partition("requeued")[2], "the second attempt names the checkpoint it resumes"
    for rank in range(4):
        assert (run / f"logs/rank-{rank}.log").read_text().count(f"rank {rank} of 4 (srun)") == 2


def test_twenty_steps_equal_those_of_local_ranks_to_the_last_bit(
    cluster: SlurmCluster, twenty_local_steps: list[tuple[float, float]], tiny_dataset: Path, tmp_path: Path
) -> None:
    overrides = [*TINY, *TWENTY_STEPS, f"data.path={tiny_dataset}", f"run.dir={tmp_path}", "run.name=slurm"]
    job = submit(cluster, tmp_path, *overrides)
    state = cluster.wait_for_job(job, lambda state: state["JobState"] in ENDED, timeout_seconds=120)
    assert state["ExitCode"] == "0:0", (tmp_path / f"job-{job}.out").read_text()
    assert len(twenty_local_steps) == 20
    assert losses_of(tmp_path / "slurm") == twenty_local_steps


def test_bad_config_is_said_once_and_not_requeued(cluster: SlurmCluster, tiny_dataset: Path, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, *tiny(tiny_dataset, tmp_path, "bad", steps=3), "parallel.tp=3")
    state = cluster.wait_for_job(job, lambda state: state["JobState"] in ENDED, timeout_seconds=120)
    output = (tmp_path / f"job-{job}.out").read_text()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0"), output
    assert output.count("parallel.tp=3:") == 1
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


def test_a_crash_is_tried_again_and_a_cancelled_job_is_not(
    cluster: SlurmCluster, tiny_dataset: Path, tmp_path: Path
) -> None:
    overrides = [*tiny(tiny_dataset, tmp_path, "crashed", steps=5000), "checkpoint.every=10"]
    job = submit(cluster, tmp_path, *overrides)
    run = tmp_path / "runs/crashed"
    cluster.wait_for_job(job, lambda _: len(steps_of(run)) >= 12, timeout_seconds=120)

    cluster.run("scancel", "--signal=KILL", f"{job}.0")
    state = cluster.wait_for_job(job, lambda state: state["Restarts"] == "1", timeout_seconds=60)
    assert state["Comment"] == "megalm-crashes:1"
    log = run / "logs/rank-0.log"
    cluster.wait_for_job(job, lambda _: log.read_text().count("rank 0 of 4 (srun)") == 2, timeout_seconds=120)
    before = max(steps_of(run))
    cluster.wait_for_job(job, lambda _: max(steps_of(run)) > before, timeout_seconds=120)
    assert steps_of(run) == list(range(1, max(steps_of(run)) + 1)), "continued from a checkpoint, not begun again"

    cluster.run("scancel", job)
    state = cluster.wait_for_job(job, lambda state: state["JobState"] in ENDED, timeout_seconds=60)
    time.sleep(3)  # the job script has ended by now, and would have asked for a requeue
    state = cluster.job(job)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "1"), (tmp_path / f"job-{job}.out").read_text()


@pytest.mark.parametrize(
    ("outcome", "rank", "line", "code"),
    [
        ("done", 0, "the sum is 10", 0),
        ("bad-data", 0, "numbers: a rank has none; give it one", 3),
        ("bad-data", 3, "numbers: a rank has none; give it one", 3),
    ],
)
def test_srun_starts_ranks_of_another_job(
    cluster: SlurmCluster, tmp_path: Path, outcome: str, rank: int, line: str, code: int
) -> None:
    ranks = ["srun", "--nodes=2", "--ntasks-per-node=2", "--export=ALL"]
    command = shlex.join([*ranks, sys.executable, "-m", "second_job", "4", str(tmp_path), outcome, str(rank)])
    output = cluster.run(
        "sh", "-c", f"{command} 2>&1; echo exit code $?", cwd=tmp_path, PYTHONPATH=str(REPOSITORY / "tests" / "dist")
    )
    assert output.splitlines().count(line) == 1, output
    assert output.splitlines()[-1] == f"exit code {code}", output
    written = sorted(path.name for path in tmp_path.glob("sum-*"))
    assert written == ([f"sum-{rank}" for rank in range(4)] if outcome == "done" else [])


def test_srun_generates_what_one_process_does(
    cluster: SlurmCluster, short_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = str(short_runs[0])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def "}\n{"prompt": "return"}\n{"prompt": ""}\n')
    ranks = ["srun", "--nodes=2", "--ntasks-per-node=2", "--export=ALL"]
    files = ["--input", "prompts.jsonl", "--max-new-tokens", "8"]
    said = ""
    for launcher, output, layout in (([], "alone", []), (ranks, "split", ["parallel.tp=2"])):
        command = [*launcher, sys.executable, "-m", "megalm", "generate", run, *files, "--output", output, *layout]
        said = cluster.run("sh", "-c", f"{shlex.join(command)} 2>&1", cwd=tmp_path)
    assert (tmp_path / "split").read_text() == (tmp_path / "alone").read_text(), said
    assert said.count("3 prompts") == 1, "rank 0 alone speaks"
