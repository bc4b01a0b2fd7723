"""DeepSpeed's ZeRO checkpoints: as DeepSpeed wrote them, with other names and groups, and refused where they lie."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_models import GPT2, LLAMA, PHI3, QWEN3, ROBERTA, RandomSource
from golden import GOLDEN, Marker, moved_out, refused, tensors_of

from megalm.config.schema import Model
from megalm.convert.checks import same_values
from megalm.convert.deepspeed import read as deepspeed
from megalm.convert.deepspeed.read import open_source
from megalm.convert.huggingface.families import family_of
from megalm.convert.huggingface.gpt2 import GPT2Family
from megalm.convert.megatron.door import write_megatron
from megalm.convert.transfer import Transfer
from megalm.convert.untrusted.safe_pickle import load
from megalm.convert.weights import WeightSource

ZERO = GOLDEN / "deepspeed_zero"
CASES = ("gpt2_zero1", "gpt2_zero2", "gpt2_zero3", "megalm_zero1")


def _expected(name: str, source: WeightSource) -> dict[str, torch.Tensor]:
    """What DeepSpeed itself gathered while it ran, under megalm's names."""
    gathered = {key: torch.from_numpy(value) for key, value in np.load(ZERO / name / "expected.npz").items()}
    if not name.startswith("gpt2"):
        return gathered
    rules = GPT2Family().rules(source.info.model)
    return {rule.name: rule.form.to_megalm([gathered[foreign] for foreign in rule.foreign]) for rule in rules}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_deepspeeds_masters(name: str) -> None:
    source = open_source(ZERO / name)
    assert source.info.step == 2 and source.info.dtype == torch.float32
    assert f"ZeRO stage {name[-1]}" in source.info.notes[0]
    expected = _expected(name, source)
    found = tensors_of(source)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key
        assert tensor.is_contiguous()


def test_the_folder_of_a_step_can_be_named() -> None:
    assert open_source(ZERO / "gpt2_zero1" / "global_step2").info.model.vocab_size == 61


def test_without_partitions_the_modules_weights_are_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ZERO / "gpt2_zero1", tmp_path / "plain"))
    for file in folder.rglob("*optim_states.pt"):
        file.unlink()
    source = open_source(folder)
    assert source.info.dtype == torch.bfloat16 and "no ZeRO partitions" in source.info.notes[0]
    expected = _expected("gpt2_zero1", source)
    for name, tensor in tensors_of(source).items():  # bf16 weights are the masters, rounded
        assert torch.equal(tensor, expected[name].bfloat16()), name


def _flat(tensors: list[torch.Tensor], gaps: list[int]) -> torch.Tensor:
    parts = [part for tensor, gap in zip(tensors, gaps, strict=True) for part in (tensor.flatten(), torch.zeros(gap))]
    return torch.cat(parts)


def _write_zero(
    folder: Path,
    ranks: list[dict[str, torch.Tensor]],
    *,
    stage: int,
    replicas: int,
    groups: int = 2,
    gaps: bool = False,
    **module: Any,
) -> Path:
    """A checkpoint as DeepSpeed lays it out, of known tensors: one mapping per model-parallel rank."""
    tag = folder / "global_step5"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step5\n")
    for rank, tensors in enumerate(ranks):
        names = [list(tensors)[number::groups] for number in range(groups)]
        shapes = [OrderedDict((name, tensors[name].shape) for name in group) for group in names]
        state = {"module": {}, "param_shapes": shapes, "shared_params": {}, "global_steps": 5, "ds_version": "x"}
        prefix = "zero_pp_rank_0_" if stage == 3 else ""
        torch.save(state | module, tag / f"{prefix}mp_rank_{rank:02d}_model_states.pt")
        paddings = [[(7 * number) % 5 if gaps else 0 for number in range(len(group))] for group in names]
        partitions: list[list[torch.Tensor]] = [[] for _ in range(replicas)]
        for group, padding in zip(names, paddings, strict=True):
            if stage == 3:
                parts = [torch.tensor_split(_padded(tensors[name].flatten(), replicas), replicas) for name in group]
                runs = [torch.cat([part[replica] for part in parts]) for replica in range(replicas)]
            else:
                flat = _padded(_flat([tensors[name] for name in group], padding), replicas)
                runs = list(flat.chunk(replicas))
            for replica, run in enumerate(runs):
                partitions[replica].append(run.clone())
        for replica, found in enumerate(partitions):
            key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
            count = replicas if stage == 3 else [replicas] * groups
            inner = {key: found, "zero_stage": stage, "partition_count": count}
            inner |= {"param_alignment_paddings": paddings} if gaps else {}
            file = tag / f"zero_pp_rank_{replica}_mp_rank_{rank:02d}_optim_states.pt"
            torch.save({"optimizer_state_dict": inner}, file)
    return folder


def _padded(flat: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.cat((flat, torch.zeros(-flat.numel() % multiple)))


def _megatron_ranks(source: RandomSource, folder: Path, tp: int) -> tuple[list[dict[str, torch.Tensor]], Namespace]:
    write_megatron(Transfer(source, torch.float32), folder, tp=tp, pp=1, transformer_impl="local")
    states = [load(folder / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt") for rank in range(tp)]
    return [state["model"] for state in states], states[0]["args"]


@pytest.mark.parametrize(("stage", "replicas", "gaps"), [(1, 3, False), (2, 2, True), (3, 3, False), (1, 1, False)])
def test_megatron_deepspeeds_tensor_parallel_ranks(tmp_path: Path, stage: int, replicas: int, gaps: bool) -> None:
    source = RandomSource(LLAMA)
    ranks, args = _megatron_ranks(source, tmp_path / "megatron", 2)
    wrapped = [{f"module.{name}": tensor for name, tensor in rank.items()} for rank in ranks]
    folder = _write_zero(tmp_path / "zero", wrapped, stage=stage, replicas=replicas, gaps=gaps, args=args)
    back = open_source(folder)
    assert back.info.step == 5 and back.info.model.kv_heads == LLAMA.kv_heads
    for name, tensor in tensors_of(back).items():
        assert torch.equal(tensor, source.values[name]), name


_MEGATRON_DEEPSPEED = {
    "decoder.layers.": "language_model.encoder.layers.",
    "decoder.final_layernorm": "language_model.encoder.final_layernorm",
    "embedding.word": "language_model.embedding.word",
    "output_layer": "language_model.output_layer",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "linear_qkv": "query_key_value",
    "linear_proj": "dense",
    "linear_fc1": "dense_h_to_4h",
    "linear_fc2": "dense_4h_to_h",
}


def test_names_and_arguments_of_megatron_deepspeed(tmp_path: Path) -> None:
    source = RandomSource(replace(LLAMA, rotary_base=500000.0))
    ranks, args = _megatron_ranks(source, tmp_path / "megatron", 2)
    for name in ("group_query_attention", "num_query_groups", "position_embedding_type", "rotary_base", "add_qkv_bias"):
        delattr(args, name)
    vars(args).update(num_key_value_heads=4, rope_theta=500000, normalization="rmsnorm", num_experts=[1])

    def renamed(name: str) -> str:
        for theirs, older in _MEGATRON_DEEPSPEED.items():
            name = name.replace(theirs, older)
        return name

    older = [{renamed(name): tensor for name, tensor in rank.items()} for rank in ranks]
    back = open_source(_write_zero(tmp_path / "zero", older, stage=2, replicas=2, args=args))
    assert back.info.model.kv_heads == 4 and back.info.model.rotary_base == 500000.0
    for name, tensor in tensors_of(back).items():
        assert torch.equal(tensor, source.values[name]), name


def test_frozen_and_shared_parameters(tmp_path: Path) -> None:
    family, source = GPT2Family(), RandomSource(GPT2)
    foreign = _foreign(source)
    frozen = {"transformer.wpe.weight": foreign.pop("transformer.wpe.weight").half()}
    foreign = {"lm_head.weight": foreign.pop("transformer.wte.weight"), **foreign}
    folder = _write_zero(
        tmp_path / "zero",
        [foreign],
        stage=2,
        replicas=2,
        frozen_param_shapes={name: tensor.shape for name, tensor in frozen.items()},
        frozen_param_fragments=frozen,
        shared_params={"transformer.wte.weight": "lm_head.weight"},
    )
    _write_config(folder, family.config_from_model(GPT2))
    back = open_source(folder)
    for name, tensor in tensors_of(back).items():
        expected = source.values[name]
        assert torch.equal(tensor, expected.half().float() if name == "position.weight" else expected), name


def _foreign(source: RandomSource) -> dict[str, torch.Tensor]:
    """GPT-2's tensors under the library's names."""
    return {
        name: part
        for rule in GPT2Family().rules(GPT2)
        for name, part in zip(rule.foreign, rule.form.to_foreign(source.values[rule.name]), strict=True)
    }


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("model", [QWEN3, PHI3, ROBERTA], ids=["qwen3", "phi3", "roberta"])
def test_every_family_of_the_library_is_read_from_deepspeed_too(model: Model, stage: int, tmp_path: Path) -> None:
    source = RandomSource(model)
    family = family_of(model)
    foreign = {
        name: part
        for rule in family.rules(model)
        for name, part in zip(rule.foreign, rule.form.to_foreign(source.values[rule.name]), strict=True)
    }
    folder = _write_zero(tmp_path, [foreign], stage=stage, replicas=2)
    _write_config(
        folder, {"model_type": family.model_type, **family.config_from_model(model), **family.fixed_ids(model)}
    )
    back = open_source(folder)
    assert back.info.architecture == family.model_type
    for name, value in source.values.items():
        assert torch.equal(back.read(name), value), name


def test_a_tied_embedding_under_either_name_or_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = RandomSource(GPT2)
    words = source.values["embedding.weight"]
    fields = GPT2Family().config_from_model(GPT2)
    foreign = _foreign(source)
    head_only = {"lm_head.weight" if name == "transformer.wte.weight" else name: t for name, t in foreign.items()}
    folder = _write_zero(tmp_path / "head", [head_only], stage=2, replicas=2)
    _write_config(folder, fields)
    assert torch.equal(open_source(folder).read("embedding.weight"), words)

    compared = []
    monkeypatch.setattr(deepspeed, "same_values", lambda *both: compared.append(both) or same_values(*both))
    folder = _write_zero(tmp_path / "both", [foreign | {"lm_head.weight": words}], stage=2, replicas=2)
    _write_config(folder, fields)
    back = open_source(folder)
    assert torch.equal(back.read("embedding.weight"), words) and torch.equal(back.read("embedding.weight"), words)
    assert len(compared) == 1

    folder = _write_zero(tmp_path / "unequal", [foreign | {"lm_head.weight": words + 1}], stage=2, replicas=2)
    _write_config(folder, fields)
    back = open_source(folder)
    for _ in range(2):
        refused(lambda: back.read("embedding.weight"), "lm_head.weight differs from", "tie_word_embeddings")
    folder = _write_zero(tmp_path / "short", [foreign | {"lm_head.weight": words[1:]}], stage=2, replicas=2)
    _write_config(folder, fields)
    refused(lambda: open_source(folder), "lm_head.weight: not a tensor of this model")


def test_quantized_models_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("gpt2_zero2")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"quantization_config": {"bits": 4},', 1))
    refused(lambda: open_source(folder), "config.json", "quantization_config", "original model")


def _write_config(folder: Path, fields: dict[str, Any]) -> None:
    import json

    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **fields}))


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of DeepSpeed's own, to be spoiled."""
    return lambda name: Path(shutil.copytree(ZERO / name, tmp_path / name))


def _edit(file: Path, change: Callable[[dict], object]) -> None:
    """Give a file other contents; what is inert in it stays behind."""
    state = load(file)
    change(state)
    plain = {key: value for key, value in state.items() if key != "optimizer_state_dict"}
    if "optimizer_state_dict" in state:
        inner = state["optimizer_state_dict"]
        stage = inner["zero_stage"].args[0] if hasattr(inner["zero_stage"], "args") else inner["zero_stage"]
        kept = ("single_partition_of_fp32_groups", "fp32_flat_groups", "partition_count", "param_alignment_paddings")
        plain["optimizer_state_dict"] = {key: inner[key] for key in kept if key in inner} | {"zero_stage": stage}
    torch.save(plain, file.with_name("new"))  # not over a file that is mapped
    file.with_name("new").replace(file)


OPTIMIZER = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
FIRST = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
MODULE = "mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("file", "change", "fragment"),
    [
        (OPTIMIZER, lambda inner: inner["single_partition_of_fp32_groups"].pop(), "partitions"),
        (FIRST, lambda inner: inner.update(single_partition_of_fp32_groups=None), "partitions"),
        (FIRST, lambda inner: inner.update(zero_stage=4), "zero_stage=4"),
        (FIRST, lambda inner: inner.update(partition_count=[4, 4]), "partition_count=[4, 4]"),
        (FIRST, lambda inner: inner.update(param_alignment_paddings=[[1 << 60] * 10, [0] * 18]), "elements"),
        (FIRST, lambda inner: inner.update(param_alignment_paddings=[[0]]), "param_alignment_paddings"),
        (FIRST, lambda inner: inner.update(param_alignment_paddings=[[-1] * 10, [0] * 18]), "param_alignment_paddings"),
    ],
)
def test_partitions_that_lie(copy: Callable[[str], Path], file: str, change: Callable, fragment: str) -> None:
    folder = copy("gpt2_zero2")
    _edit(folder / "global_step2" / file, lambda state: change(state["optimizer_state_dict"]))
    refused(lambda: open_source(folder), str(folder), fragment)


def test_lists_in_lists_are_named_in_a_short_message(copy: Callable[[str], Path]) -> None:
    lists: list = ["a"]
    for _ in range(64):
        lists = [lists, lists]
    for key in ("zero_stage", "partition_count"):
        folder = copy("gpt2_zero2")
        _edit(
            folder / "global_step2" / FIRST,
            lambda state, key=key: state["optimizer_state_dict"].update({key: lists}),
        )
        assert len(refused(lambda folder=folder: open_source(folder), f"{key}=[[")) < 1000
        shutil.rmtree(folder)


@pytest.mark.parametrize("value", [torch.zeros(8), torch.zeros(2142).half(), torch.zeros(2, 1071), "text", None])
def test_partitions_of_other_kinds(copy: Callable[[str], Path], value: object) -> None:
    folder = copy("gpt2_zero2")

    def change(state: dict) -> None:
        state["optimizer_state_dict"]["single_partition_of_fp32_groups"][0] = value

    _edit(folder / "global_step2" / OPTIMIZER, change)
    refused(lambda: open_source(folder), str(folder / "global_step2"))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda state: state.pop("param_shapes"), "param_shapes"),
        (lambda state: state.update(param_shapes=[{"a": (1 << 60, 1 << 60)}]), "param_shapes"),
        (lambda state: state.update(param_shapes=[{"a": (-1,)}]), "param_shapes"),
        (lambda state: state.update(param_shapes=state["param_shapes"][:1]), "1 groups"),
        (lambda state: state["param_shapes"][0].popitem(), "does not fit its 9 parameters"),
        (lambda state: state["param_shapes"][1].update({"transformer.wte.weight": (1,)}), "a name twice"),
        (lambda state: state.pop("module"), "holds no module"),
        (lambda state: state.update(args=Namespace(num_layers=1)), "args."),
    ],
)
def test_module_states_that_lie(copy: Callable[[str], Path], change: Callable, fragment: str) -> None:
    folder = copy("gpt2_zero2")
    _edit(folder / "global_step2" / MODULE, change)
    refused(lambda: open_source(folder), MODULE, fragment)


def test_shapes_that_are_not_the_configs(copy: Callable[[str], Path]) -> None:
    folder = copy("gpt2_zero2")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"n_layer": 2', '"n_layer": 3'))
    refused(lambda: open_source(folder), "transformer.h.2.ln_1.weight: missing")
    (folder / "config.json").write_text(text.replace('"n_layer": 2', '"n_layer": 100000'))
    refused(lambda: open_source(folder), "belongs to another model")
    (folder / "config.json").write_text(text.replace('"model_type": "gpt2"', '"model_type": "t5"'))
    refused(lambda: open_source(folder), "config.json", "model_type=t5")


def test_without_a_config_the_remedy_is_named(copy: Callable[[str], Path]) -> None:
    for name, config in (("gpt2_zero1", "config.json"), ("megalm_zero1", "config.yaml")):
        folder = copy(name)
        (folder / config).unlink()
        refused(lambda folder=folder: open_source(folder), f"put the {config}", "weight")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("model: [", "cannot be read"),
        ("[1]", "no section model"),
        ("model: {num_layers: two}", "num_layers"),
        ("model: {num_layers: 2, hidden_size: 12, num_heads: 2, sequence_length: 8}", "vocab_size=null"),
        ("model: {num_layers: 2, hidden_size: 12, num_heads: 2, sequence_length: 8, vocab_size: 61}", "missing"),
        ("model: !!python/object/apply:os.mkdir [ran]", "cannot be read"),
    ],
)
def test_configs_of_megalm_that_do_not_fit(copy: Callable[[str], Path], text: str, fragment: str) -> None:
    folder = copy("megalm_zero1")
    (folder / "config.yaml").write_text(text)
    refused(lambda: open_source(folder), str(folder), fragment)


def test_folders_that_are_incomplete(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("gpt2_zero1")
    step = folder / "global_step2"
    for text in ("../elsewhere", "/etc", "", "..", "global_step3"):
        (folder / "latest").write_text(text)
        refused(lambda: open_source(folder), str(folder / "latest"))
    (folder / "latest").write_text("global_step2")
    (step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    refused(lambda: open_source(folder), "1 files", "copy all of the checkpoint")
    (step / "layer_01-model_00-model_states.pt").touch()
    refused(lambda: open_source(folder), "PipelineModule")
    (step / "layer_01-model_00-model_states.pt").unlink()
    (step / "layer_0_expert_0_mp_rank_00_model_states.pt").touch()
    refused(lambda: open_source(folder), "PipelineModule")
    refused(lambda: open_source(tmp_path / "nowhere"), "no such folder")
    refused(lambda: open_source(tmp_path), "holds neither latest")


@pytest.mark.parametrize("name", ["latest", "config.json", "global_step2", "global_step2/MODULE", "global_step2/FIRST"])
def test_links_out_of_the_folder_are_not_followed(copy: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = copy("gpt2_zero2")
    moved_out(folder / name.replace("MODULE", MODULE).replace("FIRST", FIRST), tmp_path / "elsewhere" / "it")
    refused(lambda: open_source(folder), str(folder), "outside the folder")


def test_files_that_are_damaged_or_hold_code(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("gpt2_zero2")
    file = folder / "global_step2" / OPTIMIZER
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused(lambda: open_source(folder), str(file))
    torch.save({"optimizer_state_dict": {"x": Marker(tmp_path / "ran")}}, file)
    refused(lambda: open_source(folder), str(file), "posix.mkdir")
    assert not (tmp_path / "ran").exists()


def test_model_parallel_ranks_without_args_are_refused(tmp_path: Path) -> None:
    source = RandomSource(replace(LLAMA, num_layers=1))
    ranks, _ = _megatron_ranks(source, tmp_path / "megatron", 2)
    folder = _write_zero(tmp_path / "zero", ranks, stage=1, replicas=1)
    refused(lambda: open_source(folder), "2 model-parallel ranks", "Megatron-DeepSpeed")
