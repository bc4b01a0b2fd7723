"""Drives DeepSpeed's ZeRO optimizers (Rajbhandari et al. 2020). The only file that imports deepspeed.

DeepSpeed sees one optimizer step per call (``gradient_accumulation_steps=1``), a flat registry of this rank's
parameters, and an ``mpu`` that describes the mesh. Micro-batches, the pipeline and the loss are megalm's own.

Which gradients DeepSpeed reduces, and when, differs with dtype and stage; :class:`_Reduction` has one subclass for each
way, and ``_REDUCTIONS`` is the table of what is proven. The loss of a replica is scaled by the data-parallel size over
the number of tokens in the *global* batch, so that DeepSpeed's mean over replicas is the gradient of the global mean.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.config.schema import Config
from megalm.core.groups import ParallelContext
from megalm.core.pipeline.runner import PipelineResult, PipelineRunner, PlainGradients
from megalm.core.sharding import DeclaredParameter, ShardSpec, StatePiece, declared_parameters
from megalm.engine.optimizer import make_adamw
from megalm.models.gpt import GPT, MicroBatch

MOMENTS = ("exp_avg", "exp_avg_sq")
"""State of AdamW per element, as torch names it."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave.

    Attributes:
        loss_sum: this rank's share of the loss, to be summed over all ranks: the mean over tokens of the global batch.
        grad_norm: global gradient norm before clipping; NaN if it is not finite. The same on every rank.
        loss_scale: dynamic loss scale; None where there is none.
        pipeline: timing of the schedule on this rank.
    """

    loss_sum: float
    grad_norm: float
    loss_scale: float | None
    pipeline: PipelineResult


class DeepSpeedEngine:
    """One rank's stage under a ZeRO optimizer.

    Args:
        stage: this rank's part of the model, with initial weights, in the run's dtype.
        context: this rank's place and groups.
        config: the run; dtype, ZeRO stage, optimizer, schedule and micro-batch size are read.
    """

    def __init__(self, stage: GPT, context: ParallelContext, config: Config) -> None:
        key = (config.engine.dtype, config.engine.zero_stage)
        if key not in _REDUCTIONS:
            raise ValueError(f"dtype {key[0]} with ZeRO-{key[1]} is not supported")
        self.stage = stage
        self.context = context
        self.parameters = declared_parameters(stage)
        self._mark_for_gradient_norm()
        self._clip = config.optim.clip_grad_norm
        self._engine = _initialise(stage, self.parameters, context, config)
        self._reduction = _REDUCTIONS[key](self)
        self.runner: PipelineRunner[MicroBatch] = PipelineRunner(
            stage.run,
            context,
            schedule=config.parallel.schedule,
            activation_shape=_activation_shape(config, context),
            dtype=next(stage.parameters()).dtype,
            weight_gradients=stage.tp.weight_gradients,
        )

    def train_step(self, micro_batches: Sequence[MicroBatch], learning_rate: float) -> StepResult:
        """Forward and backward of all micro-batches, gradient reduction, clipping, and one AdamW step."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.stage.train()
        result = self._reduction.backward(micro_batches)
        grad_norm = self._reduction.step()
        loss_sum = float(torch.stack(result.losses).double().sum()) / self.context.data.size if result.losses else 0.0
        return StepResult(
            # Every tensor-parallel rank of the last stage computes the same loss; one of them reports it.
            loss_sum=loss_sum if self.context.tp.index == 0 else 0.0,
            grad_norm=grad_norm,
            loss_scale=None,
            pipeline=result,
        )

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> float:
        """This rank's share of the weighted sum of token losses, to be summed over all ranks."""
        self.stage.eval()
        losses = self.runner.evaluate(micro_batches).losses
        return float(torch.stack(losses).double().sum()) if losses and self.context.tp.index == 0 else 0.0

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter that this rank holds a slice of, by name."""
        return {p.name: p.shard.full_shape for p in self.parameters}

    def state_pieces(self) -> list[StatePiece]:
        """The masters and moments that this rank alone is to save; together, all ranks' pieces cover everything once.

        Of a tensor-parallel replica the first rank is the owner, of a tied embedding the first stage.
        """
        return [
            StatePiece(p.name, kind, p.shard, start, values)
            for p in self.parameters
            if self._owns(p)
            for kind, start, values in self._reduction.fragments(p.parameter)
        ]

    def load_state(self, source: StateSource, *, optimizer_steps: int | None) -> None:
        """Take weights from a checkpoint of any layout, and with ``optimizer_steps`` its moments too.

        Args:
            source: reads slices of saved tensors.
            optimizer_steps: updates that the moments have seen (AdamW's bias correction); None: weights only.
        """
        if optimizer_steps:
            self._reduction.create_moments(optimizer_steps)
        for p in self.parameters:
            local = source.read_local(p.name, "weight", p.shard)
            with torch.no_grad():
                p.parameter.copy_(local)
            for kind, start, values in self._reduction.fragments(p.parameter):
                if kind == "weight":
                    values.copy_(local.view(-1)[start : start + values.numel()])
                elif optimizer_steps:
                    values.copy_(source.read_flat(p.name, kind, p.shard, start, values.numel()))

    def _owns(self, p: DeclaredParameter) -> bool:
        if p.parameter is self.stage.second_tied_copy:
            return False
        return (p.shard.is_sharded or self.context.tp.index == 0) and self._reduction.owns_fragments

    def _mark_for_gradient_norm(self) -> None:
        """Tell DeepSpeed which parameters to count on every rank, once, or not at all in the global gradient norm."""
        for p in self.parameters:
            p.parameter.tensor_model_parallel = p.shard.is_sharded  # type: ignore[attr-defined]
            if p.parameter is self.stage.second_tied_copy:
                p.parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]


class StateSource(Protocol):
    """What :meth:`DeepSpeedEngine.load_state` needs of a checkpoint reader."""

    def read_local(self, name: str, kind: str, shard: ShardSpec) -> Tensor:
        """The local tensor that ``shard`` describes."""

    def read_flat(self, name: str, kind: str, shard: ShardSpec, flat_start: int, length: int) -> Tensor:
        """A run of the flattened local tensor."""


class _Reduction(ABC):
    """How gradients are accumulated and reduced, and where masters and moments live, for one (dtype, ZeRO stage)."""

    def __init__(self, owner: DeepSpeedEngine) -> None:
        self._owner = owner
        self._engine = owner._engine
        self._context = owner.context

    @property
    def owns_fragments(self) -> bool:
        """Whether this rank's fragments are its own among the data-parallel replicas."""
        return True

    @abstractmethod
    def backward(self, micro_batches: Sequence[MicroBatch]) -> PipelineResult:
        """Run the schedule and leave reduced gradients where :meth:`step` expects them."""

    def step(self) -> float:
        """Clip, update, and return the gradient norm before clipping."""
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        # DeepSpeed writes -1 for a norm that is not finite.
        return float(norm) if norm is not None and 0.0 <= float(norm) < float("inf") else float("nan")

    def fragments(self, parameter: nn.Parameter) -> Iterator[tuple[str, int, Tensor]]:
        """(kind, offset in the flattened local tensor, live fp32 values) of what this rank holds of a parameter."""
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return  # ZeRO gave all of this parameter to other replicas
        start = mapping.lp_fragment_address.start
        yield "weight", start, mapping.get_hp_fragment().detach().view(-1)
        # The moments are looked up in the optimizer itself: DeepSpeed links them to parameters after the step of the
        # first parameter group, when the others have none yet, and never again.
        optimizer = self._engine.optimizer.optimizer
        (flat,) = optimizer.param_groups[mapping.param_group_index]["params"]
        place = mapping.get_hp_fragment_address()
        for moment in MOMENTS:
            if moment in optimizer.state[flat]:
                yield moment, start, optimizer.state[flat][moment].view(-1).narrow(0, place.start, place.numel)

    def create_moments(self, optimizer_steps: int) -> None:
        """Make AdamW's state, which torch would make at the first step, so that it can be loaded into."""
        zero = self._engine.optimizer
        for group in zero.optimizer.param_groups:
            for flat in group["params"]:
                zero.optimizer.state[flat] = _adamw_state(flat, optimizer_steps)

    def _reduce_tied(self, gradient: Tensor | None) -> None:
        """Add the copies' gradients of a tied embedding over stages *and* replicas, and leave the replicas' mean.

        DeepSpeed's own mean over replicas then meets equal values, so both copies get the same bits and never drift.
        """
        if self._owner.stage.tied_weight is None:
            return
        assert gradient is not None, "both holders of a tied embedding have a gradient"
        self._context.tied.all_reduce(gradient)
        gradient.div_(self._context.data.size)


class _CoalescedZero1(_Reduction):
    """fp32 with ZeRO-1: gradients gather in ``grad`` over all micro-batches, DeepSpeed reduces once at the end."""

    def backward(self, micro_batches: Sequence[MicroBatch]) -> PipelineResult:
        with self._engine.coalesce_grad_reduction():
            result = self._owner.runner.train(micro_batches)
            tied = self._owner.stage.tied_weight
            self._reduce_tied(None if tied is None else tied.grad)
        return result


class _Bf16Zero1(_Reduction):
    """bf16 with ZeRO-1: after each backward the gradients are added to fp32 buffers, which are reduced at the end."""

    def backward(self, micro_batches: Sequence[MicroBatch]) -> PipelineResult:
        result = self._owner.runner.train(micro_batches, _AfterBackward(self._accumulate))
        tied = self._owner.stage.tied_weight
        self._reduce_tied(None if tied is None else tied._hp_grad)  # type: ignore[attr-defined]
        self._engine.buffered_allreduce_fallback()
        return result

    def _accumulate(self) -> None:
        self._engine.optimizer.update_hp_grads()
        for p in self._owner.parameters:
            p.parameter.grad = None


class _AfterBackward(PlainGradients):
    """Calls a function after each backward."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def after(self, stage: int, *, last: bool) -> None:
        self._function()


class _Fp32Zero0(_Reduction):
    """fp32 without ZeRO: plain AdamW on whole parameters.

    DeepSpeed's own clipping at stage 0 drops replicated parameters and counts tied ones twice under tensor or pipeline
    parallelism, so it is switched off and the norm is computed here.
    """

    @property
    def owns_fragments(self) -> bool:
        """Replicas hold the same; the first one saves."""
        return self._context.data.index == 0

    def backward(self, micro_batches: Sequence[MicroBatch]) -> PipelineResult:
        result = self._owner.runner.train(micro_batches)
        tied = self._owner.stage.tied_weight
        self._reduce_tied(None if tied is None else tied.grad)
        for p in self._owner.parameters:
            assert p.parameter.grad is not None
            self._context.data.all_reduce(p.parameter.grad).div_(self._context.data.size)
        return result

    def step(self) -> float:
        norm = self._global_norm()
        if self._owner._clip > 0.0:
            scale = (self._owner._clip / (norm + 1e-6)).clamp(max=1.0)
            for p in self._owner.parameters:
                assert p.parameter.grad is not None
                p.parameter.grad.mul_(scale)
        self._engine.optimizer.step()
        self._engine.optimizer.zero_grad()
        return float(norm) if bool(norm.isfinite()) else float("nan")

    def fragments(self, parameter: nn.Parameter) -> Iterator[tuple[str, int, Tensor]]:
        yield "weight", 0, parameter.detach().view(-1)
        state = self._engine.optimizer.state.get(parameter, {})
        for moment in MOMENTS:
            if moment in state:
                yield moment, 0, state[moment].view(-1)

    def create_moments(self, optimizer_steps: int) -> None:
        for p in self._owner.parameters:
            self._engine.optimizer.state[p.parameter] = _adamw_state(p.parameter, optimizer_steps)

    def _global_norm(self) -> Tensor:
        """Norm over every parameter of the model, each counted once."""
        squares = torch.zeros((), device=self._context.device)
        for p in self._owner.parameters:
            counted = p.shard.is_sharded or self._context.tp.index == 0
            if counted and p.parameter is not self._owner.stage.second_tied_copy:
                assert p.parameter.grad is not None
                squares += p.parameter.grad.norm().square()
        return self._context.model.all_reduce(squares).sqrt()


_REDUCTIONS: dict[tuple[str, int], type[_Reduction]] = {
    ("fp32", 0): _Fp32Zero0,
    ("fp32", 1): _CoalescedZero1,
    ("bf16", 1): _Bf16Zero1,
}
"""Proven combinations of (dtype, ZeRO stage); ``config.rules`` refuses every other before a rank starts."""


def _activation_shape(config: Config, context: ParallelContext) -> tuple[int, int, int]:
    """[B, S, H] of what passes between stages: this rank's share of each sequence."""
    shares = context.cp.size * (context.tp.size if config.parallel.sequence_parallel else 1)
    return config.train.micro_batch_size, config.model.sequence_length // shares, config.model.hidden_size


def _adamw_state(values: Tensor, steps: int) -> dict[str, Tensor]:
    moments = {moment: torch.zeros_like(values, dtype=torch.float32) for moment in MOMENTS}
    return {"step": torch.tensor(float(steps), dtype=torch.float32, device=values.device), **moments}


def _initialise(stage: GPT, parameters: list[DeclaredParameter], context: ParallelContext, config: Config) -> Any:
    """A DeepSpeed engine around this rank's parameters."""
    if context.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(context.device.index or 0))  # DeepSpeed insists on it
    # DeepSpeed 0.19.8 calls a collective by a name that torch 2.13 has deprecated; its users can do nothing about it.
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor. is deprecated", category=FutureWarning)
    with _silenced():
        import deepspeed

        # A C++ extension that DeepSpeed would compile at start on the CPU; gloo does its work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend())
        engine, *_ = deepspeed.initialize(
            model=stage,
            optimizer=make_adamw(parameters, config.optim),
            config=_deepspeed_config(config, context),
            mpu=_Mpu(context),
        )
    return engine


def _deepspeed_config(config: Config, context: ParallelContext) -> dict[str, Any]:
    """The only place where a DeepSpeed config is written; users never write one."""
    zero_stage = config.engine.zero_stage
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.global_batch_size // context.data.size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip_grad_norm if zero_stage else 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
    }
    if config.engine.dtype == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


class _Mpu:
    """The mesh as DeepSpeed asks for it: "model parallel" is tp × pp, "tensor model parallel" is tp."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._context.model.handle

    def get_model_parallel_rank(self) -> int:
        return self._context.model.index

    def get_model_parallel_world_size(self) -> int:
        return self._context.model.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._context.data.handle

    def get_data_parallel_rank(self) -> int:
        return self._context.data.index

    def get_data_parallel_world_size(self) -> int:
        return self._context.data.size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._context.tp.handle

    def get_tensor_model_parallel_rank(self) -> int:
        return self._context.tp.index

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._context.tp.size

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._context.pp.handle

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._context.pp.index

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._context.pp.size


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep DeepSpeed's start-up banners off the console; errors still raise, and still show."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
