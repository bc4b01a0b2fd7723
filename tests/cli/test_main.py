"""The command line in this process: exit codes, messages, help; no rank is started."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings

from megalm import __version__
from megalm.cli.main import main
from megalm.errors import ConfigError
from tests.unit.config.random_invalid import InvalidConfig, random_invalid

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def megalm(capsys):
    def run(*arguments: str) -> Result:
        code = main(arguments)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


def test_alone_prints_help(megalm):
    result = megalm()
    assert result.code == 0
    for command in ("train", "evaluate", "generate", "verify", "check"):
        assert f"\n  {command} " in result.out


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "verify", "check"])
def test_help_of_commands(megalm, command):
    result = megalm(command, "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: megalm {command}")
    assert "experiment=quickstart" in " ".join(result.out.split())


def test_version(megalm):
    assert megalm("--version").out == f"megalm {__version__}\n"


def test_unknown_command(megalm):
    result = megalm("trian", "experiment=quickstart")
    assert result.code == 2
    assert "trian" in result.err and "train" in result.err


def test_check_prints_what_follows_from_a_config(megalm):
    result = megalm("check", "experiment=gpt3_175b", "cluster.gpus=1024")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[-1] == "ok"
    table = {line.split()[0]: line for line in lines[:-1]}
    assert "174,604,259,328 (174.6B)" in table["parameters"]
    assert "tp 8 · pp 16 · cp 1 · dp 8 = 1,024 ranks" in table["layout"]
    assert "1,536 sequences = 8 replicas · 192 micro-batches · 1" in table["batch"]
    assert f"{1536 * 2048:,} per step" in table["tokens"]


def test_check_counts_the_tokens_of_a_ramp_and_of_a_cooldown(megalm):
    ramp = ["train.batch_ramp_start=2", "train.batch_ramp_tokens=10240", "train.micro_batch_size=2", "train.steps=100"]
    result = megalm("check", "experiment=quickstart", *ramp, "optim=adamw_wsd")
    assert result.code == 0, result.err
    # Three sizes share 40 samples; each is left by the first step that ends at 13.3, 26.7 and 40 or after: 14, 30, 42.
    total = (42 + (100 - 7 - 4 - 2) * 8) * 256
    assert "rising from 2 by 2 over 10.2k tokens" in result.out
    assert f"{total / 1000:.1f}k in 100 steps" in result.out
    assert f"constant, then sqrt to 0 of it over the last {total // 10 / 1000:.1f}k tokens" in result.out


def test_check_says_what_a_run_is_too_short_for_and_what_it_does_not_use(megalm):
    result = megalm("check", "experiment=gpt3_125m", "train.steps=20", "optim=adamw_constant")
    assert result.code == 0, result.err
    first, second = (line.removeprefix("note").strip() for line in result.out.splitlines() if line.startswith("note"))
    assert first.startswith(
        "optim.warmup_tokens=375000000 is longer than the run, 10485760 tokens: the learning rate ends"
    )
    assert second == "optim.decay_tokens=260000000000: not used, as optim.schedule=constant"


def test_check_refuses_gpus_that_make_no_layout(megalm):
    result = megalm("check", "experiment=gpt3_175b", "cluster.gpus=1000")
    assert (result.code, result.out) == (2, "")
    assert "cluster.gpus=1000" in result.err and "1024" in result.err


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize(
    "override", ["train.stepz=3", "nosuch.field=1", "experiment=nosuch", "train.steps", "a=b=[", "+x=1"]
)
def test_wrong_overrides(megalm, command, override):
    result = megalm(command, "experiment=quickstart", override)
    assert result.code == 2
    assert result.out == ""
    assert override.split("=")[0].lstrip("+") in result.err
    assert "Traceback" not in result.err and "HYDRA_FULL_ERROR" not in result.err


def test_missing_dataset(megalm, tmp_path):
    result = megalm("train", "experiment=quickstart", f"data.path={tmp_path}/none", f"run.dir={tmp_path}/runs")
    assert result.code == 3
    assert f"{tmp_path}/none" in result.err and "megalm prepare" in result.err
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_missing_checkpoint(megalm, tmp_path, tiny_dataset):
    result = megalm(
        "train",
        "experiment=quickstart",
        f"data.path={tiny_dataset}",
        f"run.dir={tmp_path}/runs",
        f"checkpoint.resume={tmp_path}/no-checkpoint",
    )
    assert result.code == 3
    assert f"{tmp_path}/no-checkpoint" in result.err
    assert not (tmp_path / "runs").exists()


def test_data_that_do_not_fit_the_model(megalm, tmp_path, tiny_dataset):
    result = megalm(
        "train",
        "experiment=quickstart",
        f"data.path={tiny_dataset}",
        "model.vocab_size=64",
        "model.sequence_length=100",
    )
    assert result.code == 2
    assert [line.partition(":")[0] for line in result.err.splitlines()] == [
        "model.vocab_size=64",
        "model.sequence_length=100",
    ]


@pytest.mark.parametrize("command", [("evaluate",), ("generate", "--prompt", "x")])
def test_a_folder_that_is_no_run(megalm, tmp_path, command):
    result = megalm(command[0], str(tmp_path), *command[1:])
    assert result.code == 2
    assert str(tmp_path) in result.err and "Traceback" not in result.err


@pytest.mark.parametrize("prompt", ["def main(", "a=b, c=[${x}", "--flag", "'\"{", ""])
@pytest.mark.parametrize("order", ["run prompt override", "prompt run override", "run override prompt"])
def test_a_prompt_reaches_generation_untouched(megalm, monkeypatch, prompt, order):
    seen = {}

    def find_model(run, overrides, world_size):
        seen.update(run=str(run), overrides=overrides, world_size=world_size)
        return SimpleNamespace(tokenizer=None, check_causal=lambda: None)

    def text_prompt(tokenizer, prompt):
        seen.update(prompt=prompt)
        raise ConfigError("that is far enough")

    monkeypatch.setattr("megalm.cli.generate.find_model", find_model)
    monkeypatch.setattr("megalm.cli.generate.text_prompt", text_prompt)
    parts = {
        "run": ["runs/a"],
        "prompt": [f"--prompt={prompt}", "--max-new-tokens", "7"],
        "override": ["launch.device=cpu"],
    }
    result = megalm("generate", *itertools.chain.from_iterable(parts[name] for name in order.split()))
    assert (result.code, result.err) == (2, "that is far enough\n")
    assert seen == {"run": "runs/a", "prompt": prompt, "overrides": ["launch.device=cpu"], "world_size": None}


def test_a_bug_is_a_traceback_and_70(megalm, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug of megalm")

    monkeypatch.setattr("megalm.config.compose.composition", broken)
    result = megalm("check")
    assert result.code == 70
    assert "Traceback" in result.err and "a bug of megalm" in result.err


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(invalid=random_invalid())
def test_random_invalid_configs(megalm, invalid: InvalidConfig):
    """Every violation is told, in lines of one form; nothing starts."""
    result = megalm("train", *invalid.overrides)
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    lines = result.err.splitlines()
    assert all("=" in line.partition(": ")[0] and ";" in line for line in lines), result.err
    assert len(lines) == len(set(lines))
    named = {line.partition("=")[0] for line in lines}
    for fault in invalid.faults:
        assert named & set(fault.named), (fault, result.err)


def test_check_is_quick_and_imports_no_torch():
    code = (
        "import sys; from megalm.cli.main import main; "
        "code = main(['check', 'experiment=gpt3_175b', 'cluster.gpus=1024']); "
        "heavy = {'torch', 'deepspeed', 'wandb', 'matplotlib', 'mpi4py'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - started < 10  # under 1 s on an idle machine


def test_help_imports_nothing_that_composes_or_computes():
    code = (
        "import sys; from megalm.cli.main import main; main(['--help']); "
        "heavy = {'torch', 'hydra', 'omegaconf', 'yaml', 'numpy', 'tokenizers'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_python_m_megalm():
    result = subprocess.run(
        [sys.executable, "-m", "megalm", "check", "experiment=quickstart", "parallel.tp=3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("parallel.tp=3: ")


def test_check_looks_at_the_data_that_are_here(megalm, tiny_dataset, tmp_path):
    small = ["model.sequence_length=64", "optim.warmup_tokens=512"]
    here = megalm("check", "experiment=quickstart", f"data.path={tiny_dataset}", *small)
    assert here.code == 0, here.err
    assert "training tokens, all files there" in here.out
    elsewhere = megalm("check", "experiment=quickstart", f"data.path={tmp_path}/none")
    assert elsewhere.code == 0
    assert f"not checked: {tmp_path}/none is not a folder of this machine" in elsewhere.out
    (tmp_path / "empty").mkdir()
    broken = megalm("check", "experiment=quickstart", f"data.path=[{tiny_dataset},{tmp_path}/empty]", *small)
    assert broken.code == 3
    assert f"data.path={tmp_path}/empty: has no train/ and val/" in broken.err
