"""What `megalm check` says of a pipeline and its transfers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megalm.config.schema import Cluster, Config, Data, Engine, Model, Optim, Parallel, Run, Train
from megalm.mesh.topology import Topology
from megalm.plan.pipeline import pipeline_rows, transfer_per_forward

MODEL = Model(num_layers=96, hidden_size=12288, num_heads=96, sequence_length=2048, vocab_size=50257)
GPT3 = Config(
    run=Run(name="check"),
    model=MODEL,
    data=Data(path=("unused",)),
    optim=Optim(lr=1e-4),
    train=Train(steps=1, micro_batch_size=1, global_batch_size=1536),
    parallel=Parallel(tp=8, pp=16, virtual_stages=3, schedule="interleaved_1f1b", sequence_parallel=True),
    cluster=Cluster(gpus=1024, gpu="a100_80gb"),
)
TOPOLOGY = Topology(tp=8, pp=16, dp=8, virtual_stages=3)


def test_a_transfer_is_counted_by_the_published_peaks() -> None:
    """Worked out by hand: 2,048 tokens over 8 ranks, of 12,288 elements of two bytes, at 200 Gbit/s; and 24·H² + 4·H·S
    FLOPs per token of each of two layers, over 8 ranks at 312 TFLOP/s."""
    seconds = 2048 / 8 * 12288 * 2 / 25e9
    forward = 2 * 2048 * (24 * 12288**2 + 4 * 12288 * 2048) / 8 / 312e12
    assert transfer_per_forward(GPT3, TOPOLOGY) == pytest.approx(seconds / forward)
    whole = replace(GPT3, parallel=replace(GPT3.parallel, sequence_parallel=False))
    assert transfer_per_forward(whole, TOPOLOGY) == pytest.approx(8 * seconds / forward)
    halves = replace(GPT3, train=replace(GPT3.train, micro_batch_size=2))
    assert transfer_per_forward(halves, TOPOLOGY) == pytest.approx(seconds / forward), "both grow with the tokens"


def test_within_a_node_the_link_counts() -> None:
    one_node = Topology(pp=8)
    alone = replace(GPT3, parallel=replace(GPT3.parallel, tp=1, pp=8))
    over_network = replace(alone, cluster=replace(alone.cluster, gpus_per_node=4))
    link, network = transfer_per_forward(alone, one_node), transfer_per_forward(over_network, one_node)
    assert link is not None and network is not None
    assert network / link == pytest.approx(300 / 25)


@pytest.mark.parametrize(("gpu", "dtype"), [(None, "bf16"), ("t4", "bf16"), ("t4", "fp16")])
def test_where_something_is_not_known_nothing_is_guessed(gpu: str | None, dtype: str) -> None:
    """A T4 has no bf16, and no network in a reference node of its vendor."""
    config = replace(GPT3, cluster=replace(GPT3.cluster, gpu=gpu), engine=Engine(dtype=dtype))
    assert transfer_per_forward(config, TOPOLOGY) is None


def test_the_rows_name_ideal_and_replayed_bubbles() -> None:
    rows = pipeline_rows(GPT3, TOPOLOGY)
    assert rows["pipeline"] == "interleaved_1f1b, 3 stages per rank, 2 layers per stage, bubble 2.5%"
    assert rows["transfers"] == (
        "4.12% of a stage's forward, by the peaks of a100_80gb: "
        "bubble 5.9% with transfers grouped, 2.8% with parallel.early_receives=true"
    )
    unknown = replace(GPT3, cluster=replace(GPT3.cluster, gpu=None))
    assert pipeline_rows(unknown, TOPOLOGY)["transfers"] == (
        "5, 10% of a stage's forward: "
        "bubble 6.5, 9.4% with transfers grouped, 2.8, 3.1% with parallel.early_receives=true"
    )


def test_blocks_that_are_recomputed_lengthen_the_backward() -> None:
    """One micro-batch through two stages, one after the other: each rank idles half of the time, and for transfers."""
    parallel = Parallel(pp=2)
    plain = replace(GPT3, parallel=parallel, train=replace(GPT3.train, global_batch_size=1))
    recomputed = replace(plain, engine=Engine(recompute="full"), cluster=Cluster(gpus=2, gpus_per_node=8))
    assert "bubble 50.0%" in pipeline_rows(plain, Topology(pp=2))["pipeline"]
    # Busy 3 and 4; two stages one after the other take 6 and 8, and two transfers of 0.05 more.
    unknown = replace(plain, cluster=recomputed.cluster)
    for config, bubble in ((unknown, 100 * (1 - 3 / 6.1)), (recomputed, 100 * (1 - 4 / 8.1))):
        assert f"bubble {bubble:.1f}, " in pipeline_rows(config, Topology(pp=2))["transfers"]
