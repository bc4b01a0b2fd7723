"""What a conversion to megalm makes is a run: generate, evaluate and init_from take it; and the tool around it all."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from foreign_models import BERT, LLAMA, MODELS, convert_quietly, write_random_run

from megalm.config.check import violations
from megalm.config.compose import load_run_config
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.evaluate.perplexity import run_evaluate
from megalm.generate.run import run_generate
from megalm.runs.start import StartMode, resolve_start

TOOL = Path(__file__).parents[3] / "tools" / "convert_checkpoint.py"


def _tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, check=False)


def _main() -> Callable[[list[str]], int]:
    """The tool in this process."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def tokenizer(tiny_dataset: Path) -> Tokenizer:
    return Tokenizer.load(tiny_dataset / "tokenizer.json")


@pytest.fixture(scope="module")
def exported(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer, of a model for the tiny dataset."""
    folder = tmp_path_factory.mktemp("exported")
    model = replace(LLAMA, vocab_size=tokenizer.vocab_size, sequence_length=64)
    write_random_run(folder / "run", model, tokenizer=tokenizer)
    convert_quietly("megalm", "hf", folder / "run", folder / "hf")
    return folder / "hf"


def test_a_converted_run_generates_evaluates_and_is_started_from(
    exported: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "llama v2 (a copy)"
    convert_quietly("hf", "megalm", exported, run, tp=2, pp=2)
    text = run_generate(run, "def ", max_new_tokens=5, temperature=0.0, top_k=0, seed=0)
    original = exported.parent / "run"
    assert text == run_generate(original, "def ", max_new_tokens=5, temperature=0.0, top_k=0, seed=0)
    scores = run_evaluate(run, [f"data.path={tiny_dataset}"])
    assert scores["val_loss"] == run_evaluate(original, [f"data.path={tiny_dataset}"])["val_loss"]
    config = load_run_config(run)
    assert violations(config, 4) == []
    assert config.run.name == "llama-v2-a-copy"
    fresh = replace(config, checkpoint=replace(config.checkpoint, init_from=str(run)))
    start = resolve_start(fresh, tmp_path / "another")
    assert (start.mode, start.path) == (StartMode.INIT_FROM, run / "checkpoints" / "step-00000000")


@pytest.mark.parametrize("name", MODELS)
def test_sizes_that_megalm_derives_stay_open_as_in_its_presets(name: str, tmp_path: Path) -> None:
    model = replace(MODELS[name], ffn_hidden_size=None, dropout=0.125, attention_dropout=0.25, init_std=0.01)
    if model.norm == "rmsnorm":
        model = replace(model, dropout=0.0)  # Llama has none
    write_random_run(tmp_path / "run", model)
    convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "hf")
    convert_quietly("hf", "megalm", tmp_path / "hf", tmp_path / "again")
    assert load_run_config(tmp_path / "again").model == model


def test_a_checkpoint_is_as_good_as_its_run(exported: Path, tmp_path: Path) -> None:
    checkpoint = exported.parent / "run" / "checkpoints" / "step-00000000"
    convert_quietly("megalm", "hf", checkpoint, tmp_path / "hf")
    for file in exported.iterdir():
        assert file.read_bytes() == (tmp_path / "hf" / file.name).read_bytes()


def test_an_encoder_becomes_a_run_with_its_objective(tmp_path: Path) -> None:
    write_random_run(tmp_path / "run", BERT)
    config = load_run_config(tmp_path / "run")
    assert config.objective.name == "mlm"
    assert violations(config, 1) == []


def test_steps_and_origin_are_kept(exported: Path, tmp_path: Path) -> None:
    from megalm.checkpoint.manifest import read_manifest
    from megalm.checkpoint.store import locate

    convert_quietly("hf", "megalm", exported, tmp_path / "out", dtype="bf16")
    manifest = read_manifest(locate(tmp_path / "out").path)
    tokenizer = Tokenizer.load(exported / "tokenizer.json")
    assert manifest.training == {
        "architecture": "llama",
        "imported": {
            "format": "hf",
            "dtype": "bfloat16",
            "ids": {
                "config": {"bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": None},
                "generation": {"eos_token_id": tokenizer.eos_id},
            },
        },
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
    }
    assert load_run_config(tmp_path / "out").engine.dtype == "bf16"


def test_the_tool_converts_and_says_what_it_did(exported: Path, tmp_path: Path) -> None:
    result = _tool("--from", "hf", "--to", "megalm", exported, tmp_path / "run", "--tp", "2", "--verify")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'run'}: a run of megalm in pieces for tp=2 pp=1, ")
    assert "parameters in 15 tensors, fp32, " in lines[0]
    assert lines[1] == "verified: 15 tensors, equal byte for byte after a round trip"
    assert "largest difference" in lines[2]


def test_mistakes_are_lines_with_their_exit_codes(exported: Path, tmp_path: Path) -> None:
    main = _main()
    out = tmp_path / "out"
    assert main(["--from", "hf", "--to", "hf", str(exported), str(out), "--tp", "2"]) == 2
    assert main(["--from", "hf", "--to", "megalm", str(exported), str(out), "--tp", "3"]) == 2
    assert main(["--from", "hf", "--to", "megatron", str(exported), str(out), "--pp", "3"]) == 2
    assert main(["--from", "hf", "--to", "megalm", str(exported), str(out), "--shard-gb", "5"]) == 2
    assert main(["--from", "hf", "--to", "megalm", str(exported), str(exported)]) == 2
    assert main(["--from", "hf", "--to", "megalm", str(tmp_path / "nothing"), str(out)]) == 3
    assert main(["--from", "megalm", "--to", "hf", str(exported), str(out)]) == 3
    endless = ["--from", "hf", "--to", "hf", "a", "b", "--shard-gb", "nan"]
    for wrong in (["--from", "gguf", *endless[2:6]], ["--from", "hf", "--to", "deepspeed", "a", "b"], endless, []):
        assert main(wrong) == 2
    assert not out.exists()


def test_warnings_and_ctrl_c_are_lines(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from megalm.convert import convert, transfer

    arguments = ["--from", "hf", "--to", "megalm", str(exported), str(tmp_path / "out")]
    monkeypatch.setattr(transfer, "is_finite", lambda _: False)
    assert _main()(arguments) == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 11
    assert errors[0].startswith("warning: ")
    assert errors[0].endswith("holds NaN or infinity")
    assert errors[-1] == "warning: and 5 more such tensors"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert", interrupt)
    assert _main()(arguments) == 130
    assert capsys.readouterr().err == f"interrupted; nothing was written to {tmp_path / 'out'}\n"


def test_a_bug_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from megalm.convert import convert

    def fail(*_: object) -> None:
        raise AssertionError("never")

    monkeypatch.setattr(convert, "convert", fail)
    assert _main()(["--from", "hf", "--to", "megalm", str(tmp_path), str(tmp_path / "out")]) == 70
    assert "Traceback" in capsys.readouterr().err


_WAITING = """
import runpy, sys, time
from megalm.convert import convert
from megalm.convert.folder import new_folder

def wait(request, _):
    with new_folder(request.target):
        print("ready", flush=True)
        time.sleep(60)

convert.convert = wait
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_sigterm_cleans_up_as_ctrl_c_does(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WAITING, TOOL, "--from", "hf", "--to", "megalm", "none", tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == f"interrupted; nothing was written to {tmp_path / 'out'}\n"
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_format(capsys: pytest.CaptureFixture) -> None:
    assert _main()(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("megalm", "hf", "megatron", "openai-gpt2", "deepspeed", "--verify", "--tp", "--pp", "--dtype", "130"):
        assert word in text


@pytest.mark.parametrize("exists", [True, False])
def test_a_linked_target_keeps_its_link(exists: bool, tmp_path: Path) -> None:
    from megalm.convert.folder import new_folder

    disk = tmp_path / "disk"
    (disk / "model").mkdir(parents=True) if exists else disk.mkdir()
    (tmp_path / "out").symlink_to(disk / "model")
    with new_folder(tmp_path / "out") as folder:
        assert folder.parent == disk
        (folder / "weights").write_text("x")
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in disk.rglob("*")] == ["model", "weights"]


def test_a_target_that_cannot_be_renamed_is_filled(tmp_path: Path, monkeypatch) -> None:
    from megalm.convert.folder import new_folder

    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with new_folder(Path()) as folder:
            assert folder.parent == tmp_path
            (folder / "weights").write_text("x")
        assert [path.name for path in tmp_path.rglob("*")] == ["weights"]
        assert Path.cwd() == tmp_path
        (tmp_path / "weights").unlink()
