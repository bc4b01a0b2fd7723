"""What of a flat buffer counts in the gradient norm: all but the padding of vocabularies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megalm.core.parameters import DeclaredTensor, Init
from megalm.engine.layout import FlatLayout
from megalm.engine.optimizer import ParameterGroup
from megalm.mesh.groups import ALONE
from megalm.mesh.parameter import ParameterRecord
from megalm.mesh.slices import ShardSpec


def declared(shard: ShardSpec) -> DeclaredTensor:
    parameter = torch.nn.Parameter(torch.zeros(shard.local_shape))
    return DeclaredTensor(ParameterRecord("w", shard), Init.constant(0.0), parameter)


@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 40])
def test_every_element_but_padding_is_there_once_and_in_order(replicas: int) -> None:
    padded = ShardSpec.along((5, 3), 0, ((0, 5),), 3)
    shards = [padded, ShardSpec.replicated(7), padded, padded, ShardSpec.replicated(2, 2)]
    members = tuple(declared(shard) for shard in shards)
    numel = sum(shard.local_numel for shard in shards)
    partition = -(-numel // replicas)
    is_word, at = torch.ones(partition * replicas, dtype=torch.bool), 0
    for shard in shards:
        is_word[at + shard.saved.local_numel : at + shard.local_numel] = False
        at += shard.local_numel
    buffer = torch.arange(partition * replicas)
    for replica in range(replicas):
        group = ParameterGroup(members, True, replace(ALONE, index=replica), None, None, is_owned=True)
        layout = FlatLayout(group, partition * replicas, partition)
        low, high = layout.owned_here
        pieces = layout.of_words(buffer[low:high])
        assert torch.equal(torch.cat(pieces), buffer[low:high][is_word[low:high]])
    whole = FlatLayout(ParameterGroup(members[1:2], True, ALONE, None, None, is_owned=True), 7, None)
    (piece,) = whole.of_words(torch.arange(7))
    assert piece.numel() == 7
