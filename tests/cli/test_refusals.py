"""What the command line refuses before a rank starts: damaged datasets, wrong options, runs that are not there."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import TINY

from megalm.cli.main import main
from megalm.runs.folder import run_folder_of
from tests.unit.config.random_invalid import SOUND, overrides_of


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OMPI_", "SLURM_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)


def megalm(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def refused(code: int, *arguments: str) -> str:
    """Standard error of a command that must fail with ``code``, in words rather than a traceback."""
    found, out, err = megalm(*arguments)
    assert found == code, err
    assert out == ""
    assert err.strip()
    assert "Traceback" not in err
    return err


def test_a_sound_config_passes_the_check() -> None:
    code, out, err = megalm("check", *overrides_of(SOUND))
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "ok"


def test_several_mistakes_are_several_lines() -> None:
    err = refused(2, "check", "experiment=quickstart", "train.stps=3", "modle=x", "nonsense")
    assert len(err.splitlines()) == 3


@pytest.mark.parametrize(
    "lost", ["train/index.json", "val/index.json", "train/shard-000000.tar", "val", "tokenizer.json"]
)
def test_a_half_written_dataset(tiny_dataset: Path, tmp_path: Path, lost: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_dataset, data)
    shutil.rmtree(data / lost) if (data / lost).is_dir() else (data / lost).unlink()
    err = refused(3, "train", *TINY, f"data.path={data}", f"run.dir={tmp_path}", "run.name=a")
    assert lost.partition("/")[0] in err
    assert not (tmp_path / "a").exists()


def test_a_cut_off_shard(tiny_dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_dataset, data)
    shard = data / "train" / "shard-000000.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    assert shard.name in refused(3, "train", *TINY, f"data.path={data}", f"run.dir={tmp_path}")


def test_a_run_that_is_not_there() -> None:
    assert "no-such-run" in refused(2, "evaluate", "no-such-run")
    assert "no-such-run" in refused(2, "generate", "no-such-run", "--prompt", "a")


def test_a_file_of_texts_in_a_folder_that_is_not_there() -> None:
    """Before anything is read or loaded."""
    said = refused(2, "generate", "no-such-run", "--input", "prompts.jsonl", "--output", "nowhere/texts.jsonl")
    assert said == "--output=nowhere/texts.jsonl: there is no folder nowhere; make it\n"


def test_a_run_is_a_folder_or_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "try1").mkdir(parents=True)
    assert run_folder_of("try1") == Path("runs/try1")
    assert run_folder_of("runs/try1") == Path("runs/try1")
    (tmp_path / "try1").mkdir()
    assert run_folder_of("try1") == Path("try1"), "a folder that is there comes first"
    assert run_folder_of("other") == Path("other"), "an error names what was asked for"


@pytest.mark.parametrize("arguments", [["train", "--steps", "3"], ["generate", "r"], ["evaluate"]])
def test_wrong_options_are_refused(arguments: list[str]) -> None:
    refused(2, *arguments)


@pytest.mark.parametrize("arguments", [["train", "experiment=nothing"], ["--help"]])
def test_what_only_checks_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from megalm.cli.main import main; main(sys.argv[1:]);"
        "sys.exit(' '.join({'torch', 'deepspeed', 'wandb'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tasks_that_cannot_be_asked_stop_a_run_before_it_has_a_folder(tiny_dataset: Path, tmp_path: Path) -> None:
    run = [*TINY, f"data.path={tiny_dataset}", f"run.dir={tmp_path}", "run.name=a"]
    assert refused(2, "train", *run, "evaluate.tasks=[arithmatic]") == (
        "evaluate.tasks=arithmatic: there is no such task; did you mean arithmetic?\n"
    )
    missing = refused(3, "train", *run, "evaluate.tasks=[arithmetic]", f"evaluate.data=[{tmp_path}/none.jsonl]")
    assert (
        missing == f"{tmp_path}/none.jsonl: there is no such file; JSON Lines, or hf:NAME of a Hugging Face dataset\n"
    )
    (tmp_path / "sums.jsonl").write_text('{"context": "Q", "completion": " 1"}\n{"context": "Q"}\n')
    wrong = refused(3, "train", *run, "evaluate.tasks=[arithmetic]", f"evaluate.data=[{tmp_path}/sums.jsonl]")
    assert wrong == (
        f"{tmp_path}/sums.jsonl:2: target: there is no field completion; the record has context (task arithmetic)\n"
    )
    assert not (tmp_path / "a").exists()


def test_check_looks_at_the_tasks_whose_data_are_here(tiny_dataset: Path, tmp_path: Path) -> None:
    run = [*TINY, f"data.path={tiny_dataset}", "evaluate.tasks=[cloze]"]
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat sat on the mat"}\n')
    code, out, err = megalm("check", *run, f"evaluate.data=[{tmp_path}/texts.jsonl]")
    assert (code, err) == (0, "")
    assert "tasks          cloze (1 items)" in out
    code, out, _ = megalm("check", *run, "evaluate.data=[/cluster/texts.jsonl]")
    assert code == 0
    assert "not checked: /cluster/texts.jsonl is not on this machine" in out
    assert "task qa names no data" in refused(2, "check", *run[:-1], "evaluate.tasks=[qa]")
