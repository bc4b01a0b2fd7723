"""``megalm train -m`` with a stand-in for training: order, names, outcomes, exit codes and the closing table."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.cli.sweep import run_sweep
from megalm.config.compose import compose
from megalm.errors import ConfigError, DataError, ExitCode
from megalm.runs.folder import METRICS_FILE
from megalm.runs.record import encode_row
from megalm.runs.start import run_folder

ARGUMENTS = ["experiment=quickstart", "parallel=single", "optim.lr=1e-3,2e-3,3e-3"]


class Training:
    """Ends each run with the code that it is given, after a step and a validation."""

    def __init__(self, *codes: int | Exception) -> None:
        self.codes = list(codes)
        self.rates: list[float] = []

    def __call__(self, arguments: list[str]) -> int:
        config = compose(arguments)
        self.rates.append(config.optim.lr)
        code = self.codes.pop(0)
        if isinstance(code, Exception):
            raise code
        folder = run_folder(config)
        folder.mkdir(parents=True)
        rows = [{"step": 7, "loss": 1000 * config.optim.lr}, {"step": 7, "val_loss": 2.0}]
        (folder / METRICS_FILE).write_text("".join(f"{encode_row(row)}\n" for row in rows))
        return code


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_all_runs_are_trained_in_order_and_stand_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(0, 0, 0)
    assert run_sweep(ARGUMENTS, training) == ExitCode.DONE
    assert training.rates == [1e-3, 2e-3, 3e-3]
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "run                  outcome  step    loss  val_loss",
        "quickstart-lr=0.001  done        7  1.0000    2.0000",
        "quickstart-lr=0.002  done        7  2.0000    2.0000",
        "quickstart-lr=0.003  done        7  3.0000    2.0000",
    ]
    assert err.splitlines()[0] == "run 1 of 3: quickstart-lr=0.001"


def test_a_run_that_fails_hides_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(DataError("data: torn; another"), ExitCode.DIVERGED, 0)
    assert run_sweep(ARGUMENTS, training) == ExitCode.BAD_DATA, "the first that is not done"
    out, err = capsys.readouterr()
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["bad", "diverged", "done"]
    assert "data: torn; another" in err.splitlines()


@pytest.mark.parametrize(
    ("code", "word"), [(ExitCode.INTERRUPTED, "interrupted"), (ExitCode.REQUEUE, "to be requeued")]
)
def test_who_stops_one_run_stops_the_sweep(code: ExitCode, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(ExitCode.DIVERGED, code)
    assert run_sweep(ARGUMENTS, training) == code
    _, first, second, third = capsys.readouterr().out.splitlines()
    assert "diverged" in first and word in second and third.endswith("not started")


def test_nothing_is_trained_where_one_run_is_wrong() -> None:
    training = Training()
    with pytest.raises(ConfigError) as caught:
        run_sweep([*ARGUMENTS, "train.global_batch_size=8,6", "train.micro_batch_size=4"], training)
    (line,) = caught.value.lines
    assert line.startswith("optim.lr=0.001 train.global_batch_size=6: train.global_batch_size=6: not a multiple of")
    assert training.rates == []
