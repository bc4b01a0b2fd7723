"""``megalm compare``: figures, differences and mistakes, on runs that were trained and on records made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.cli.main import main
from megalm.config.compose import compose, save_config
from megalm.errors import ConfigError, DataError
from megalm.runs.compare import Comparison
from megalm.runs.record import encode_row


def made_run(folder: Path, name: str, rows: list[dict], *overrides: str) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    save_config(compose(["experiment=quickstart", f"run.name={name}", *overrides]), run / "config.yaml")
    (run / "metrics.jsonl").write_text("".join(encode_row(row) + "\n" for row in rows))
    return run


def step(number: int, loss: float, **more: float) -> dict:
    return {"step": number, "tokens": 100 * number, "loss": loss, "tokens_per_second": 50.0, **more}


def validation(number: int, loss: float | None) -> dict:
    return {"step": number, "tokens": 100 * number, "val_loss": loss, "val_perplexity": 7.0}


def test_figures_are_those_of_the_record(tmp_path: Path) -> None:
    rows = [step(1, 4.0), validation(1, 3.5), step(2, 3.0), validation(2, 3.75), step(3, 2.5, loss_tokens=0)]
    first = made_run(tmp_path, "first", rows, "model.vocab_size=512")
    second = made_run(tmp_path, "second", [step(1, float("nan")), validation(1, None)], "optim.lr=0.5")
    found = Comparison.of([first, second])
    table = {label: values for label, *values in found.table()}
    assert table["steps"] == ["3 of 600", "1 of 600"]
    assert table["tokens"] == ["300", "100"]
    assert table["training loss (last step)"] == ["3.0000", ""], "a step without loss tokens has no loss"
    assert table["validation loss (last)"] == ["3.7500", ""]
    assert table["validation loss (best)"] == ["3.5000 at step 1", ""]
    assert table["tokens per second (median)"] == ["50", "50"]
    assert table["parameters"][0] and not table["parameters"][1], "nothing says how many words the second has"
    assert {field: values for field, *values in found.differences()} == {
        "model.vocab_size": ["512", "null"],
        "optim.lr": ["0.0015", "0.5"],
    }


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / part, "same", [step(1, 1.0)]) for part in "ab"]
    found = Comparison.of(runs)
    assert found.names() == [str(run) for run in runs]
    assert found.differences() == []


def test_mistakes_are_said(tmp_path: Path) -> None:
    run, empty = made_run(tmp_path, "run", [step(1, 1.0)]), made_run(tmp_path, "empty", [])
    with pytest.raises(ConfigError, match="1 run to compare"):
        Comparison.of([run])
    with pytest.raises(ConfigError, match="the same run is given twice"):
        Comparison.of([run, tmp_path / "x" / ".." / "run"])
    with pytest.raises(DataError, match="has taken no step yet"):
        Comparison.of([run, empty])
    with pytest.raises(ConfigError, match="no such folder"):
        Comparison.of([run, tmp_path / "none"])
    other = made_run(tmp_path, "other", [step(1, 1.0)])
    with pytest.raises(ConfigError, match=r"must end with .png, .svg or .pdf"):
        Comparison.of([run, other]).save_picture(tmp_path / "curves.jpeg")
    with pytest.raises(ConfigError, match="name a file in a folder that exists"):
        Comparison.of([run, other]).save_picture(tmp_path / "none" / "curves.png")


def test_the_command_prints_tables_and_json_and_draws(
    short_runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    slow, fast = map(str, short_runs)
    assert main(["compare", slow, fast, "--out", str(tmp_path / "curves.svg")]) == 0
    shown = capsys.readouterr().out
    for expected in ("slow", "fast", "optim.lr", "parallel.tp", "tp2 (2 ranks)", "one rank (1 rank)", "curves.svg"):
        assert expected in shown
    assert (tmp_path / "curves.svg").read_text().count("<path") > 4
    assert main(["compare", slow, fast, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["figures"]["steps"] == {"slow": "4 of 4", "fast": "4 of 4"}
    assert found["differences"]["optim.lr"]["fast"] == "0.01"
    assert main(["compare", slow, "nowhere"]) == 2
    assert "run=nowhere: no such folder" in capsys.readouterr().err
