"""What a dry run counts is what a step does: in closed form where there is one, and the whole plan from three parts."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from megalm.cli.dryrun import main, ranks_asked
from megalm.config.compose import compose
from megalm.config.schema import Config
from megalm.dryrun.kernels import cost_of
from megalm.dryrun.report import RankReport
from megalm.dryrun.run import dry_run
from megalm.errors import ConfigError
from megalm.mesh.topology import Topology
from megalm.models.counts import flops_per_token, parameter_count

HIDDEN, HEADS, VOCABULARY, SEQUENCE, LAYERS = 256, 4, 1024, 128, 4


def toy(*overrides: str, layers: int = LAYERS, micro_batches: int = 16, dp: int = 2) -> Config:
    """A small GPT in bf16."""
    return compose(
        [
            "experiment=gpt3_125m",
            f"model.num_layers={layers}",
            f"model.hidden_size={HIDDEN}",
            f"model.num_heads={HEADS}",
            f"model.vocab_size={VOCABULARY}",
            f"model.sequence_length={SEQUENCE}",
            "engine.recompute=none",
            "train.batch_ramp_start=null",
            "train.micro_batch_size=1",
            f"train.global_batch_size={micro_batches * dp}",
            *overrides,
        ]
    )


def run_rank(config: Config, rank: int, world_size: int, device: str = "cuda", *, whole: bool = False) -> RankReport:
    """Without what differs from run to run."""
    if config.engine.zero_stage == 3:  # DeepSpeed's hooks of one model are still there when the next is made
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found = pool.submit(dry_run, config, rank, world_size, device=device, whole=whole).result()
    else:
        found = dry_run(config, rank, world_size, device=device, whole=whole)
    return replace(found, seconds=0.0, tool_gib=0.0, ticks_traced=0)


@pytest.mark.parametrize(
    ("overrides", "world_size", "rank", "device"),
    [
        (["parallel.tp=2", "parallel.pp=4", "parallel.sequence_parallel=true"], 16, 0, "cuda"),
        (["parallel.pp=4", "parallel.early_receives=true"], 8, 4, "cuda"),
        (["parallel.pp=4", "parallel.schedule=zb_h1"], 8, 7, "cuda"),
        (["parallel.pp=2", "parallel.schedule=gpipe", "engine.recompute=full"], 4, 0, "cuda"),
        (["parallel.pp=2", "parallel.virtual_stages=2", "parallel.schedule=interleaved_1f1b"], 4, 0, "cuda"),
        (["parallel.pp=2", "parallel.virtual_stages=2", "parallel.schedule=interleaved_1f1b"], 4, 2, "cpu"),
        (["engine.zero_stage=2"], 2, 1, "cuda"),
        (["engine.zero_stage=3", "model.num_layers=2"], 2, 1, "cuda"),
        (["parallel.cp=2", "parallel.cp_attention=ring", "model.num_layers=2"], 4, 1, "cuda"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_three_micro_batches_tell_of_sixteen(overrides: list[str], world_size: int, rank: int, device: str) -> None:
    """Every figure of the replayed plan, memory tick by tick included, is that of the whole plan's execution."""
    dp = world_size // toy(*overrides).parallel.tp // toy(*overrides).parallel.pp // toy(*overrides).parallel.cp
    config = toy(*overrides, dp=dp)
    assert run_rank(config, rank, world_size, device) == run_rank(config, rank, world_size, device, whole=True)


def test_a_question_about_a_tensor_is_no_kernel() -> None:
    tensor = torch.zeros(3)
    assert cost_of(torch.ops.aten.is_pinned.default, (tensor,), {}, False) is None
    assert cost_of(torch.ops.aten.zero_.default, (tensor,), {}, tensor) is not None


def test_few_micro_batches_are_executed_as_they_are() -> None:
    for micro_batches in (1, 2, 3):
        config = toy("parallel.pp=4", micro_batches=micro_batches)
        found = dry_run(config, 2, 8, device="cuda")
        whole = dry_run(config, 2, 8, device="cuda", whole=True)
        assert found.ticks_traced == whole.ticks_traced
        assert found.memory == whole.memory and found.moments == whole.moments


def test_parameters_and_flops_are_the_closed_forms() -> None:
    config = toy("parallel.tp=2", "parallel.pp=2", micro_batches=4)
    topology = Topology(tp=2, pp=2, dp=2)
    ranks = [dry_run(config, topology.rank_at(pp=p, tp=t), 8, device="cuda") for p in range(2) for t in range(2)]
    tokens = 4 * SEQUENCE
    # Flash attention's backward multiplies queries by keys once more (Dao et al. 2022): 2·S·H per token and layer.
    again = 2 * SEQUENCE * HIDDEN * LAYERS
    assert sum(sum(r.flops.values()) for r in ranks) == (flops_per_token(config.model) + again) * tokens
    whole = parameter_count(config.model)
    # Norms, biases of row-parallel layers and positions are on both tensor-parallel ranks, tied words on two stages.
    replicated = whole.norm + LAYERS * 2 * HIDDEN + whole.position_embedding
    assert sum(r.parameters for r in ranks) == whole.total + replicated + whole.word_embedding


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("fusion", [False, True])
def test_products_that_add_to_a_sum_are_counted(dtype: str, fusion: bool) -> None:
    """However the gradients of weights are added up, over micro-batches and over chunks of the loss."""
    config = toy(
        f"engine.dtype={dtype}",
        f"engine.gradient_accumulation_fusion={str(fusion).lower()}",
        "engine.loss_chunk_tokens=48",
        layers=2,
        micro_batches=4,
    )
    found = dry_run(config, 0, 2, device="cuda")
    again = 2 * SEQUENCE * HIDDEN * 2
    assert sum(found.flops.values()) == (flops_per_token(config.model) + again) * 4 * SEQUENCE


def test_a_dry_run_leaves_no_variables_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that find LOCAL_RANK wait for the other ranks."""
    names = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    dry_run(toy(layers=1, micro_batches=1), 0, 2, device="cuda")
    assert not [name for name in names if name in os.environ]


def test_gpus_multiply_the_padding_of_the_vocabulary_and_the_cpu_does_not() -> None:
    odd, even = toy(f"model.vocab_size={VOCABULARY - 21}", layers=2), toy(layers=2)
    flops = {
        (config is odd, device): sum(dry_run(config, 0, 2, device=device).flops.values())
        for config in (odd, even)
        for device in ("cuda", "cpu")
    }
    assert flops[True, "cuda"] == flops[False, "cuda"]
    assert flops[False, "cpu"] - flops[True, "cpu"] == 6 * HIDDEN * 21 * 16 * SEQUENCE


def test_messages_are_the_closed_forms() -> None:
    """Per block and micro-batch with sequence parallelism: two gathers and two scatters forward, four and two backward.

    The backward of a column-parallel layer gathers its input anew, that of a row-parallel one the output's gradient.
    """
    config = toy("parallel.tp=2", "parallel.pp=4", "parallel.sequence_parallel=true", "parallel.early_receives=true")
    found = dry_run(config, Topology(tp=2, pp=4, dp=2).rank_at(pp=2), 16, device="cuda")
    traffic = {(t.group, t.kind): t for t in found.traffic}
    blocks, micro_batches, activation = found.stages[2], 16, SEQUENCE * HIDDEN * 2
    gathers, scatters = traffic["tp", "all_gather"], traffic["tp", "reduce_scatter"]
    assert (gathers.count, gathers.nbytes) == (6 * blocks * micro_batches, 6 * blocks * micro_batches * activation)
    assert (scatters.count, scatters.nbytes) == (4 * blocks * micro_batches, 4 * blocks * micro_batches * activation)
    for link, kind in (("pp 1▶2", "receive"), ("pp 2▶3", "send"), ("pp 3▶2", "receive"), ("pp 2▶1", "send")):
        assert (traffic[link, kind].count, traffic[link, kind].nbytes) == (16, 16 * activation // 2)
    padded = sum(t.nbytes for t in found.traffic if (t.group, t.kind) == ("replicas", "reduce_scatter"))
    assert 4 * found.parameters <= padded <= 4 * found.parameters * 1.01


@pytest.mark.parametrize("replicas", [8, 64, 1024])
def test_collectives_of_a_step_do_not_grow_with_the_replicas(replicas: int) -> None:
    config = toy(micro_batches=2, dp=replicas)
    found = dry_run(config, replicas - 1, replicas, device="cuda")
    counts = {(t.group, t.kind): t.count for t in found.traffic}
    reference = {(t.group, t.kind): t.count for t in dry_run(toy(micro_batches=2, dp=8), 7, 8, device="cuda").traffic}
    assert counts == reference


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)])
def test_activations_are_those_of_korthikanti(tp: int, sequence_parallel: bool) -> None:
    """Korthikanti et al. 2022, equations 2 to 4, without dropout's masks, with fused attention: 32·s·b·h per block."""
    overrides = [f"parallel.tp={tp}", "parallel.pp=4", f"parallel.sequence_parallel={str(sequence_parallel).lower()}"]
    config = toy(*overrides, dp=1)
    found = dry_run(config, tp, 4 * tp, device="cuda")  # the second stage: no embedding, no head
    elements = SEQUENCE * HIDDEN
    block = 8 * elements // (tp if sequence_parallel else 1) + 24 * elements // tp
    # Besides, attention keeps a log-sum-exp in fp32 for each query and head, and norms two numbers for each token.
    (retained,) = found.retained.values()
    assert retained == pytest.approx(found.stages[1] * block, rel=0.05)


def test_the_host_waits_once_in_a_step_whatever_its_micro_batches() -> None:
    for micro_batches in (1, 4, 16):
        found = dry_run(toy("parallel.pp=2", micro_batches=micro_batches), 3, 4, device="cuda")
        assert sum(found.host_syncs.values()) == 1


def test_work_is_that_of_its_block_and_direction() -> None:
    """Backward has two products for each of forward's; recomputation is backward's."""
    plain, recomputed = (
        dry_run(toy(f"engine.recompute={mode}"), 0, 2, device="cuda").layers for mode in ("none", "full")
    )
    assert plain["forward"].kernels["matmul"] == 4
    assert plain["backward"].kernels["matmul"] == 8
    attention = 4 * SEQUENCE * SEQUENCE * HIDDEN
    products = 2 * 12 * HIDDEN * HIDDEN * SEQUENCE
    assert plain["forward"].flops == products + attention
    assert plain["backward"].flops == 2 * products + 2.5 * attention  # flash attention multiplies query and key again
    # Nothing needs the output of the last product, so that torch's checkpoint stops before it.
    last = 2 * 4 * HIDDEN * HIDDEN * SEQUENCE
    assert recomputed["backward"].flops == plain["backward"].flops + plain["forward"].flops - last


def test_memory_is_named() -> None:
    found = dry_run(toy(layers=2, micro_batches=2), 1, 2, device="cuda")
    numel = found.parameters
    per_parameter = {"parameters": 2, "gradients": 4, "optimizer": 12 / 2}
    for kind, nbytes in per_parameter.items():
        assert found.memory[kind] == pytest.approx(nbytes * numel, rel=0.01)
    assert found.memory["activations"] > 0
    assert sum(found.memory.values()) == max(sum(m.peak.values()) for m in found.moments)


def test_the_command_prints_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "memory.png"
    arguments = ["model=gpt3_125m", "model.num_layers=2", "experiment=gpt3_125m", "cluster.gpus=4", "rank=1"]
    assert main([*arguments, "--json", "--png", str(picture)], "megalm dryrun") == 0
    found = json.loads(capsys.readouterr().out)
    wanted = {"rank", "seconds", "parameters", "flops", "peak_gib", "memory_gib", "collectives", "host_syncs"}
    assert wanted <= found.keys()
    assert found["rank"] == 1
    assert {"group", "kind", "count", "bytes"} <= found["collectives"][0].keys()
    assert {"site", "count"} == found["host_syncs"][0].keys()
    assert picture.stat().st_size > 10_000


def test_ranks_by_name_and_number() -> None:
    topology = Topology(tp=8, pp=16, dp=8)
    assert ranks_asked("first,middle,last", topology) == [0, 512, 1023]
    assert ranks_asked("5,first,5", topology) == [5, 0]
    assert ranks_asked("first,middle,last", Topology()) == [0]
    for wrong in ("1024", "-1", "second", "", "1,,2"):
        with pytest.raises(ConfigError, match="is no rank; 0 to 1023, first, middle, last"):
            ranks_asked(wrong, topology)


def test_a_vocabulary_that_nobody_knows_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size=null"):
        main(["experiment=gpt3_125m", "model.vocab_size=null", "cluster.gpus=4"], "megalm dryrun")


def test_a_step_that_does_not_fit_says_whether_recomputation_helps(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["experiment=gpt3_1_3b", "model.num_layers=2", "model.vocab_size=1024", "cluster.gpus=1"]
    batch = [
        "train.micro_batch_size=640",
        "train.global_batch_size=640",
        "train.batch_ramp_start=null",
        "engine.loss_chunk_tokens=131072",
    ]
    assert main([*arguments, *batch, "engine.recompute=none", "parallel.early_receives=true"], "megalm dryrun") == 0
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown
    assert "engine.recompute=full " in shown and "more FLOPs" in shown
    assert "parallel.early_receives=true: not used, as parallel.pp=1" in shown


def test_a_picture_without_a_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory\.png: name a file in a folder that exists"):
        main(["experiment=gpt3_1_3b", "--png", str(tmp_path / "nowhere" / "memory.png")], "megalm dryrun")
