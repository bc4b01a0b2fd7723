"""Errors of the user's world are one line with an exit code; modules in the working folder are nobody's libraries."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.cli.main import main
from megalm.config.check import violations
from megalm.config.compose import compose
from megalm.config.job import planned_world_size_of
from megalm.config.parse import config_from_dict, config_to_dict, field_paths
from megalm.errors import CheckpointError, ConfigError, DataError
from megalm.launch.guard import explained, guarded
from megalm.launch.interfaces import check_interfaces, loopback_alone
from megalm.plan.summary import summary_lines

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 3, "/x/y: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "No space left on device"),
        (OSError(errno.ENAMETOOLONG, "File name too long", b"\xe9" * 3), 3, "File name too long"),
        (MemoryError(), 2, "out of memory: a smaller train.micro_batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "out of memory ("),
    ],
)
def test_errors_of_the_users_world_are_one_line(error: Exception, code: int, line: str, capsys) -> None:
    def fail() -> int:
        raise error

    assert guarded(fail) == code
    err = capsys.readouterr().err
    assert line in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.EBADF, "Bad file descriptor"), OSError("?"), ValueError("x"), KeyError(1)]
)
def test_anything_else_is_a_bug(error: Exception, capsys) -> None:
    def fail() -> int:
        raise error

    assert explained(error) is None
    assert guarded(fail) == 70
    assert "Traceback" in capsys.readouterr().err


NUMBERS = [float("inf"), -float("inf"), float("nan"), 1e308, -1, 10**30, -(10**30), 0, 1e-320, 2**63 - 1, 10**4400]


@pytest.mark.parametrize("value", NUMBERS, ids=range(len(NUMBERS)))
def test_no_number_in_any_field_is_a_traceback(value: float) -> None:
    sound = config_to_dict(compose(["experiment=quickstart"]))
    paths = [path for path, kind in field_paths().items() if "int" in str(kind) or "float" in str(kind)]
    assert len(paths) > 60
    for path in paths:
        section, name = path.split(".")
        for given in (value, [value]):
            try:
                config = config_from_dict({**sound, section: {**sound[section], name: given}})
                problems = violations(config, planned_world_size_of(config))
            except ConfigError as error:
                problems = error.lines
            if not problems:
                assert summary_lines(config, planned_world_size_of(config))
            assert all(len(line) < 2000 for line in problems)


@pytest.mark.parametrize("value", ["1e400", "nan", "-inf", str(10**30)])
@pytest.mark.parametrize("field", ["train.steps", "launch.ranks", "model.hidden_size"])
def test_numbers_of_the_command_line(value: str, field: str, capsys) -> None:
    assert main(["check", "experiment=quickstart", f"{field}={value}"]) == 2
    err = capsys.readouterr().err
    assert f"{field}=" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("text", ["caf\udce9", "a\0b"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "r", "--prompt", "TEXT"],
        ["train", "experiment=quickstart", "run.dir=TEXT"],
        ["check", "experiment=quickstart", "data.path=TEXT"],
        ["evaluate", "r", "data.path=TEXT"],
    ],
)
def test_what_is_no_text_is_refused(arguments: list[str], text: str, capsys) -> None:
    assert main([argument.replace("TEXT", text) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert ("NUL" if "\0" in text else "not UTF-8") in err


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30, -(10**30)])
def test_a_seed_out_of_range(seed: int, capsys) -> None:
    code = main(["generate", "no-run", "--prompt", "a", "--seed", str(seed)])
    assert code == 2
    assert capsys.readouterr().err == f"seed={seed}: out of range; 0 to {2**63 - 1}\n"


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("+train.steps=3", "leave out the plus: train.steps=3"),
        ("++train.steps=3", "leave out the plus: train.steps=3"),
        ("+model=quickstart", "leave out the plus: model=quickstart"),
        ("--train.steps=3", "train.steps=3"),
        ("train.steps 3", "write train.steps=3"),
        ("train.steps =3", "write train.steps=3"),
        ("train.steps", "write train.steps=VALUE"),
        ("+run.name=a b", "run.name='a b'"),
    ],
)
def test_how_other_tools_write_settings(given: str, advice: str, capsys) -> None:
    assert main(["check", "experiment=quickstart", given]) == 2
    err = capsys.readouterr().err
    assert err.endswith(f"{advice}\n")
    assert len(err.splitlines()) == 1


def test_own_ranks_need_loopback_alone() -> None:
    assert loopback_alone({"GLOO_SOCKET_IFNAME": "nope9"}) == {"GLOO_SOCKET_IFNAME": "lo"}
    assert loopback_alone({"NCCL_SOCKET_IFNAME": "nope9"})["NCCL_SOCKET_IFNAME"] == "lo"
    assert "NCCL_SOCKET_IFNAME" not in loopback_alone({"NCCL_SOCKET_IFNAME": "lo"})


def test_an_interface_that_is_not_there_is_named() -> None:
    check_interfaces({})
    check_interfaces({"GLOO_SOCKET_IFNAME": "lo"})
    with pytest.raises(
        ConfigError, match=r"^GLOO_SOCKET_IFNAME=nope9,lo: .* has no network interface nope9; it has lo"
    ):
        check_interfaces({"GLOO_SOCKET_IFNAME": "nope9,lo"})


def test_a_dataset_that_is_not_there_says_where_it_was_looked_for(tmp_path: Path, monkeypatch) -> None:
    from megalm.data.shards.dataset import check_folder
    from megalm.data.shards.store import open_store

    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"data/none: no such folder in {tmp_path}, where this command was started"):
        check_folder(open_store("data/none"))


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "megalm", "check", "experiment=quickstart"],
        [str(REPOSITORY / "tools" / "inspect_checkpoint.py"), "--help"],
        ["-m", "megalm.launch.worker"],
        ["-c", "import megalm.launch.isolation as i; i.shield(); import multiprocessing as m; "
               "p = m.get_context('spawn').Process(target=print); p.start(); p.join(); raise SystemExit(p.exitcode)"],
    ],
    ids=["megalm", "tool", "rank", "spawned"],
)  # fmt: skip
def test_modules_in_the_working_folder_are_not_imported(command: list[str], tmp_path: Path) -> None:
    for name in ("random", "tokenizers", "torch", "numpy", "json", "socket", "yaml", "tempfile"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the user')")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    if command[:2] == ["-m", "megalm.launch.worker"]:
        environment["PYTHONSAFEPATH"] = "1"  # as the launcher starts ranks
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert "of the user" not in done.stderr + done.stdout
    assert done.returncode == (1 if command[-1] == "megalm.launch.worker" else 0), done.stderr


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8, "sliding_window": None}, "mixture of experts (num_local"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512, "n_routed_experts": 64}, "latent attention (MLA) (kv_lora"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"model_type": "mamba", "state_size": 16}, "state-space layers (state_size=16)"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "soft-capped logits (final"),
    ],
)
def test_a_model_of_another_kind_is_told_what_megalm_lacks(config: dict[str, object], words: str, tmp_path) -> None:
    from megalm.convert.huggingface.names import read_architecture

    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        read_architecture(tmp_path / "config.json")
    assert words in str(caught.value)
    assert "megalm converts" in str(caught.value)


def test_a_bare_bert_is_told_that_it_has_no_masked_word_head() -> None:
    from megalm.config.schema import Model
    from megalm.convert.huggingface.bert import BertFamily
    from megalm.convert.huggingface.names import foreign_shapes, missing_head

    model = Model(num_layers=1, hidden_size=8, num_heads=2, vocab_size=20, sequence_length=8, causal=False,
                  residual="post_norm", token_types=2, embedding_norm=True, head="masked_lm")  # fmt: skip
    names = list(foreign_shapes(BertFamily(), model))
    assert missing_head(BertFamily(), model, names) is None
    bare = [name for name in names if not name.startswith("cls.")]
    assert "no masked-word head" in str(missing_head(BertFamily(), model, bare))


def test_a_step_far_away_is_found_at_once_or_refused(capsys) -> None:
    from megalm.data.stream.batch_size import BatchSize
    from megalm.data.stream.ledger import Steps

    planned = BatchSize(final=8, start=4, increment=4, ramp_tokens=1024, sequence_length=64)
    steps = Steps([4, 8], planned)
    start = 8
    for step in (3, 4, 5, 6, 7):
        assert steps.samples_of(step).start == start
        start += planned.at(start)
    assert steps.samples_of(2**31 - 1).start == start + 8 * (2**31 - 1 - 8)
    assert main(["data", "show", "no-run", "--step", str(10**30)]) == 2
    assert "at most 2147483647" in capsys.readouterr().err


def test_labels_of_a_run_are_no_difference() -> None:
    from megalm.checkpoint.compare import is_label

    assert all(map(is_label, ["run.name", "run.dir", "logging.every", "checkpoint.every", "report.plot"]))
    assert not any(map(is_label, ["run.seed", "step", "optim.lr", "position.consumed_samples", "model.dropout"]))
