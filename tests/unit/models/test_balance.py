from __future__ import annotations

import pytest

from megalm.config.schema import Model
from megalm.core.pipeline.partition import partition_layers
from megalm.models import balance
from megalm.models.balance import edge_costs

GPT3 = Model(num_layers=96, hidden_size=12288, num_heads=96, sequence_length=2048, vocab_size=50257)
SMALL = Model(num_layers=12, hidden_size=768, num_heads=12, sequence_length=2048, vocab_size=50257)


def test_a_head_weighs_what_its_matrix_work_says_where_the_model_is_wide() -> None:
    by_flops_alone = 50257 / (12 * 12288)
    assert edge_costs(GPT3, 50257).head == pytest.approx(by_flops_alone, rel=0.1)
    assert edge_costs(GPT3, 50257).embedding < 0.01


def test_a_large_vocabulary_takes_layers_from_the_last_stage() -> None:
    costs = edge_costs(SMALL, 50257)
    assert 3.0 < costs.head < 7.0, "50,257 rows of 768 against 12·768² weights"
    sizes = [len(r) for r in partition_layers(12, 4, embedding_cost=costs.embedding, head_cost=costs.head)]
    assert sizes[-1] == 1
    assert sum(sizes) == 12


@pytest.mark.parametrize("stages", [2, 4, 8, 16])
def test_the_split_is_the_same_on_every_accelerator(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = set()
    for flops_per_byte in (156.0, 200.0, 295.0):
        monkeypatch.setattr(balance, "_FLOPS_PER_BYTE", flops_per_byte)
        costs = edge_costs(GPT3, 50257)
        ranges = partition_layers(96, stages, embedding_cost=costs.embedding, head_cost=costs.head)
        splits.add(tuple(len(r) for r in ranges))
    assert len(splits) == 1
