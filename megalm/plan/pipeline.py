"""What ``megalm check`` says of a pipeline: schedule and bubble, without and with the time of transfers. No torch.

Shape legend: B micro-batch, S sequence, H hidden.
"""

from __future__ import annotations

from megalm.config.schema import Config
from megalm.core.pipeline.order import orders
from megalm.core.pipeline.schedule import SCHEDULES, Shape, plan
from megalm.core.pipeline.timing import Durations, replay
from megalm.mesh.topology import Topology
from megalm.models.balance import split_layers
from megalm.models.counts import layer_flops_per_token
from megalm.plan.hardware import devices

ASSUMED = (0.05, 0.1)
"""Transfer time relative to a stage's forward, where the hardware is not known."""


def pipeline_rows(config: Config, topology: Topology) -> dict[str, str]:
    """Two rows: schedule, layers and ideal bubble; and the bubbles of a replay with transfers, by both orders.

    The ideal bubble is the one of the published formulas: a forward takes as long as the gradient of the inputs and as
    that of the weights, and a transfer takes no time. Where blocks are recomputed, their forward is added to the
    gradient of the inputs.
    """
    parallel, train = config.parallel, config.train
    shape = Shape(
        topology.pp, train.global_batch_size // (train.micro_batch_size * topology.dp), parallel.virtual_stages
    )
    ticks = plan(SCHEDULES[parallel.schedule], shape)
    durations = _durations(config)

    def bubble(transfer: float, *, early: bool) -> str:
        found = replay(orders(ticks, early=early), shape, durations, transfer=transfer)
        return f"{100 * found.bubble_fraction:.1f}"

    stages = f", {parallel.virtual_stages} stages per rank" if parallel.virtual_stages > 1 else ""
    ideal = f"{parallel.schedule}{stages}{_layers(config)}, bubble {bubble(0.0, early=True)}%"
    ratio = transfer_per_forward(config, topology)
    ratios = ASSUMED if ratio is None else (ratio,)
    early, grouped = (", ".join(bubble(each, early=order) for each in ratios) for order in (True, False))
    share = ", ".join(f"{100 * each:.3g}" for each in ratios)
    source = "" if ratio is None else f", by the peaks of {config.cluster.gpu}"
    return {
        "pipeline": ideal,
        "transfers": f"{share}% of a stage's forward{source}: bubble {grouped}% with transfers grouped, "
        f"{early}% with parallel.early_receives=true",
    }


def transfer_per_forward(config: Config, topology: Topology) -> float | None:
    """Time of a transfer between stages relative to a stage's forward, both at the peaks of ``cluster.gpu``.

    A rank sends [B, S, H], its share of the sequence under context and sequence parallelism, over the network where
    the job has several nodes (the slowest pair of neighbours counts) and over the link of a node otherwise. Neither
    reaches its peak; products are further from theirs, so that the real ratio is smaller.

    Returns:
        None where the device, its peak for the number format or its bandwidth is not known.
    """
    device = devices().get(config.cluster.gpu or "")
    peak = None if device is None else device.peak_flops(config.engine.dtype)
    if device is None or peak is None:
        return None
    within_a_node = topology.world_size <= config.cluster.gpus_per_node
    gigabytes = device.link_gbps if within_a_node else (device.network_gbit or 0.0) / 8
    if not gigabytes:
        return None
    tokens = config.train.micro_batch_size * config.model.sequence_length / topology.cp
    sent = tokens / (topology.tp if config.parallel.sequence_parallel else 1)
    transferred = sent * config.model.hidden_size * (4 if config.engine.dtype == "fp32" else 2)
    # Of 6 FLOPs per weight and token 2 are forward's.
    layers = sum(layer_flops_per_token(config.model, layer) for layer in range(config.model.num_layers)) / 3
    forward = tokens * layers / topology.num_stages / topology.tp / peak
    return transferred / (gigabytes * 1e9) / forward


def _durations(config: Config) -> Durations:
    recomputes_all = config.engine.recompute == "full"
    return Durations(input_gradient=1.0 + recomputes_all / config.engine.recompute_every)


def _layers(config: Config) -> str:
    if config.model.vocab_size is None and config.parallel.stage_layers is None:
        return ""
    sizes = [len(layers) for layers in split_layers(config, config.model.vocab_size or 0)]
    layers = f", {min(sizes)} to {max(sizes)} layers" if len(set(sizes)) > 1 else f", {sizes[0]} layers"
    return f"{layers} per stage"
