"""A user's own settings on the command line: options that find and show configs, and a sweep of real runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megalm.cli.main import main
from megalm.config.compose import compose, conf_dir, load_run_config
from megalm.config.parse import config_to_dict


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an experiment in ./conf, a folder of configs, and a file of settings."""
    experiment = "# @package _global_\ndefaults:\n  - quickstart\nrun: {name: mine}\ntrain: {steps: 7}\n"
    for folder, text in (("conf", experiment), ("team", experiment.replace("7", "8"))):
        (tmp_path / folder / "experiment").mkdir(parents=True)
        (tmp_path / folder / "experiment" / "mine.yaml").write_text(text)
    (tmp_path / "my.yaml").write_text("experiment: mine\nrun.name: two words\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def out_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out if code == 0 else err


def test_cfg_job_prints_the_config_as_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    out = out_of(capsys, "train", "--cfg", "job", "--config", "my.yaml", "optim.lr=0.1")
    assert yaml.safe_load(out) == config_to_dict(compose(["--config=my.yaml", "optim.lr=0.1"]))
    assert "name: two words" in out
    assert out_of(capsys, "check", "-c", "job", "experiment=mine").startswith("run:\n  name: mine\n")


def test_info_searchpath_lists_the_folders_in_order(capsys: pytest.CaptureFixture[str], own: Path) -> None:
    out = out_of(capsys, "train", "--info", "searchpath", "-cd", "team", "hydra.searchpath=[conf/experiment]")
    assert [line.split()[0] for line in out.splitlines()] == ["--config-dir", "./conf", "hydra.searchpath", "megalm"]
    assert [line.split()[1] for line in out.splitlines()[:3]] == ["team", "conf", "conf/experiment"]


def test_check_yaml_says_where_each_value_is_from(capsys: pytest.CaptureFixture[str]) -> None:
    out = out_of(capsys, "check", "--yaml", "--config", "my.yaml", "--config-dir", "team", "optim.lr=0.1")
    assert yaml.safe_load(out) == config_to_dict(compose(["--config-dir=team", "--config=my.yaml", "optim.lr=0.1"]))
    from_where = {line.partition(":")[0].strip(): line.partition("  # ")[2] for line in out.splitlines()}
    assert from_where["steps"] == "team/experiment/mine.yaml:5"
    assert (from_where["lr"], from_where["cooldown"]) == ("command line", "default")
    assert from_where["beta1"] == f"{conf_dir()}/optim/adamw.yaml:2"
    assert "  name: two words  # my.yaml:2\n" in out


def test_options_of_hydra_that_megalm_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    lines = out_of(capsys, "train", "--config-name=x", "--package", "y", "experiment=quickstart", code=2).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["--config-name", "--package"]
    assert out_of(capsys, "check", "--cfg", "all", code=2).endswith("--cfg job\n")
    assert "--info searchpath" in out_of(capsys, "check", "--info", "plugins", code=2)


def test_a_sweep_is_not_for_ranks_that_a_launcher_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "-m: torchrun has started ranks, which train one run" in out_of(
        capsys, "train", "-m", "optim.lr=1,2", code=2
    )


TINY = [
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_heads=2",
    "model.sequence_length=32",
    "parallel=single",
    "engine=fp32_zero1",
    "train.steps=3",
    "train.global_batch_size=2",
    "train.micro_batch_size=2",
    "train.validate_every=0",
    "train.validation_samples=4",
    "logging=plain",
    "report.plot=false",
    "report.prompt=null",
]


@pytest.mark.slow
def test_a_sweep_trains_its_runs_from_settings_of_ones_own(
    capfd: pytest.CaptureFixture[str], tiny_dataset: Path, own: Path
) -> None:
    """The second diverges: the third is trained all the same, and the exit code says so."""
    arguments = ["train", "-m", "--config", "my.yaml", *TINY, f"data.path={tiny_dataset}"]
    assert main([*arguments, "optim.lr=1e-3,1e38,1e-4", "optim.clip_grad_norm=0"]) == 4
    table = capfd.readouterr().out.splitlines()[-4:]
    rows = [(line[:19].strip(), *line[19:].split()) for line in table]
    assert [row[:3] for row in rows] == [
        ("run", "outcome", "step"),
        ("two words-lr=0.001", "done", "3"),
        ("two words-lr=1e+38", "diverged", "2"),
        ("two words-lr=0.0001", "done", "3"),
    ]
    config = load_run_config("runs/two words-lr=0.0001")
    assert (config.optim.lr, config.run.name, config.train.steps) == (1e-4, "two words-lr=0.0001", 3)
    assert main([*arguments, "optim.lr=1e-3,1e-4", "optim.clip_grad_norm=0"]) == 0, "the same names resume"
    assert capfd.readouterr().out.count("is complete: all 3 steps are done") == 2


@pytest.mark.slow
def test_a_run_begins_with_anothers_weights_and_need_not_name_its_model(
    capfd: pytest.CaptureFixture[str], tiny_dataset: Path
) -> None:
    """The first saves by the clock alone, on two ranks that agree; the second has its model and its own dropout."""
    data = [f"data.path={tiny_dataset}", "report.prompt=null"]
    by_the_clock = ["checkpoint.every=0", "checkpoint.every_minutes=1e-9", "checkpoint.keep_last=0"]
    first = ["train", "model=quickstart", *TINY, *data, *by_the_clock, "parallel.tp=2", "run.name=第一 one"]
    assert main(first) == 0
    saved = sorted(path.name for path in Path("runs/第一 one/checkpoints").iterdir())
    assert saved == ["step-00000001", "step-00000002", "step-00000003"]
    rest = [override for override in TINY if not override.startswith("model.")]
    second = ["train", *rest, *data, "checkpoint.init_from=runs/第一 one", "model.dropout=0.1", "run.name=two"]
    assert main(second) == 0
    out = capfd.readouterr().out
    assert "model          taken from runs/第一 one/checkpoints/step-00000003" in out
    assert "model.dropout=0.1: runs/第一 one/checkpoints/step-00000003 was trained with 0.0" in out
    one, two = load_run_config("runs/第一 one").model, load_run_config("runs/two").model
    assert (two.hidden_size, two.dropout, one.dropout) == (16, 0.1, 0.0)
    assert main([*second[:-1], "run.name=three", "model.hidden_size=32"]) == 3
    assert "model.hidden_size=32: runs/第一 one/checkpoints/step-00000003 was trained with 16" in capfd.readouterr().err


def test_a_path_with_a_comma_may_have_been_meant_as_two(capsys: pytest.CaptureFixture[str]) -> None:
    said = out_of(capsys, "train", "experiment=mine", "data.path=data/a,data/b", code=3)
    assert said.startswith("data.path=data/a,data/b: no such folder")
    assert said.endswith("or several as data.path=[data/a,data/b]\n")
