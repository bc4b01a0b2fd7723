"""``--verify`` finds what went wrong on the way, and weights that are no numbers are reported."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign_models import BERT, GPT2, LLAMA, NEOX, Nobody, RandomSource, convert_quietly, write_random_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalm.checkpoint.tensor_file import TensorFileWriter
from megalm.config.schema import Model
from megalm.convert import verify
from megalm.convert.checks import same_values
from megalm.convert.convert import Request, convert
from megalm.convert.folder import new_folder
from megalm.convert.huggingface.gpt2 import GPT2Family
from megalm.convert.huggingface.read import HfSource
from megalm.convert.mapping import Rule
from megalm.convert.run import RunSource, write_run
from megalm.convert.transfer import Transfer
from megalm.errors import CheckpointError, ConfigError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_random_run(tmp_path / "run", LLAMA, tp=2)
    return tmp_path / "run"


def _spoil_writes(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[str, Tensor], Tensor]) -> None:
    write = TensorFileWriter.write
    monkeypatch.setattr(
        TensorFileWriter, "write", lambda self, name, tensor, **how: write(self, name, spoil(name, tensor), **how)
    )


def test_a_flipped_bit_is_found_and_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(name: str, tensor: Tensor) -> Tensor:
        if name != "model.layers.1.self_attn.k_proj.weight":
            return tensor
        bits = tensor.clone()
        bits.view(torch.int32)[3, 5] ^= 1
        return bits

    _spoil_writes(monkeypatch, flip)
    target = run.parent / "hf"
    with pytest.raises(CheckpointError, match=r"--verify: blocks\.1\.attention\.qkv\.weight: .*element 1125 is"):
        convert_quietly("megalm", "hf", run, target, verify=True)
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]
    convert_quietly("megalm", "hf", run, target)  # without --verify nobody looks


def test_a_run_whose_slices_are_wrong_is_found(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_quietly("megalm", "hf", run, run.parent / "hf")
    _spoil_writes(monkeypatch, lambda name, tensor: tensor.flip(0) if name.endswith("head.weight") else tensor)
    with pytest.raises(CheckpointError, match=r"--verify: .*/out/.*head\.weight is corrupt"):
        convert_quietly("hf", "megalm", run.parent / "hf", run.parent / "out", tp=2, verify=True)
    assert not (run.parent / "out").exists()


def test_an_architecture_that_is_described_wrongly_is_found_by_its_logits(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from megalm.convert.huggingface.llama import LlamaFamily

    right = LlamaFamily.config_from_model
    monkeypatch.setattr(LlamaFamily, "config_from_model", lambda self, model: right(self, model) | {"rope_theta": 99.0})
    with pytest.raises(CheckpointError, match=r"--verify: logits .* more than 0\.0001"):
        convert_quietly("megalm", "hf", run, run.parent / "hf", verify=True)
    assert not (run.parent / "hf").exists()


def test_the_library_must_find_all_it_wants(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from megalm.convert.huggingface.llama import LlamaFamily

    right = LlamaFamily.rules

    def misnamed(self: LlamaFamily, model: Model) -> list[Rule]:
        return [
            replace(rule, foreign=tuple(n.replace("l.norm", "l.nrm") for n in rule.foreign))
            for rule in right(self, model)
        ]

    monkeypatch.setattr(LlamaFamily, "rules", misnamed)
    with pytest.raises(
        CheckpointError, match=r"--verify: transformers did not find.*missing_keys.*model\.norm\.weight"
    ):
        convert_quietly("megalm", "hf", run, run.parent / "hf", verify=True)


def test_what_was_compared_is_said(run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    if verify.has_library():
        report = convert_quietly("megalm", "hf", run, run.parent / "hf", verify=True)
        assert "largest difference" in report.verified[1]
        assert "between megalm (source) and transformers" in report.verified[1]
        assert report.verified[2:] == ()
        assert capfd.readouterr() == ("", "")  # none of the library's own words
    monkeypatch.setattr(verify, "has_library", lambda: False)
    report = convert_quietly("megalm", "hf", run, run.parent / "own", verify=True)
    assert report.verified[0] == "verified: 15 tensors, equal byte for byte after a round trip"
    assert "between megalm (source) and megalm (target)" in report.verified[1]
    assert "pip install 'megalm[convert]'" in report.verified[2]
    report = convert_quietly("megalm", "megalm", run, run.parent / "again", verify=True)
    assert len(report.verified) == 2  # the library has no part in this


def test_weights_that_are_no_numbers_are_warned_of_and_converted(tmp_path: Path) -> None:
    source = RandomSource(GPT2, torch.bfloat16)
    source.values["blocks.0.mlp.up.weight"][1, 1] = float("nan")
    source.values["final_norm.bias"][0] = float("-inf")
    transfer = _write(source, tmp_path / "run")
    assert sorted(transfer.warnings) == [
        "blocks.0.mlp.up.weight: holds NaN or infinity",
        "final_norm.bias: holds NaN or infinity",
    ]
    report = convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "hf")
    assert len(report.warnings) == 2
    report = convert_quietly("hf", "megalm", tmp_path / "hf", tmp_path / "again", tp=2)
    assert len(report.warnings) == 2
    with pytest.raises(
        CheckpointError, match=r"--verify: logits .* all NaN or infinite \(12,928 of 12,928\).* nothing"
    ):
        convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "proven", verify=True)
    for name, value in source.values.items():
        assert same_values(RunSource(tmp_path / "again").read(name), value)


def test_numbers_too_large_for_a_cast_are_warned_of(tmp_path: Path) -> None:
    write_random_run(tmp_path / "run", NEOX)
    convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    save_file(load_file(file) | {"gpt_neox.embed_in.weight": torch.full((101, 32), 1e6)}, file)
    report = convert_quietly("hf", "megalm", tmp_path / "hf", tmp_path / "half", dtype="fp16")
    assert report.warnings == ("embedding.weight: holds numbers too large for fp16",)


def test_casts_are_verified_after_the_same_cast(tmp_path: Path) -> None:
    for number, model in enumerate((GPT2, BERT)):
        write_random_run(tmp_path / f"{number}-run", model)
        hf, short = tmp_path / f"{number}-hf", tmp_path / f"{number}-short"
        convert_quietly("megalm", "hf", tmp_path / f"{number}-run", hf, dtype="fp16", verify=True)
        convert_quietly("hf", "megalm", hf, short, dtype="bf16", verify=True)
        assert (HfSource(hf).info.dtype, RunSource(short).info.dtype) == (torch.float16, torch.bfloat16)


def test_an_error_on_the_way_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, tensor: Tensor) -> Tensor:
        if "layers.1" in name:
            raise OSError(28, "No space left on device")
        return tensor

    _spoil_writes(monkeypatch, fail)
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        convert_quietly("megalm", "hf", run, run.parent / "deep" / "hf", shard_bytes=10_000)
    assert not (run.parent / "deep").exists()
    assert threading.active_count() == before


def test_ctrl_c_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str, tensor: Tensor) -> Tensor:
        raise KeyboardInterrupt

    _spoil_writes(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_quietly("megalm", "hf", run, run.parent / "hf")
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]


def test_what_a_killed_conversion_left_is_removed(run: Path) -> None:
    left = run.parent / ".unfinished-hf-0123abcd"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    anothers = run.parent / ".unfinished-hf-2-0123abcd"  # of a conversion to hf-2
    anothers.mkdir()
    convert_quietly("megalm", "hf", run, run.parent / "hf")
    assert sorted(path.name for path in run.parent.iterdir()) == [anothers.name, "hf", "run"]


def test_a_second_conversion_to_one_place_is_refused_at_once(run: Path) -> None:
    target = run.parent / "hf"
    with new_folder(target) as first:
        assert first.stat().st_mode == run.stat().st_mode
        with pytest.raises(ConfigError, match=f"^DST {target}: in use by another process: .*pid {os.getpid()},.*wait"):
            convert_quietly("megalm", "hf", run, target)
        (first / "file").write_text("first")
    assert (target / "file").read_text() == "first"
    assert sorted(path.name for path in run.parent.iterdir()) == ["hf", "run"]


def test_what_appears_while_a_conversion_runs_is_left_alone(run: Path) -> None:
    target = run.parent / "hf"
    held = {}
    with (
        pytest.raises(ConfigError, match="hf: appeared while this was being converted"),
        new_folder(target) as slow,
    ):
        (slow / "file").write_text("slow")
        convert_quietly("megalm", "hf", run, run.parent / "other")
        (run.parent / "other").rename(target)
        held = {file.name: file.read_bytes() for file in target.iterdir()}
    assert {file.name: file.read_bytes() for file in target.iterdir()} == held
    assert sorted(path.name for path in run.parent.iterdir()) == ["hf", "run"]


def test_no_more_is_held_at_once_than_the_largest_tensor(tmp_path: Path) -> None:
    transfer = Transfer(RandomSource(replace(GPT2, vocab_size=211)), torch.float32)
    largest = max(map(transfer.nbytes, transfer.shapes))
    held, most, lock = 0, 0, threading.Lock()

    def use(name: str) -> None:
        nonlocal held, most
        with transfer.hold(name):
            with lock:
                held += transfer.nbytes(name)
                most = max(most, held)
            threading.Event().wait(0.001)
            with lock:
                held -= transfer.nbytes(name)

    threads = [threading.Thread(target=use, args=(name,)) for name in [*transfer.shapes] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held == 0
    assert most <= largest


def test_progress_counts_every_tensor_once(run: Path) -> None:
    class Listener(Nobody):
        def __init__(self) -> None:
            self.phases: dict[str, list[int]] = {}

        def begin(self, *phase: object):
            what, total = phase
            self.phases[str(what)] = [int(str(total))]
            return self.phases[str(what)].append

    listener = Listener()
    convert(Request("megalm", "megalm", run, run.parent / "again", tp=4, pp=2, verify=True), listener)
    assert set(listener.phases) == {"converting", "verifying"}
    for total, *parts in listener.phases.values():
        assert total == sum(parts)
        assert len(parts) == 15


def test_logits_that_are_no_numbers_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = RandomSource(replace(GPT2, tie_embeddings=False))
    source.values["head.weight"][7] = float("inf")
    _write(source, tmp_path / "run")
    report = convert_quietly("megalm", "megalm", tmp_path / "run", tmp_path / "again", verify=True)
    assert report.verified[1].endswith("and 128 of 12,928 are NaN or infinite")
    own = verify._own_logits
    spoilt = iter((0.0, float("nan")))
    monkeypatch.setattr(verify, "_own_logits", lambda *of: own(*of).index_fill(2, torch.tensor([9]), next(spoilt)))
    with pytest.raises(CheckpointError, match="128 and 256 of 12,928 are NaN or infinite, and not the same ones"):
        convert_quietly("megalm", "megalm", tmp_path / "run", tmp_path / "other", verify=True)


def test_where_fp32_rounds_too_much_fp64_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    source = RandomSource(GPT2)
    source.values["final_norm.weight"] *= 5000.0
    _write(source, tmp_path / "run")
    report = convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "hf", verify=True)
    pattern = (
        r"in fp32: largest .* more than 0\.0001, and in fp64: largest difference .*e-\d.*, so it is fp32's rounding"
    )
    assert re.search(pattern, report.verified[1])
    right = GPT2Family.config_from_model
    wrong = {"activation_function": "gelu"}
    monkeypatch.setattr(GPT2Family, "config_from_model", lambda self, model: right(self, model) | wrong)
    with pytest.raises(CheckpointError, match=r"in fp64: largest difference .* more than 0\.0001 as well"):
        convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "wrong", verify=True)


def test_a_wrong_base_is_found_however_ill_the_weights_are_conditioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large queries and keys make attention a choice of one token, which any rounding may tip."""
    pytest.importorskip("transformers")
    from megalm.convert.huggingface.llama import LlamaFamily

    source = RandomSource(LLAMA)
    for name in source.values:
        if name.endswith("qkv.weight"):
            source.values[name] *= 300.0
    _write(source, tmp_path / "run")
    right = LlamaFamily.config_from_model
    monkeypatch.setattr(LlamaFamily, "config_from_model", lambda self, model: right(self, model) | {"rope_theta": 9e3})
    with pytest.raises(CheckpointError, match=r"where the largest is .* more than 0\.0001 as well"):
        convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "hf", verify=True)


def test_what_the_library_cannot_compute_is_a_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")

    def fail(*_: object, **__: object) -> None:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", fail)
    with pytest.raises(CheckpointError, match="transformers cannot compute logits of what was written: index out of"):
        convert_quietly("megalm", "hf", run, run.parent / "hf", verify=True)


@pytest.mark.parametrize("scaling", ["none", "yarn"])
def test_an_endless_context_takes_no_endless_table(scaling: str, tmp_path: Path) -> None:
    factor = 1.0 if scaling == "none" else 2.0
    model = replace(LLAMA, sequence_length=2**31 - 2, rotary_scaling=scaling, rotary_factor=factor)
    write_random_run(tmp_path / "run", model)
    report = convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "hf", verify=True)
    assert "4 random sequences of 512 tokens" in report.verified[1]


def _write(source: RandomSource, folder: Path) -> Transfer:
    folder.mkdir()
    transfer = Transfer(source, source.info.dtype)
    write_run(transfer, folder, name=folder.name, tokenizer=None, tp=2, pp=2)
    return transfer


@pytest.mark.parametrize(("window", "wrong"), [(600, 601), (7, 8)])
def test_windows_are_compared_beyond_their_end(window: int, wrong: int) -> None:
    """One token more in the window shows, however wide it is."""
    model = replace(LLAMA, sequence_length=700, attention_windows=(0, window))
    source = RandomSource(model)
    (found,) = verify.compare_logits(verify.Side(source, None), verify.Side(RandomSource(model), None))
    assert ("1 random sequence of 664 tokens" if window == 600 else "4 random sequences of 512 tokens") in found
    other = RandomSource(replace(model, attention_windows=(0, wrong)))
    with pytest.raises(CheckpointError, match=r"more than 0\.0001 as well"):
        verify.compare_logits(verify.Side(source, None), verify.Side(other, None))
