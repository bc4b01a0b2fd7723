"""Drives DeepSpeed's ZeRO optimizers (Rajbhandari et al. 2020). The only file that imports deepspeed.

DeepSpeed sees one optimizer step per call (``gradient_accumulation_steps=1``), a flat registry of this rank's
parameters, and an ``mpu`` that describes the mesh. It splits masters and moments over replicas; at stages 1 and 2 it
has no part in a step. Micro-batches, the pipeline, the loss, the accumulation and reduction of gradients
(``gradients.py``), their norm and their clipping (``zero.py``), and the gathers of updated weights (``weights.py``) are
megalm's own: DeepSpeed 0.19.8 accumulates 16-bit gradients in 16 bits, reduces and gathers after the schedule, and at
stages 0 and 3 computes a wrong norm under tensor or pipeline parallelism.

The losses that come in are weighted for the mean over the global batch; see ``global_mean.py``.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.config.schema import Config
from megalm.core.collectives import start_all_gather
from megalm.core.host import read
from megalm.core.parameters import DeclaredTensor, StatePiece
from megalm.core.pipeline.runner import PipelineResult, PipelineRunner, Stages
from megalm.engine.global_mean import share_of_mean
from megalm.engine.gradients import GradientBuckets
from megalm.engine.layout import FlatLayout, cut_into_buckets
from megalm.engine.loss_scale import LossScale
from megalm.engine.optimizer import ParameterGroup, make_adamw, parameter_groups
from megalm.engine.reduction import reduction_to_pieces
from megalm.engine.resume import is_shared, kinds_of, share_of
from megalm.engine.validation import reported
from megalm.engine.zero import FlatZeroOptimizer, PartitionedAdamW, ReplicatedAdamW, ZeroOptimizer
from megalm.engine.zero3 import Root, Zero3AdamW
from megalm.errors import ConfigError
from megalm.mesh.groups import Group, ParallelContext
from megalm.mesh.parameter import StateRun
from megalm.mesh.slices import ShardSpec
from megalm.models.micro_batch import MicroBatch
from megalm.models.transformer import Transformer


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave.

    Attributes:
        terms: this rank's part of each term of the objective, by name, fp64 scalars of the device; the sum over all
            ranks is the mean over the global batch.
        grad_norm: global gradient norm before clipping, a fp64 scalar of the device; NaN if it is not finite, and then
            nothing was updated. The same on every rank.
        loss_scale: dynamic loss scale of this step; None where there is none.
        pipeline: timing of the schedule on this rank.
    """

    terms: dict[str, Tensor]
    grad_norm: Tensor
    loss_scale: float | None
    pipeline: PipelineResult


class DeepSpeedEngine:
    """One rank's stages under a ZeRO optimizer.

    Args:
        model: this rank's part of the model and its objective, with initial weights, in the run's dtype.
        context: this rank's place and groups.
        config: the run; dtype, ZeRO stage, optimizer, schedule and micro-batch size are read.
    """

    def __init__(self, model: Transformer, context: ParallelContext, config: Config) -> None:
        assert model.objective is not None, "the model was built without an objective, so there is nothing to train"
        self.model = model
        self.context = context
        self.objective = model.objective
        self.tensors = model.tensors()
        groups = parameter_groups(self.tensors, context)
        run_stage: Stages[MicroBatch]
        self._optimizer, run_stage = _make_optimizer(model, groups, context, config)
        model.before_use = self._optimizer.before_use
        if config.engine.gradient_accumulation_fusion:
            assert model.weight_gradients is not None, "the model was built of another config"
            model.weight_gradients.accumulate_into(_sums_of(self._optimizer))
        self._loss_scale: LossScale | None = None
        if config.engine.dtype == "fp16":
            self._loss_scale = LossScale(config.engine.initial_loss_scale, 0, config.engine.loss_scale_window)
        self.runner: PipelineRunner[MicroBatch] = PipelineRunner(
            run_stage,
            context,
            schedule=_schedule(config),
            between_stages=model.between_stages(config.train.micro_batch_size, config.model.sequence_length),
            early_receives=config.parallel.early_receives,
            weight_gradients=model.weight_gradients,
        )

    def train_step(self, micro_batches: Sequence[MicroBatch], learning_rate: float) -> StepResult:
        """Forward and backward of all micro-batches, gradient reduction, clipping, and one AdamW step.

        The host waits for the norm in fp16, whose next loss scale depends on it; otherwise for nothing.
        """
        self.model.train()
        scale = self._loss_scale
        loss_scale = 1.0 if scale is None else scale.value
        buckets = self._optimizer.buckets
        buckets.begin()
        result = self.runner.train(micro_batches, buckets, loss_scale=loss_scale)
        buckets.finish()
        grad_norm = self._optimizer.step(learning_rate, loss_scale=loss_scale)
        if scale is not None:
            self._loss_scale = scale.after(overflowed=not math.isfinite(*read(grad_norm)))
        return StepResult(
            terms={
                name: share_of_mean(value, self.context.replica_group)
                for name, value in reported(result, self.objective.terms, self.context).items()
            },
            grad_norm=grad_norm,
            loss_scale=None if scale is None else scale.value,
            pipeline=result,
        )

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
        """This rank's part of each measure of the objective, by name, to be summed over all ranks.

        Returns:
            fp64 scalars of the device.
        """
        self.model.eval()
        return reported(self.runner.evaluate(micro_batches), self.objective.measures, self.context)

    def settle_weights(self) -> None:
        """Wait until the model's parameters are those that the last step made, for who reads them without computing.

        What a step updates is gathered while the next one begins, or an evaluation: these wait by themselves.
        """
        self._optimizer.settle_weights()

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every tensor that this rank holds a slice of, by name."""
        return {t.name: t.shard.full_shape for t in self.tensors}

    def state_pieces(self) -> list[StatePiece]:
        """What this rank alone is to save; together, all ranks' pieces cover everything once."""
        self.settle_weights()
        pieces = [piece.without_padding for piece in self.held_pieces() if self._stands_for(piece)]
        return [piece for piece in pieces if piece.values.numel()]

    def held_pieces(self) -> list[StatePiece]:
        """All that this rank holds of masters, moments, parameters that are not trained, and buffers; live values."""
        return [
            StatePiece(t.record, kind, start, values)
            for t in self.tensors
            for kind, start, values in self._fragments(t)
        ]

    def model_pieces(self) -> list[StatePiece]:
        """What this rank holds of the parameters that the model computes with, in the run's number format."""
        parameters = [t for t in self.tensors if not t.record.is_buffer]
        return [StatePiece(t.record, "weight", *self._optimizer.weight_fragment(t.parameter)) for t in parameters]

    def full_weight(self, t: DeclaredTensor) -> Tensor:
        """The local tensor as the model computes with it; collective over replicas."""
        local = t.tensor if t.record.is_buffer else self._optimizer.full_weight(t.parameter)
        return local.view(t.shard.local_shape)

    def scalar_state(self) -> dict[str, float]:
        """What is the same on every rank and belongs into a checkpoint: optimizer steps, and the loss scale if any."""
        state: dict[str, float] = {"optimizer_steps": self._optimizer.optimizer_steps}
        if self._loss_scale is not None:
            state |= {"loss_scale": self._loss_scale.value, "good_steps": self._loss_scale.good_steps}
        return state

    def load_state(self, source: StateSource, *, scalars: dict[str, float] | None) -> None:
        """Take weights from a checkpoint of any layout, and with ``scalars`` its optimizer state too.

        Collective over all ranks. Each reads its own part of what ZeRO splits, into masters and moments, and a share of
        what replicas hold whole (``resume.py``); the weights that the model computes with are then made of the masters,
        as in a step.

        Args:
            source: reads slices of saved tensors.
            scalars: what :meth:`scalar_state` gave; None: weights only.
        """
        steps = int(scalars["optimizer_steps"]) if scalars else 0
        if steps:
            self._optimizer.create_moments(steps)
        if scalars and self._loss_scale is not None and "loss_scale" in scalars:
            window = self._loss_scale.window
            self._loss_scale = LossScale(scalars["loss_scale"], int(scalars["good_steps"]), window)
        with torch.no_grad():
            # What two stages hold comes first, so that neither waits while the other reads its blocks.
            for t in sorted(self.tensors, key=lambda t: not t.record.copies):
                self._load(t, source, moments=bool(steps))
            self._optimizer.publish_weights()

    def runs_to_read(self, *, moments: bool) -> list[StateRun]:
        """What this rank reads of a checkpoint in :meth:`load_state`; ``moments``: with the optimizer's state."""
        return [run for t in self.tensors for run in self._runs(t, moments=moments)]

    def _runs(self, t: DeclaredTensor, *, moments: bool) -> list[StateRun]:
        kinds = kinds_of(t.record, moments=moments)
        if self._is_shared(t):
            holders = self._holders(t)
            start, length = share_of(t.shard.local_numel, holders.index, holders.size)
            return [StateRun(t.record, kind, start, length) for kind in kinds]
        # Moments lie where their masters do; there are none before the first step.
        masters = [(start, values.numel()) for kind, start, values in self._fragments(t) if kind == "weight"]
        return [StateRun(t.record, kind, start, length) for kind in kinds for start, length in masters]

    def _load(self, t: DeclaredTensor, source: StateSource, *, moments: bool) -> None:
        """Fill what this rank holds of a tensor."""
        held: dict[str, list[tuple[int, Tensor]]] = {}
        for kind, start, values in self._fragments(t):
            held.setdefault(kind, []).append((start, values))
        runs = iter(self._runs(t, moments=moments))
        for kind in kinds_of(t.record, moments=moments):
            if self._is_shared(t):
                run = next(runs)
                whole = self._from_all_holders(t, source.read_flat(t.name, kind, t.shard, run.flat_start, run.length))
                for start, values in held.get(kind, ()):
                    values.copy_(whole[start : start + values.numel()])
                continue
            for start, values in held.get(kind, ()):
                values.copy_(source.read_flat(t.name, kind, t.shard, start, values.numel()))

    def _from_all_holders(self, t: DeclaredTensor, own: Tensor) -> Tensor:
        """This rank's share of a flattened local tensor ▶ all of it; collective over those that hold it."""
        holders = self._holders(t)
        if holders.size == 1:
            return own
        share = share_of(t.shard.local_numel, 0, holders.size)[1]
        dtype = torch.float32 if t.record.trainable else t.tensor.dtype
        padded = torch.zeros(share, dtype=dtype, device=self.context.device)
        padded[: own.numel()] = own
        return start_all_gather(padded, holders, 0).wait()

    def _is_shared(self, t: DeclaredTensor) -> bool:
        return is_shared(
            t.record, splits_state=self._optimizer.splits_state, splits_weights=self._optimizer.splits_weights
        )

    def _holders(self, t: DeclaredTensor) -> Group:
        """The ranks that hold this rank's slice of a tensor, but for copies on tensor-parallel ranks."""
        return self.context.tied_group if t.record.copies else self.context.replicas_of(t.record)

    def _stands_for(self, piece: StatePiece) -> bool:
        splits = self._optimizer.splits_weights or (piece.record.trainable and self._optimizer.splits_state)
        return self.context.owns(piece.record, among_replicas=piece.record.is_buffer or not splits)

    def _fragments(self, t: DeclaredTensor) -> Iterator[tuple[str, int, Tensor]]:
        """(kind, offset in the flattened local tensor, live values) of what this rank holds of a tensor."""
        if t.record.is_buffer:
            yield "buffer", 0, t.tensor.detach().view(-1)
        elif t.record.trainable:
            yield from self._optimizer.fragments(t.parameter)
        else:
            start, values = self._optimizer.weight_fragment(t.parameter)
            if values.numel():
                yield "weight", start, values


class StateSource(Protocol):
    """What :meth:`DeepSpeedEngine.load_state` needs of a checkpoint reader."""

    def read_flat(self, name: str, kind: str, shard: ShardSpec, flat_start: int, length: int) -> Tensor:
        """A run of the flattened local tensor."""


def _make_optimizer(
    model: Transformer, groups: list[ParameterGroup], context: ParallelContext, config: Config
) -> tuple[ZeroOptimizer, Stages[MicroBatch]]:
    """The ZeRO stage that the config names, and how the runner calls the model under it."""
    zero_stage, clip = config.engine.zero_stage, config.optim.clip_grad_norm
    if not groups:
        raise ConfigError(["no parameter of this rank is trainable; a run needs one on every pipeline stage"])
    if zero_stage == 3:
        engine = _initialise(Root(model), groups, context, config)
        return Zero3AdamW(engine.optimizer, context), engine

    parts = list(model.parts())
    reduction = reduction_to_pieces(context.transport, config.engine.reduce_dtype)

    def make_buckets(layouts: list[FlatLayout]) -> GradientBuckets:
        parameters = [parameter for _, found in parts for parameter in found]
        return GradientBuckets(layouts, parameters, context, reduction=reduction, shards=zero_stage == 2)

    buckets = cut_into_buckets(groups, config.engine.bucket_mib)
    if zero_stage == 0:
        adamw = make_adamw(groups, config.optim)
        return ReplicatedAdamW.over(buckets, adamw, make_buckets, context, clip), model.run
    zeros = []
    for _, found in groupby(buckets, key=lambda group: group.replicas.ranks):
        same = list(found)
        # DeepSpeed splits over one set of ranks, so each set has an optimizer of its own, which sees these alone.
        members = nn.ParameterList([p.parameter for group in same for p in group.parameters])
        zeros.append((_initialise(members, same, context, config).optimizer, same))
    return PartitionedAdamW.over(zeros, parts, make_buckets, context, clip), model.run


def _sums_of(optimizer: ZeroOptimizer) -> GradientBuckets:
    """Where gradients are summed in fp32."""
    assert isinstance(optimizer, FlatZeroOptimizer), "ZeRO-3 sums gradients by DeepSpeed's hooks"
    return optimizer.buckets


def _schedule(config: Config) -> str:
    """The order of work within a step.

    ZeRO-3 has no pipeline, so all schedules compute the same there, and its hooks know one order alone: the backward of
    a micro-batch after its forward, as a whole. GPipe's comes after other forwards, for which the weights were gathered
    and freed again, and a zero-bubble schedule computes weight gradients past the hooks.
    """
    return "1f1b" if config.engine.zero_stage == 3 else config.parallel.schedule


def _initialise(model: nn.Module, groups: list[ParameterGroup], context: ParallelContext, config: Config) -> Any:
    """A DeepSpeed engine around this rank's parameters."""
    if context.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(context.device.index or 0))  # DeepSpeed insists on it
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has deprecated; its users can do nothing about it.
    warnings.filterwarnings(
        "ignore", message=r".*(all_gather_into|reduce_scatter)_tensor. is deprecated", category=FutureWarning
    )
    with _silenced():
        import deepspeed

        # A C++ extension that DeepSpeed would compile at start on the CPU; gloo does its work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if context.device.type == "cpu":
            # DeepSpeed asks what the CPU is fast at; torch computes fp16 on any, which is enough to prove a layout.
            deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
        _import_muon()
        deepspeed.init_distributed(dist_backend=dist.get_backend())
        with _no_garbage_collection():
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=make_adamw(groups, config.optim),
                config=_deepspeed_config(config, context, groups[0].replicas),
                mpu=_Mpu(context, groups[0].replicas),
            )
    return engine


@contextlib.contextmanager
def without_comparisons() -> Iterator[None]:
    """ZeRO-3 compares lists of numbers between ranks, such as the order of its modules: send them, and compare nothing.

    For tensors without values, as long as the block runs.
    """
    modules = [
        import_module(f"deepspeed.runtime.zero.{name}")
        for name in ("utils", "partition_parameters", "partitioned_param_coordinator", "stage3")
    ]
    utils = modules[0]
    lengths, numbers = utils.assert_lst_len_same_as_other_ranks, utils.get_lst_from_rank0

    def send(ints: list[int]) -> None:
        with contextlib.suppress(RuntimeError):
            lengths(ints)
        numbers(ints)

    name = "assert_ints_same_as_other_ranks"
    before = [(module, getattr(module, name)) for module in modules if hasattr(module, name)]
    for module, _ in before:
        setattr(module, name, send)
    try:
        yield
    finally:
        for module, function in before:
            setattr(module, name, function)


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer, as its engine does, but without torch's compiler.

    Its functions are decorated with ``torch.compile``, which imports inductor: most of a second and 40 MiB on each rank
    for an optimizer that megalm does not offer.
    """
    compile_ = torch.compile
    torch.compile = lambda function=None, **_: function if function is not None else lambda f: f  # type: ignore[assignment]
    try:
        import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = compile_  # type: ignore[assignment]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """DeepSpeed imports modules here, and its finalisers import too: one that is collected amid an import breaks it.

    CPython before 3.12 then raises KeyError from its import lock (python/cpython#106176).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _deepspeed_config(config: Config, context: ParallelContext, replicas: Group) -> dict[str, Any]:
    """The only place where a DeepSpeed config is written; users never write one."""
    # DeepSpeed's stages 1 and 2 differ in their reduction alone, which is not used.
    deepspeed_stage = {2: 1}.get(config.engine.zero_stage, config.engine.zero_stage)
    zero: dict[str, Any] = {"stage": deepspeed_stage, "overlap_comm": False}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": max(1, config.train.global_batch_size // replicas.size),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip_grad_norm if deepspeed_stage == 3 else 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    if config.engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": context.device.type == "cuda"}
        settings["zero_force_ds_cpu_optimizer"] = False  # its own Adam would compile C++
    if config.engine.dtype == "bf16":
        settings["bf16"] = {"enabled": True}
    if deepspeed_stage == 3:
        # Else DeepSpeed puts a function of its own, which rounds otherwise, in the place of torch's F.linear: for all
        # that this process computes from here on.
        zero["memory_efficient_linear"] = False
        # DeepSpeed reduces and accumulates: in fp32, like megalm's own buckets.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    if config.engine.dtype == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 1.0}  # static: megalm scales the loss itself
    return settings


class _Mpu:
    """The mesh as DeepSpeed asks for it: "model parallel" is tp × pp, "tensor model parallel" is tp."""

    def __init__(self, context: ParallelContext, replicas: Group) -> None:
        self._context = context
        self._replicas = replicas

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._context.model_group.handle

    def get_model_parallel_rank(self) -> int:
        return self._context.model_group.index

    def get_model_parallel_world_size(self) -> int:
        return self._context.model_group.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._replicas.handle

    def get_data_parallel_rank(self) -> int:
        return self._replicas.index

    def get_data_parallel_world_size(self) -> int:
        return self._replicas.size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._context.tp_group.handle

    def get_tensor_model_parallel_rank(self) -> int:
        return self._context.tp_group.index

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._context.tp_group.size

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._context.pp_group.handle

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._context.pp_group.index

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._context.pp_group.size


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep DeepSpeed's start-up banners off the console; errors still raise, and still show."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
