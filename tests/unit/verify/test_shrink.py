"""Shrinking keeps every choice, cuts every size, and always gives a config that the rules accept."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from megalm.config.check import violations
from megalm.config.compose import compose, group_options
from megalm.config.job import planned_world_size_of, world_size_of
from megalm.config.schema import Config
from megalm.verify.shrink import MOST_RANKS, SEQUENCE_LENGTH, Case, Shrunk, related_layouts, shrink

SIZES = {
    "num_layers",
    "hidden_size",
    "num_heads",
    "head_dim",
    "num_kv_heads",
    "ffn_hidden_size",
    "vocab_size",
    "sequence_length",
    "rotary_original_length",
    "attention_windows",
}
"""Fields of a model that are lengths or counts; all others are choices."""


def shrunk(*overrides: str) -> tuple[Config, Shrunk]:
    config = compose(["experiment=quickstart", "launch.ranks=0", *overrides])
    world_size = planned_world_size_of(config)
    assert violations(config, world_size) == []
    return config, shrink(config, world_size)


def names(*overrides: str) -> list[str]:
    _, small = shrunk(*overrides)
    return [f"{case} {case.config.engine.dtype}" for case in related_layouts(small.layout)]


@pytest.mark.parametrize("experiment", group_options()["experiment"])
def test_every_experiment_shrinks_to_valid_layouts_of_few_ranks(experiment: str) -> None:
    config = compose([f"experiment={experiment}"])
    small = shrink(config, planned_world_size_of(config))
    for case in related_layouts(small.layout):
        assert violations(case.config, case.topology.world_size) == []
        assert case.topology.world_size <= MOST_RANKS
        assert case.config.model.hidden_size <= 128
        micro_batches = case.config.train.global_batch_size // (case.dp * case.config.train.micro_batch_size)
        assert micro_batches >= 2 * case.topology.pp
    for item in fields(config.model):
        if item.name not in SIZES:
            assert getattr(small.layout.config.model, item.name) == getattr(config.model, item.name), item.name


CHOICES = [
    ("model.residual=parallel", "model.position=rotary", "model.rotary_fraction=0.25", "model.hidden_size=256"),
    ("model.residual=post_norm", "model.token_types=2", "model.embedding_norm=true", "model.activation=gelu_erf"),
    ("model.norm=rmsnorm", "model.activation=swiglu", "model.bias=false", "model.qkv_bias=true"),
    ("model.position=rotary", "model.rotary_scaling=yarn", "model.rotary_factor=4", "model.qk_norm=true"),
    ("model.dropout=0.1", "model.attention_dropout=0.2", "model.tie_embeddings=false"),
]


@pytest.mark.parametrize("overrides", CHOICES)
def test_choices_of_the_model_are_kept(overrides: tuple[str, ...]) -> None:
    config, small = shrunk(*overrides)
    for override in overrides[: None if "hidden_size" not in overrides[-1] else -1]:
        section, name = override.partition("=")[0].split(".")
        assert getattr(getattr(small.layout.config, section), name) == getattr(getattr(config, section), name)


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("objective.z_loss=1e-4", "objective.z_loss"),
        ("engine.recompute=selective", "engine.recompute"),
        ("engine.dtype=fp32", "engine.dtype"),
        ("engine.zero_stage=1", "engine.zero_stage"),
        ("engine.offload_optimizer=true", "engine.offload_optimizer"),
        ("parallel.sequence_parallel=true", "parallel.sequence_parallel"),
        ("parallel.schedule=zb_h1", "parallel.schedule"),
        ("optim.weight_decay=0.3", "optim.weight_decay"),
        ("run.seed=77", "run.seed"),
    ],
)
def test_choices_of_the_engine_are_kept(override: str, path: str) -> None:
    config, small = shrunk(override)
    section, name = path.split(".")
    assert getattr(getattr(small.layout.config, section), name) == getattr(getattr(config, section), name)


@pytest.mark.parametrize(
    ("overrides", "kv_heads"),
    [
        (("model.num_heads=8",), None),
        (("model.num_heads=8", "model.num_kv_heads=8"), 4),
        (("model.num_heads=8", "model.num_kv_heads=4"), 2),
        (("model.num_heads=8", "model.num_kv_heads=1"), 1),
        (("model.num_heads=8", "model.num_kv_heads=4", "parallel.tp=8"), 1),
    ],
)
def test_grouping_of_heads_is_kept(overrides: tuple[str, ...], kv_heads: int | None) -> None:
    _, small = shrunk(*overrides)
    assert small.layout.config.model.num_kv_heads == kv_heads


@pytest.mark.parametrize(("head_dim", "hidden"), [(32, 16), (4, 48), (8, 32)])
def test_heads_stay_apart_from_the_hidden_size(head_dim: int, hidden: int) -> None:
    _, small = shrunk("model.num_heads=8", "model.hidden_size=64", f"model.head_dim={head_dim}")
    assert (small.layout.config.model.head_dim, small.layout.config.model.hidden_size) == (8, hidden)


def test_windows_and_original_context_shrink_with_the_sequence() -> None:
    _, small = shrunk("model.attention_windows=[0,64]", "model.sequence_length=256")
    assert small.layout.config.model.attention_windows == (0, 8)
    _, small = shrunk(
        "model.position=rotary",
        "model.rotary_scaling=llama3",
        "model.rotary_factor=4",
        "model.rotary_original_length=64",
    )
    assert small.layout.config.model.rotary_original_length == 64 * SEQUENCE_LENGTH // 256
    _, small = shrunk("model.attention_windows=[0,9,0,9,0,9]", "model.num_layers=6")
    windows = small.layout.config.model.attention_windows
    assert set(windows) == {0, 2} and len(windows) <= small.layout.config.model.num_layers


def test_degrees_are_cut_and_it_says_so() -> None:
    _, small = shrunk(
        "parallel.tp=4", "parallel.pp=3", "parallel.virtual_stages=1", "cluster.gpus=48", "train.global_batch_size=16"
    )
    assert (small.layout.topology.tp, small.layout.topology.pp, small.layout.dp) == (2, 2, 2)
    assert small.notes == ("degrees are cut: tp 4 to 2, pp 3 to 2, dp 4 to 2",)


def test_a_layout_of_all_axes_gives_up_data_parallelism_which_is_proven_alone() -> None:
    overrides = ("parallel.cp=2", "parallel.cp_attention=ring", "cluster.gpus=16", "engine.dtype=fp32")
    _, small = shrunk(*overrides)
    assert small.layout.topology.world_size == 8 and small.layout.dp == 1
    assert small.notes == ("degrees are cut: dp 2 to 1",)
    assert names(*overrides) == [
        "one rank fp32",
        "tp2 fp32",
        "pp2 1f1b fp32",
        "cp2 ring fp32",
        "dp2 fp32",
        "tp2 pp2 cp2 ring 1f1b fp32",
    ]


def test_a_16_bit_layout_is_proven_in_fp32_too() -> None:
    assert names() == [
        "one rank bf16",
        "tp2 bf16",
        "pp2 1f1b bf16",
        "dp2 bf16",
        "tp2 pp2 1f1b bf16",
        "tp2 pp2 1f1b fp32",
    ]


def test_an_interleaved_schedule_and_a_split_of_layers_keep_their_shape() -> None:
    overrides = ("parallel=pp2_interleaved", "parallel.stage_layers=[1,2,2,1]", "engine.dtype=fp32")
    _, small = shrunk(*overrides)
    assert small.layout.config.parallel.stage_layers == (1, 2, 2, 3)
    assert small.layout.config.model.num_layers == 8
    assert names(*overrides) == ["one rank fp32", "pp2 v2 interleaved_1f1b fp32", "dp2 fp32"]


def test_one_rank_is_proven_with_data_parallelism() -> None:
    assert names("parallel=single", "engine.dtype=fp32") == ["one rank fp32", "dp2 fp32"]


def test_a_case_is_hashable_and_the_user_config_is_untouched() -> None:
    config, small = shrunk()
    assert len({small.layout, replace(small.layout), Case(small.layout.config, 2)}) == 2
    assert config == compose(["experiment=quickstart", "launch.ranks=0"])
    assert world_size_of(small.layout.config) == small.layout.topology.world_size
