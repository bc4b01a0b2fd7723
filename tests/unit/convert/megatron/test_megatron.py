"""Megatron-LM's checkpoints: as Megatron-Core wrote them, back and forth; refused where they are not what they say."""

from __future__ import annotations

import shutil
import threading
import weakref
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_models import BERT, GPT2, LLAMA, NEOX, RandomSource
from golden import GOLDEN, Marker, logits_of, moved_out, refused, tensors_of

from megalm.config.schema import Model
from megalm.convert.megatron.door import open_source, write_megatron
from megalm.convert.transfer import Transfer
from megalm.convert.untrusted.safe_pickle import load
from megalm.convert.weights import full_shapes
from megalm.errors import CheckpointError

MEGATRON = GOLDEN / "megatron_lm"
CASES = ("gpt2_tp1", "gpt2_tp2_pp2_vp2", "llama_tp2_pp2", "llama_tp4")
RANK_FILE = "model_optim_rng.pt"

FOUR_LAYERS = replace(GPT2, num_layers=4)
LLAMA3 = {"rotary_scaling": "llama3", "rotary_factor": 4.0, "rotary_original_length": 8192}
MODELS = {
    "gpt2": FOUR_LAYERS,
    "gpt2-untied-erf": replace(FOUR_LAYERS, tie_embeddings=False, activation="gelu_erf", dropout=0.1),
    "rotary-part": replace(FOUR_LAYERS, position="rotary", rotary_fraction=2 / 3, rotary_base=12345.5),
    "llama": replace(LLAMA, num_layers=4),
    "llama-2kv-tied": replace(LLAMA, num_layers=4, num_kv_heads=2, tie_embeddings=True),
    "llama-3": replace(LLAMA, num_layers=4, **LLAMA3),
    "llama-linear": replace(LLAMA, num_layers=4, rotary_scaling="linear", rotary_factor=2.0),
    "qwen": replace(LLAMA, num_layers=4, qkv_bias=True, qk_norm=True),
    "qwen3": replace(LLAMA, num_layers=4, qk_norm=True, head_dim=6, num_kv_heads=2),
    "norm-biases": replace(FOUR_LAYERS, bias=False, norm_bias=True, activation="gelu_erf", head_dim=10),
}
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]


def _write(source, folder: Path, **options: Any) -> Path:
    transfer = Transfer(source, options.pop("dtype", source.info.dtype))
    write_megatron(transfer, folder, **{"tp": 1, "pp": 1} | options)
    return folder


def _state(folder: Path, name: str = "mp_rank_00") -> dict:
    """A rank's file as Megatron-LM loads it: weights only, and Namespace allowed."""
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(folder / "release" / name / RANK_FILE, weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_megatron_cores(name: str) -> None:
    expected = np.load(MEGATRON / "expected.npz")
    source = open_source(MEGATRON / name)
    assert source.info.step == 100 and source.info.dtype == torch.float32
    assert source.info.model.vocab_size == 118  # of 128 rows
    difference = logits_of(source, expected["tokens"]) - expected[name][:, :118]
    assert np.abs(difference).max() < 1e-4


@pytest.mark.parametrize(("name", "tp", "pp"), [("gpt2_tp1", 1, 1), ("llama_tp2_pp2", 2, 2), ("llama_tp4", 4, 1)])
def test_what_is_written_is_what_megatron_core_wrote(tmp_path: Path, name: str, tp: int, pp: int) -> None:
    _write(open_source(MEGATRON / name), tmp_path, tp=tp, pp=pp, transformer_impl="local")
    ranks = sorted(folder.name for folder in (tmp_path / "release").iterdir())
    assert ranks == sorted(folder.name for folder in (MEGATRON / name / "iter_0000100").iterdir())
    for rank in ranks:
        ours = _state(tmp_path, rank)["model"]
        theirs = load(MEGATRON / name / "iter_0000100" / rank / RANK_FILE)["model"]
        theirs = {key: tensor for key, tensor in theirs.items() if tensor is not None}
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            if "word_embeddings" not in key and "output_layer" not in key:  # those have padding of another length
                assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_round_trips_are_byte_equal(tmp_path: Path, model: Model, tp: int, pp: int) -> None:
    source = RandomSource(model, torch.bfloat16)
    back = open_source(_write(source, tmp_path, tp=tp, pp=pp))
    assert replace(back.info.model, num_kv_heads=model.num_kv_heads, qkv_bias=model.qkv_bias) == replace(
        model, rotary_fraction=back.info.model.rotary_fraction, ffn_hidden_size=model.ffn_size
    )
    assert back.info.model.kv_heads == model.kv_heads and back.info.model.has_qkv_bias == model.has_qkv_bias
    assert back.info.dtype == torch.bfloat16 and not back.info.notes
    for name, tensor in tensors_of(back).items():
        assert torch.equal(tensor, source.values[name]), name
        assert tensor.is_contiguous()


def test_files_are_those_that_megatron_lm_looks_for(tmp_path: Path) -> None:
    source = RandomSource(FOUR_LAYERS)
    source.info = replace(source.info, step=7)
    _write(source, tmp_path, tp=2, pp=2, dtype=torch.float16)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release"
    state = _state(tmp_path, "mp_rank_01_001")
    assert state["checkpoint_version"] == 3.0 and state["iteration"] == 7
    args = state["args"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert (args.vocab_size, args.padded_vocab_size, args.make_vocab_size_divisible_by) == (101, 256, 128)
    assert args.params_dtype == torch.float16 and args.position_embedding_type == "learned_absolute"
    model = state["model"]
    assert model["output_layer.weight"].shape == (128, 24)  # the tied copy of the last stage
    assert model["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"].dtype == torch.float16
    assert "embedding.word_embeddings.weight" not in model
    assert open_source(tmp_path).info.step == 7


def test_rotated_elements_are_as_many_where_a_share_is_rounded(tmp_path: Path) -> None:
    share = 30 / 44
    assert int(44 * share) == 29
    model = replace(GPT2, hidden_size=88, num_heads=2, position="rotary", rotary_fraction=share)
    folder = _write(RandomSource(model), tmp_path)
    assert int(44 * _state(folder)["args"].rotary_percent) == 30
    assert open_source(folder).info.model.rotary_fraction == share


def test_padding_is_zero_on_every_rank(tmp_path: Path) -> None:
    source = RandomSource(replace(GPT2, vocab_size=200))
    _write(source, tmp_path, tp=4)
    ranks = [_state(tmp_path, f"mp_rank_{rank:02d}")["model"]["embedding.word_embeddings.weight"] for rank in range(4)]
    assert [tuple(rank.shape) for rank in ranks] == [(128, 24)] * 4
    whole = torch.cat(ranks)
    assert torch.equal(whole[:200], source.values["embedding.weight"]) and not whole[200:].any()


def test_names_of_both_implementations(tmp_path: Path) -> None:
    for impl, norm in (
        ("local", "decoder.layers.0.input_layernorm.weight"),
        ("transformer_engine", "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"),
    ):
        _write(RandomSource(GPT2), tmp_path / impl, transformer_impl=impl)
        assert norm in _state(tmp_path / impl)["model"]
        assert _state(tmp_path / impl)["args"].transformer_impl == impl
    refused(lambda: _write(RandomSource(GPT2), tmp_path / "x", transformer_impl="nemo"), "nemo", "transformer_engine")


def test_every_tensor_passes_once_and_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    alive: dict[int, int] = {}
    most: list[int] = []
    names: list[str] = []
    lock = threading.Lock()

    class Counting(RandomSource):
        def read(self, name: str) -> torch.Tensor:
            tensor = self.values[name].clone()
            with lock:
                names.append(name)
                alive[id(tensor)] = tensor.nbytes
                most.append(sum(list(alive.values())))
            weakref.finalize(tensor, alive.pop, id(tensor), None)
            return tensor

    source = Counting(FOUR_LAYERS)
    _write(source, tmp_path, tp=2, pp=2)
    assert sorted(names) == sorted(full_shapes(FOUR_LAYERS))  # the tied embedding too, which two stages have
    assert max(most) <= max(tensor.nbytes for tensor in source.values.values())


def test_several_tensors_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    met = threading.Barrier(2)

    class Meeting(RandomSource):
        def read(self, name: str) -> torch.Tensor:
            if name in ("blocks.0.attention.qkv.bias", "blocks.0.attention_norm.weight"):
                met.wait(timeout=30)
            return self.values[name]

    _write(Meeting(GPT2), tmp_path, tp=2)


def test_an_error_ends_all_of_it(tmp_path: Path) -> None:
    class Broken(RandomSource):
        def read(self, name: str) -> torch.Tensor:
            if name == "blocks.1.mlp.up.weight":
                raise CheckpointError("the disk is gone")
            return self.values[name]

    refused(lambda: _write(Broken(GPT2), tmp_path, tp=2, pp=2), "the disk is gone")
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()


@pytest.mark.parametrize(
    ("model", "fragment"),
    [
        (BERT, "model.causal=false"),
        (NEOX, "model.residual=parallel"),
        (replace(GPT2, attention_windows=(0, 8)), "attention_windows"),
        (replace(GPT2, bias=False, activation="gelu_erf"), "LayerNorm always has a bias"),
        (replace(GPT2, bias=False, norm="rmsnorm"), "fused with a bias"),
        (replace(GPT2, qkv_bias=False), "qkv_bias"),
        (replace(GPT2, projection_bias=False), "model.projection_bias=false beside model.bias=true"),
        (replace(GPT2, norm_bias=False), "model.norm_bias=false beside model.norm=layernorm"),
        (replace(GPT2, position_offset=2), "model.position_offset=2, not 0"),
        (replace(GPT2, qk_norm=True), "qk_norm"),
        (replace(LLAMA, rotary_scaling="yarn", rotary_factor=2.0), "yarn"),
        (replace(LLAMA, rotary_scaling="llama3", rotary_factor=2.0, rotary_original_length=64), "8192"),
    ],
)
def test_models_that_megatron_lm_does_not_have(tmp_path: Path, model: Model, fragment: str) -> None:
    refused(lambda: _write(RandomSource(model), tmp_path), "Megatron-LM cannot have this model", fragment)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "tp", "pp", "fragment"),
    [
        (GPT2, 3, 1, "tp=3 does not divide model.num_heads=4"),
        (GPT2, 1, 4, "choose one of [1, 2]"),
        (replace(LLAMA, hidden_size=48, num_heads=12, num_kv_heads=3), 2, 1, "num_kv_heads=3"),
    ],
)
def test_layouts_that_megatron_lm_does_not_have(tmp_path: Path, model: Model, tp: int, pp: int, fragment: str) -> None:
    refused(lambda: _write(RandomSource(model), tmp_path, tp=tp, pp=pp), fragment)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of two stages and two tensor-parallel ranks, one of its files edited."""

    def edit(change: Callable[[dict], object], rank: str = "mp_rank_00_000") -> Path:
        folder = _write(RandomSource(replace(GPT2, num_layers=2)), tmp_path / "source", tp=2, pp=2)
        state = _state(folder, rank)
        change(state)
        torch.save(state, folder / "release" / rank / RANK_FILE)
        return folder

    return edit


def _args(**values: Any) -> Callable[[dict], None]:
    return lambda state: vars(state["args"]).update(values)


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"num_experts": torch.ones(3)}, "mixture of experts"),
        ({"num_experts": 8}, "mixture of experts"),
        ({"multi_latent_attention": True}, "multi-latent attention"),
        ({"apply_layernorm_1p": True}, "1 + weight"),
        ({"squared_relu": True}, "squared ReLU"),
        ({"rotary_interleaved": True}, "neighbours"),
        ({"window_size": (64, 0)}, "windows"),
        ({"softmax_type": "learnable"}, "softmax_type=learnable"),
        ({"kv_channels": 8}, "expected"),
        ({"kv_channels": "8"}, "args.kv_channels=8"),
        ({"position_embedding_type": "none"}, "position_embedding_type=none"),
        ({"add_bias_linear": False}, "not a tensor of this model"),
        ({"qk_layernorm": True}, "RMSNorm"),
        ({"normalization": "ScaleNorm"}, "normalization=ScaleNorm"),
        ({"num_layers": "two"}, "num_layers=two"),
        ({"num_layers": None}, "num_layers=(missing)"),
        ({"num_layers": 4}, "stages have 2 layers together"),
        ({"num_layers": 10**9}, "belongs to another model"),
        ({"hidden_size": 32, "kv_channels": 8}, "expected"),
        ({"num_attention_heads": 5, "kv_channels": None}, "num_heads=5"),
        ({"vocab_size": 300}, "larger than padded_vocab_size"),
        ({"vocab_size": None, "padded_vocab_size": 5000}, "fewer than the vocabulary"),
        ({"tensor_model_parallel_size": 4}, "folders of 2 ranks"),
        ({"expert_model_parallel_size": 2}, "expert"),
        ({"untie_embeddings_and_output_weights": True}, None),
    ],
)
def test_args_that_do_not_fit(edited: Callable[..., Path], values: dict[str, Any], fragment: str | None) -> None:
    folder = edited(_args(**values))
    if fragment is None:  # the tied copy is all that an untied model needs
        assert not open_source(folder).info.model.tie_embeddings
    else:
        refused(lambda: open_source(folder), str(folder), fragment)


QKV = "decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda model: model.pop(QKV), f"{QKV}: missing"),
        (lambda model: model.update({QKV: model[QKV][:-1]}), f"{QKV}: shape [35, 24], expected [36, 24]"),
        (lambda model: model.update({QKV: model[QKV].half()}), "torch.float16, torch.float32"),
        (lambda model: model.update({QKV: model[QKV].int()}), "torch.int32"),
        (lambda model: model.update({QKV: "text"}), f"{QKV}: missing"),
        (lambda model: model.update({QKV: torch.zeros(1, 1).expand(36, 24)}), "fewer in the file"),
        (lambda model: model.update(lora=torch.ones(2)), "lora: not a tensor of this model"),
        (lambda model: model.update({"decoder.layers.5.x": torch.ones(2)}), "numbered [0, 5]"),
        (lambda model: model.update(a={"b": {"c": {}}} | {"d": torch.ones(1)}), "a.d: not a tensor of this model"),
    ],
)
def test_tensors_that_do_not_fit(edited: Callable[..., Path], change: Callable, fragment: str) -> None:
    folder = edited(lambda state: change(state["model"]))
    refused(lambda: open_source(folder), str(folder), fragment)


def test_a_mapping_that_holds_itself_is_read_once(edited: Callable[..., Path]) -> None:
    open_source(edited(lambda state: state["model"].update(model=state["model"], state=state)))


def test_lists_in_lists_are_named_in_a_short_message(edited: Callable[..., Path]) -> None:
    lists: list = ["a"]
    for _ in range(64):
        lists = [lists, lists]
    for values in ({"num_experts": lists}, {"num_layers": lists}, {"num_experts": Namespace(a=lists)}):
        folder = edited(_args(**values))
        assert len(refused(lambda folder=folder: open_source(folder), RANK_FILE)) < 2000
        shutil.rmtree(folder)
    folder = edited(lambda state: state.update(checkpoint_version=lists))
    assert len(refused(lambda: open_source(folder), "checkpoint_version")) < 2000


def test_tied_copies_must_be_equal(edited: Callable[..., Path]) -> None:
    folder = edited(lambda state: state["model"]["output_layer.weight"].add_(1), "mp_rank_01_001")
    source = open_source(folder)
    refused(lambda: source.read("embedding.weight"), "differ")
    source.read("final_norm.weight")


def test_extra_states_and_optimizers_are_left_out(edited: Callable[..., Path]) -> None:
    def add(state: dict) -> None:
        state["model"] |= {"decoder.layers.0.mlp.linear_fc1._extra_state": torch.ones(9, dtype=torch.uint8)}
        state["model"] |= {"output_layer._extra_state": None}
        state["optimizer"] = {"state": torch.ones(3)}

    assert open_source(edited(add)).info.notes == ("left out the optimizer's state",)


def test_a_vocabulary_of_unknown_size_is_kept_whole(edited: Callable[..., Path]) -> None:
    source = open_source(edited(_args(vocab_size=None)))
    assert source.info.model.vocab_size == 256 and source.read("embedding.weight").shape == (256, 24)
    assert "vocab_size is not known" in source.info.notes[0]


def test_code_is_not_run(edited: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited(lambda state: state.update(rng_state=Marker(tmp_path / "ran")))
    refused(lambda: open_source(folder), RANK_FILE, "posix.mkdir")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("../other", "says '../other'"),
        ("/etc", "says '/etc'"),
        ("", "says ''"),
        ("100", "iter_0000100: no such folder"),
        ("9" * 5000, "says"),
        ("-1", "says '-1'"),
    ],
)
def test_trackers_that_point_elsewhere(edited: Callable[..., Path], text: str, fragment: str) -> None:
    folder = edited(lambda state: None)
    (folder / "latest_checkpointed_iteration.txt").write_text(text)
    refused(lambda: open_source(folder), "latest_checkpointed_iteration.txt", fragment)


@pytest.mark.parametrize(
    "name",
    [f"release/mp_rank_01_001/{RANK_FILE}", "release/mp_rank_01_001", "release", "latest_checkpointed_iteration.txt"],
)
def test_links_out_of_the_folder_are_not_followed(edited: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = edited(lambda state: None)
    moved_out(folder / name, tmp_path / "elsewhere" / "it")
    refused(lambda: open_source(folder), str(folder), "outside the folder")


def test_links_in_the_folder_and_to_it_are_followed(edited: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited(lambda state: None)
    moved_out(folder / "release", folder / "other")
    (tmp_path / "link").symlink_to(folder)
    assert open_source(tmp_path / "link").info.model.num_layers == 2


def test_folders_that_are_incomplete(edited: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited(lambda state: None)
    release = folder / "release"
    assert open_source(release).info.model.num_layers == 2  # the folder of an iteration can be named too
    shutil.rmtree(release / "mp_rank_01_001")
    refused(lambda: open_source(folder), "no folder of tensor-parallel rank 1, pipeline rank 1")
    (release / "mp_rank_99_999").mkdir()
    refused(lambda: open_source(folder), "numbered up to tp=100 and pp=1000")
    (release / "mp_rank_00_000_001").mkdir()
    refused(lambda: open_source(folder), "expert parallelism")
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / ".metadata").touch()
    refused(lambda: open_source(tmp_path / "dist"), "--ckpt-convert-format torch")
    refused(lambda: open_source(tmp_path / "none"), "no such folder")
    refused(lambda: open_source(tmp_path), "holds neither")


def test_rank_files_that_are_no_checkpoints(edited: Callable[..., Path]) -> None:
    folder = edited(lambda state: state.pop("args"))
    refused(lambda: open_source(folder), RANK_FILE, "holds no args")
    file = folder / "release" / "mp_rank_00_000" / RANK_FILE
    torch.save([1], file)
    refused(lambda: open_source(folder), str(file), "holds no args")
    torch.save({"args": Namespace()}, file)
    refused(lambda: open_source(folder), str(file), "neither model nor model0")
    file.write_bytes(file.read_bytes()[:100])
    refused(lambda: open_source(folder), str(file))
    file.unlink()
    refused(lambda: open_source(folder), str(file), "No such file")


_LEGACY = {
    "decoder.layers.": "layers.",
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "post_attention_layernorm.",
    "linear_qkv": "query_key_value",
    "linear_proj": "dense",
    "linear_fc1": "dense_h_to_4h",
    "linear_fc2": "dense_4h_to_h",
    "decoder.final_layernorm": "final_layernorm",
}


def _make_legacy(folder: Path, version: float) -> None:
    """Give every rank's file the names that Megatron-LM had before Megatron-Core."""
    for file in folder.rglob(RANK_FILE):
        state = _state(folder, file.parent.name)
        encoder, language_model, model = {}, {}, {}
        for name, tensor in state["model"].items():
            for ours, theirs in _LEGACY.items():
                name = name.replace(ours, theirs)  # noqa: PLW2901
            if name.startswith("embedding."):
                kind = name.split(".")[1]
                language_model.setdefault("embedding", {})[kind] = {"weight": tensor}
            elif name == "output_layer.weight":
                model["word_embeddings_for_head"] = {"weight": tensor}
            else:
                encoder[name] = tensor
        model["language_model"] = language_model | {"encoder": encoder}
        torch.save(state | {"model": model, "checkpoint_version": version}, file)


def test_names_from_before_megatron_core(tmp_path: Path) -> None:
    source = RandomSource(GPT2)
    folder = _write(source, tmp_path, tp=2, pp=2)
    _make_legacy(folder, 3.0)
    back = open_source(folder)
    for name, tensor in tensors_of(back).items():
        assert torch.equal(tensor, source.values[name]), name


def test_other_orders_of_query_key_and_value_are_refused(tmp_path: Path) -> None:
    folder = _write(RandomSource(GPT2), tmp_path)
    for version in (1.0, 0):
        _make_legacy(folder, version)
        refused(lambda: open_source(folder), "checkpoint_version", "another order")
        shutil.rmtree(folder)
        _write(RandomSource(GPT2), tmp_path)
