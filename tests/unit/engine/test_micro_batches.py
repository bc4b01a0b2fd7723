"""Splitting a batch over replicas and context-parallel ranks: every token once, at one weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from megalm.core.attention.context_parallel import ContextParallel
from megalm.data.stream.batch import Batch
from megalm.engine.micro_batches import evaluation_micro_batch, training_micro_batches
from megalm.mesh.groups import Group, ParallelContext
from megalm.mesh.topology import Topology

ROWS, LENGTH, MICRO = 8, 6, 2


@dataclass(frozen=True)
class Told(Group):
    """A group that knows what its members would add up to."""

    total: float = 0.0

    def all_reduce(self, tensor):
        return tensor.fill_(self.total)


class Interleaved(ContextParallel):
    """Rank r of n holds the positions r, r + n, …: no contiguous part, so that places matter."""

    def positions(self, sequence_length, device="cpu"):
        return torch.arange(self.group.index, sequence_length, self.group.size, device=device)


def whole() -> Batch:
    tokens = np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)
    mask = (np.random.default_rng(0).random((ROWS, LENGTH)) < 0.7).astype(np.float32)
    return Batch(tokens, tokens + 1, mask, np.arange(100, 100 + ROWS), token_inputs={"place": tokens % LENGTH})


def rank(dp: int, cp: int, dp_rank: int, cp_rank: int, total: float) -> tuple[ParallelContext, ContextParallel]:
    data = Told(tuple(range(dp * cp)), dp_rank * cp + cp_rank, total=total)
    group = Group(tuple(range(cp)), cp_rank)
    context = replace(ParallelContext.single(), topology=Topology(dp=dp, cp=cp), replica_group=data, cp_group=group)
    return context, Interleaved(group)


@pytest.mark.parametrize(("dp", "cp"), [(1, 1), (2, 1), (1, 2), (2, 3), (4, 2)])
def test_every_token_counts_once_and_the_mean_over_ranks_is_the_global_mean(dp: int, cp: int) -> None:
    batch = whole()
    tokens = float(batch.loss_mask.sum())
    seen: dict[int, float] = {}
    for dp_rank in range(dp):
        mine = slice(dp_rank, None, dp)
        rows = batch.take(mine)
        for cp_rank in range(cp):
            # Every context-parallel rank counts its replica's whole rows.
            context, share = rank(dp, cp, dp_rank, cp_rank, total=tokens * cp)
            micro_batches, loss_tokens = training_micro_batches(rows, MICRO, context, share)
            assert loss_tokens == tokens, "of the global batch, once"
            assert len(micro_batches) == ROWS // dp // MICRO
            for micro_batch in micro_batches:
                assert micro_batch.tokens.shape == (MICRO, LENGTH // cp)
                assert torch.equal(micro_batch.labels, micro_batch.tokens + 1)
                place = micro_batch.place
                expected = (place.samples[:, None] - 100) * LENGTH + place.positions
                assert torch.equal(micro_batch.tokens, expected), "a place says where its tokens come from"
                assert torch.equal(micro_batch.token_inputs["place"], micro_batch.tokens % LENGTH)
                for token, weight in zip(micro_batch.tokens.flatten(), micro_batch.loss_weight.flatten(), strict=True):
                    assert int(token) not in seen
                    seen[int(token)] = float(weight)
    assert len(seen) == ROWS * LENGTH
    weights = torch.tensor([seen[token] for token in range(ROWS * LENGTH)])
    torch.testing.assert_close(weights, torch.from_numpy(batch.loss_mask.ravel()) * (dp * cp) / tokens)


def test_losses_of_rows_are_counted_by_row_and_shared_by_context_parallel_ranks() -> None:
    tokens = np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)
    counts = np.array([1, 0, 1, 0, 1, 0, 0, 0], dtype=np.float32)
    batch = Batch(tokens, tokens, counts, np.arange(ROWS), row_inputs={"target": counts * 5})
    context, share = rank(
        2, 2, 0, 1, total=6.0 * 2
    )  # three units here, three on the other replica; both cp ranks count
    micro_batches, units = training_micro_batches(batch, MICRO, context, share)
    assert units == 6
    weights = torch.cat([micro_batch.loss_weight for micro_batch in micro_batches])
    torch.testing.assert_close(weights, torch.from_numpy(counts) * 4 / 6 / 2)
    assert [m.row_inputs["target"].tolist() for m in micro_batches] == [[5, 0], [5, 0], [5, 0], [0, 0]]


def test_validation_weighs_by_the_mask_and_drops_nothing_out() -> None:
    batch = whole()
    shares = [
        evaluation_micro_batch(batch, torch.device("cpu"), rank(1, 2, 0, cp_rank, total=0.0)[1]) for cp_rank in range(2)
    ]
    assert sum(float(share.loss_weight.sum()) for share in shares) == float(batch.loss_mask.sum())
    assert np.array_equal(shares[1].tokens, batch.tokens[:, 1::2])
    assert all(share.place.samples is None for share in shares)
