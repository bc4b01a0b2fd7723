"""How many buckets there are, whatever the number of replicas, and what is in them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from megalm.config.schema import Engine, Model
from megalm.core.attention.context_parallel import ContextParallel
from megalm.core.tensor_parallel import TensorParallel
from megalm.engine.bucket_size import REPLICAS_OF_A_BUCKET, bucket_elements
from megalm.engine.layout import FlatLayout, cut_into_buckets, in_model_order
from megalm.engine.optimizer import ParameterGroup, parameter_groups
from megalm.mesh.groups import Group, ParallelContext
from megalm.mesh.topology import Topology
from megalm.models.transformer import Part, Transformer

GPT3_1_3B = Model(num_layers=24, hidden_size=2048, num_heads=16, sequence_length=2048, vocab_size=50257)
REPLICAS = (1, 8, 64, 128, 1024, 16384)
MIB = 2**18
"""fp32 elements."""


@cache
def model() -> Transformer:
    return Transformer(
        GPT3_1_3B,
        GPT3_1_3B.vocab_size,
        part=Part({0: range(12), 1: range(12, 24)}, 2),
        tensor_parallel=TensorParallel(),
        context_parallel=ContextParallel(),
        engine=Engine(),
        objective=None,
        seed=0,
        device=torch.device("meta"),
    )


def groups(replicas: int) -> list[ParameterGroup]:
    """Those of the first of many replicas, each of which has the whole model, in two stages."""
    context = replace(
        ParallelContext.single(),
        topology=Topology(dp=replicas),
        replica_group=Group(tuple(range(replicas)), 0),
    )
    return parameter_groups(model().tensors(), context)


def size(group: ParameterGroup) -> int:
    return sum(p.parameter.numel() for p in group.parameters)


def test_the_number_of_buckets_does_not_grow_with_the_replicas() -> None:
    counts = {replicas: len(cut_into_buckets(groups(replicas), 32.0)) for replicas in REPLICAS}
    assert counts[1] == counts[8] == counts[64] == counts[128]
    assert counts[128] >= counts[1024] >= counts[16384] >= 2
    # 1.3 B in fp32 are 157 times 32 MiB; matrices and vectors of two stages each end with a bucket that is not full.
    assert counts[8] <= math.ceil(4 * sum(map(size, groups(8))) / 2**20 / 32) + 4


@pytest.mark.parametrize("replicas", REPLICAS)
def test_a_replicas_piece_stays_large(replicas: int) -> None:
    buckets = cut_into_buckets(groups(replicas), 32.0)
    last_of_a_kind = {
        (bucket.decays, bucket.parameters[0].record.stage): number for number, bucket in enumerate(buckets)
    }.values()
    for number, bucket in enumerate(buckets):
        if number not in last_of_a_kind:
            assert size(bucket) / replicas >= 32 * MIB / REPLICAS_OF_A_BUCKET or replicas < REPLICAS_OF_A_BUCKET
            assert size(bucket) >= bucket_elements(32.0, replicas) >= 32 * MIB
            last = bucket.parameters[-1].parameter.numel()
            assert size(bucket) - last < bucket_elements(32.0, replicas), "no larger than it takes"


@pytest.mark.parametrize("replicas", REPLICAS)
def test_a_bucket_is_of_one_kind_and_stage_and_none_is_lost(replicas: int) -> None:
    whole = groups(replicas)
    buckets = cut_into_buckets(whole, 32.0)
    assert [p.name for b in buckets for p in b.parameters] == [p.name for g in whole for p in g.parameters]
    for bucket in buckets:
        assert len({p.record.stage for p in bucket.parameters}) == 1
        assert len({p.record.decays for p in bucket.parameters}) == 1
    vectors = [bucket for bucket in buckets if not bucket.decays]
    assert len(vectors) == 2, "small parameters of a stage are together"


def test_buckets_come_in_the_order_of_a_forward_pass() -> None:
    layouts = [FlatLayout.replicated(bucket) for bucket in cut_into_buckets(groups(8), 32.0)]
    order = in_model_order(layouts, [p.parameter for p in model().tensors()])
    assert sorted(order) == list(range(len(layouts)))
    names = [layouts[n].group.parameters[0].name for n in order]
    all_names = [p.name for p in model().tensors()]
    assert names == sorted(names, key=all_names.index)
    assert names[0] == "embedding.weight"
    assert names.index("blocks.0.attention_norm.weight") < names.index("blocks.5.attention.qkv.weight"), "as they come"
