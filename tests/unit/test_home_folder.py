"""``~`` is the home folder wherever a path is given, and never a folder of that name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from megalm.config.arguments import expand_home
from megalm.config.compose import compose, load_run_config, save_config
from megalm.config.parse import PATHS, field_paths
from megalm.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_in_every_setting_that_is_a_path(home: Path, quote: str) -> None:
    given = [f"{name}={quote}~/x{quote}" for name in sorted(PATHS)]
    config = compose(["experiment=quickstart", "run.name=a", *given])
    for name in PATHS:
        section, _, field = name.partition(".")
        value = getattr(getattr(config, section), field)
        assert value == ((f"{home}/x",) if isinstance(value, tuple) else f"{home}/x"), name
    assert set(field_paths()) >= PATHS


def test_in_a_list_and_in_a_saved_config(home: Path, tmp_path: Path) -> None:
    config = compose(["experiment=quickstart", "run.name=a", 'data.path=["~/x","y/~/z","http://host/~user/z"]'])
    assert config.data.path == (f"{home}/x", "y/~/z", "http://host/~user/z")
    save_config(config, tmp_path / "config.yaml")
    assert load_run_config(tmp_path, ["checkpoint.init_from=~"]).checkpoint.init_from == str(home)


def test_a_user_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"run\.dir=~nobody-here/x: no such home folder; .*of 'nobody-here'"):
        compose(["experiment=quickstart", "run.name=a", "run.dir=~nobody-here/x"])


def test_expansion_is_of_the_beginning_alone(home: Path) -> None:
    assert expand_home("~") == str(home)
    assert expand_home("~/a/~/b") == f"{home}/a/~/b"
    assert expand_home("a~") == "a~"
    assert expand_home("./~") == "./~"


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_tool", REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_in_the_tools(home: Path, tmp_path: Path, capsys) -> None:
    (home / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    assert tool("train_tokenizer").main(["~/text.txt", "--vocab-size", "280", "--out", "~/tokenizers/"]) == 0
    arguments = ["--corpus", "text", "--input", "~/text.txt", "--tokenizer", "~/tokenizers/tokenizer.json"]
    arguments += ["--decontaminate", "~/text.txt", "--split-on", "line", "--workers", "1", "--val-fraction", "0"]
    assert tool("prepare_data").main([*arguments[:6], *arguments[8:], "--out", "~/data/x/"]) == 0
    assert tool("prepare_data").main([*arguments, "--out", "~/data/y"]) == 3  # it is all in the evaluation file
    assert "contaminated" in capsys.readouterr().err
    assert tool("prepare_data").main(["--verify", "~/data/x"]) == 0
    assert "every chunk of train is as it was written" in capsys.readouterr().out
    for name, arguments in (
        ("convert_checkpoint", ["--from", "hf", "--to", "megalm", "~/none", "~/to"]),
        ("inspect_checkpoint", ["~/none"]),
    ):
        assert tool(name).main(arguments) in (2, 3)
        assert f"{home}/none" in capsys.readouterr().err
    assert tool("prepare_data").main([*arguments[:2], "--corpus", "text", "--out", "~nobody-here/x"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
