"""A decoder-only Transformer (GPT, Radford et al. 2019) or an encoder (BERT, Devlin et al. 2019), whole or the stages
of it that one pipeline rank runs.

Shapes: B batch, S sequence (this rank's share under context parallelism), H hidden, V vocabulary, T tensor-parallel
degree. Between stages travels the activation, ``hidden``: [B, S, H], or [B, S/T, H] under sequence parallelism; and, if
the objective takes scalars from the blocks, ``carried``: their sums so far.

Every layout uses this one class with parts left out, so a parameter has the same name on all of them. A tied embedding
is present, under its one name, on the ranks of the first and of the last stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from megalm.config.rules.model import attention_dropout_violation
from megalm.config.schema import Config, Engine, Model
from megalm.core.attention.block_masks import WindowMasks
from megalm.core.attention.context_parallel import ContextParallel
from megalm.core.block import BLOCKS
from megalm.core.device_kind import device_kind
from megalm.core.embedding import VocabParallelEmbedding
from megalm.core.linear import hand_over_weight_gradients, postpone_weight_gradients
from megalm.core.loss import token_scores
from megalm.core.parameters import DeclaredTensor, declared_tensors
from megalm.core.pipeline.p2p import Tensors, TensorSpec
from megalm.core.pipeline.schedule import splits_backward
from megalm.core.place import Place
from megalm.core.position import RotaryPosition
from megalm.core.random import initialise
from megalm.core.recompute import Recompute
from megalm.core.tensor_parallel import TensorParallel
from megalm.core.weight_gradients import WeightGradients
from megalm.errors import ConfigError
from megalm.mesh.groups import ParallelContext
from megalm.models.balance import split_layers
from megalm.models.embedding import InputEmbedding
from megalm.models.head import OutputHead
from megalm.models.learning import Learning
from megalm.models.micro_batch import MicroBatch
from megalm.models.output import Output

PartOfModel = TypeVar("PartOfModel", bound=nn.Module)


@dataclass(frozen=True)
class Part:
    """The stages that one pipeline rank runs.

    Attributes:
        stages: number of a stage ▶ its blocks, by their numbers in the whole model.
        num_stages: stages of the whole pipeline.
    """

    stages: dict[int, range]
    num_stages: int

    @property
    def has_first(self) -> bool:
        """Whether tokens are embedded here."""
        return 0 in self.stages

    @property
    def has_last(self) -> bool:
        """Whether logits and loss are computed here."""
        return self.num_stages - 1 in self.stages


class Transformer(nn.Module):
    """The embedding, blocks and head of the stages that a rank runs.

    Args:
        model: architecture.
        vocab_size: true vocabulary, without padding.
        part: which stages these are.
        tensor_parallel: how weights and activations are split over tensor-parallel ranks.
        context_parallel: how sequences are split over context-parallel ranks.
        engine: recomputation, and chunking of the loss.
        objective: what is learnt; None: nothing, the model gives logits alone.
        seed: of dropout masks.
        device: where parameters are made.

    Attributes:
        before_use: called with each of the parts of :meth:`parts` before it computes, by who may still be fetching its
            parameters.
    """

    def __init__(
        self,
        model: Model,
        vocab_size: int,
        *,
        part: Part,
        tensor_parallel: TensorParallel,
        context_parallel: ContextParallel,
        engine: Engine,
        objective: Learning | None,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.part, self.tensor_parallel, self.context_parallel = part, tensor_parallel, context_parallel
        self.tied, self.hidden_size = model.tie_embeddings, model.hidden_size
        self.recompute = Recompute(engine.recompute, engine.recompute_every)
        self.loss_chunk_tokens, self.objective = engine.loss_chunk_tokens, objective
        self.compiles_loss = engine.compiles
        self.fused_attention, self._window_masks = engine.attention == "fused", WindowMasks()
        self._windows = {window for window in model.attention_windows if window}
        self._causal = model.causal
        self.weight_gradients: WeightGradients | None = None
        self.before_use: Callable[[nn.Module], None] = _is_there
        rotary = RotaryPosition(model, device=device) if model.position == "rotary" else None
        with device:
            self.input = self.output = None
            if part.has_first:
                self.input = InputEmbedding(model, vocab_size, tensor_parallel=tensor_parallel, seed=seed)
            self.blocks = nn.ModuleDict(
                {
                    str(layer): BLOCKS[model.residual](
                        model,
                        layer,
                        tensor_parallel=tensor_parallel,
                        context_parallel=context_parallel,
                        rotary=rotary,
                        seed=seed,
                        recompute_core=self.recompute.core(index),
                        fused_attention=self.fused_attention,
                    )
                    for layers in part.stages.values()
                    for index, layer in enumerate(layers)
                }
            )
            if part.has_last:
                self.output = OutputHead(
                    model,
                    vocab_size,
                    tensor_parallel=tensor_parallel,
                    holds_words=not (self.tied and part.has_first),
                    heads={} if objective is None else objective.make_heads(model, tensor_parallel=tensor_parallel),
                )

    def forward(self, tokens: Tensor, place: Place | None = None) -> Tensor:
        """Token ids [B, S] ▶ logits [B, S, V]; for a part that is the whole model on one rank."""
        x = None
        for stage in self.part.stages:
            x = self.through(stage, tokens, x, place)
        assert x is not None, "a rank runs a stage"
        return self.logits(x)

    def through(self, stage: int, tokens: Tensor, received: Tensor | None, place: Place | None = None) -> Tensor:
        """The blocks of one of this rank's stages, for passes without a loss.

        Args:
            stage: number of the stage in the whole pipeline.
            tokens: ids, [B, S].
            received: what the stage before gave, [B, S, H]; None on the first one, which reads the tokens.
            place: positions, and keys and values of earlier tokens.

        Returns:
            The last block's output, [B, S, H].
        """
        x, _ = self._blocks(stage, received, None, MicroBatch(tokens, tokens, tokens, place))
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The last block's output [B, S, H] ▶ logits of all words on every tensor-parallel rank, [B, S, V]."""
        assert self.output is not None, "only the last stage computes logits"
        return self.output_embedding.whole_logits(self._ready(self.output)(x), self.output.bias)

    def token_scores(self, x: Tensor, labels: Tensor) -> Tensor:
        """How likely tokens are; see :func:`megalm.core.loss.token_scores`.

        Args:
            x: the last block's output where each is predicted, [M, H].
            labels: the tokens, [M].

        Returns:
            [M, 2] fp64: log-probability, and 1 where the token is the likeliest.
        """
        assert self.output is not None, "only the last stage computes logits"
        hidden = self._ready(self.output)(x.unsqueeze(0))
        return token_scores(
            hidden,
            self.output_embedding,
            labels.unsqueeze(0),
            chunk_tokens=self.loss_chunk_tokens,
            bias=self.output.bias,
        )

    def between_stages(self, micro_batch_size: int, sequence_length: int) -> dict[str, TensorSpec]:
        """What travels between stages, by name; see the module.

        Args:
            micro_batch_size: B.
            sequence_length: of whole sequences.
        """
        weight = next(self.parameters())
        shares = self.context_parallel.group.size
        shares *= self.tensor_parallel.group.size if self.tensor_parallel.splits_sequence else 1
        specs = {"hidden": TensorSpec((micro_batch_size, sequence_length // shares, self.hidden_size), weight.dtype)}
        if self._carried:
            specs["carried"] = TensorSpec((len(self._carried),), torch.float32)
        return specs

    def run(self, stage: int, received: Tensors | None, micro_batch: MicroBatch) -> Tensors:
        """One stage as the pipeline runner calls it.

        Args:
            stage: number of the stage in the whole pipeline.
            received: what the stage before returned; None on the first stage.
            micro_batch: this micro-batch's tokens, labels and places.

        Returns:
            What :meth:`between_stages` declares. On the last stage scalars: in training the terms of the objective, in
            evaluation its measures.
        """
        received = received or {}
        x, carried = self._blocks(stage, received.get("hidden"), received.get("carried"), micro_batch)
        if stage == self.part.num_stages - 1:
            return self._objective_of(x, carried, micro_batch)
        return {"hidden": x} if carried is None else {"hidden": x, "carried": carried}

    def tensors(self) -> list[DeclaredTensor]:
        """Every parameter and saved buffer of this rank, under the names that checkpoints have them under."""
        return list(self._tensors())

    def parts(self) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """What is computed at a time, in the order of a forward pass, and the parameters that it takes."""
        if self.input is not None:
            yield self.input, list(self.input.parameters())
        for block in self.blocks.values():
            yield block, list(block.parameters())
        if self.output is not None:
            yield self.output, [*self.output.parameters(), *self.output_embedding.parameters()]

    @property
    def output_embedding(self) -> VocabParallelEmbedding:
        """The rows that logits are computed with."""
        assert self.output is not None, "only the last stage computes logits"
        if self.output.words is not None:
            return self.output.words
        assert self.input is not None
        return self.input.embedding

    def _tensors(self) -> Iterator[DeclaredTensor]:
        """With the stage whose backward completes a gradient: of tied rows on one rank that is the first one."""
        last = self.part.num_stages - 1
        copies = (0, last) if self.tied and self.part.has_first != self.part.has_last else ()
        if self.input is not None:
            yield from _at_stage(0, declared_tensors(self.input), copies)
        for stage, layers in self.part.stages.items():
            for layer in layers:
                yield from _at_stage(stage, declared_tensors(self.blocks[str(layer)], f"blocks.{layer}."))
        if self.output is not None:
            yield from _at_stage(last, declared_tensors(self.output), copies)

    def _ready(self, part: PartOfModel) -> PartOfModel:
        """A part whose parameters are there."""
        self.before_use(part)
        return part

    def _blocks(
        self, stage: int, hidden: Tensor | None, carried: Tensor | None, micro_batch: MicroBatch
    ) -> tuple[Tensor, Tensor | None]:
        """What the stage before gave ▶ the same after this stage's blocks."""
        place = self._place(micro_batch)
        if hidden is None:
            assert self.input is not None
            hidden = self._ready(self.input)(micro_batch, place)
        x = hidden
        place = self._with_window_masks(place, x)
        for index, layer in enumerate(self.part.stages[stage]):
            x = self.recompute.run(index, self._ready(self.blocks[str(layer)]), x, place)
            if self.objective is not None and self._carried:
                found = self.objective.from_block(layer, x, micro_batch, tensor_parallel=self.tensor_parallel)
                added = torch.stack([found[name] for name in self._carried])
                carried = added if carried is None else carried + added
        return x, carried

    def _objective_of(self, x: Tensor, carried: Tensor | None, micro_batch: MicroBatch) -> Tensors:
        """The last block's output, [B, S, H] or [B, S/T, H] ▶ the objective's terms or measures."""
        assert self.objective is not None, "a model that was built without an objective gives logits alone"
        assert self.output is not None
        output = Output(
            hidden=self._ready(self.output)(x),
            positions=self.tensor_parallel.own_tokens(self._place(micro_batch).positions),
            embedding=self.output_embedding,
            bias=self.output.bias,
            chunk_tokens=self.loss_chunk_tokens,
            compiles=self.compiles_loss,
            context_parallel=self.context_parallel,
            heads=dict(self.output.heads),
            carried={} if carried is None else dict(zip(self._carried, carried.unbind(), strict=True)),
        )
        return (self.objective.loss if self.training else self.objective.measure)(output, micro_batch)

    def _with_window_masks(self, place: Place, x: Tensor) -> Place:
        """With what attention of windows needs on GPUs, made outside of blocks, which may be compiled.

        Documents have masks of their own. A ring computes windows tile by tile.
        """
        is_ring = self.context_parallel.method == "ring" and self.context_parallel.group.size > 1
        if not self.fused_attention or not self._windows or place.memory or place.documents or is_ring:
            return place
        if device_kind(x) == "cpu":  # flex attention has no backward there
            return place
        length = place.positions.shape[-1] * self.context_parallel.group.size
        masks = {
            window: self._window_masks.of(length, causal=self._causal, window=window, device=x.device)
            for window in self._windows
        }
        return replace(place, window_masks=masks)

    @property
    def _carried(self) -> tuple[str, ...]:
        """Names of the elements of ``carried``."""
        return () if self.objective is None else self.objective.carried

    @staticmethod
    def _place(micro_batch: MicroBatch) -> Place:
        tokens = micro_batch.tokens
        return micro_batch.place or Place.from_start(tokens.shape[1], tokens.device)


def _is_there(_: nn.Module) -> None:
    """Nobody is fetching parameters."""


def _at_stage(stage: int, tensors: list[DeclaredTensor], copies: tuple[int, ...] = ()) -> Iterator[DeclaredTensor]:
    """Tensors of a stage; ``copies`` are the stages that hold the word embedding."""
    for declared in tensors:
        tied = copies if declared.name == "embedding.weight" else ()
        yield replace(declared, record=replace(declared.record, stage=stage, copies=tied))


def build_transformer(
    config: Config,
    vocab_size: int,
    *,
    context: ParallelContext,
    dtype: torch.dtype,
    objective: Learning,
    with_values: bool = True,
) -> Transformer:
    """This rank's part of the model with its initial weights, in ``dtype`` on the context's device.

    ``with_values=False`` leaves the weights zero, for a checkpoint that fills all of them.

    Raises:
        ConfigError: attention dropout needs more memory than GPUs have, which these ranks compute on.
    """
    if context.transport == "nccl" and (violation := attention_dropout_violation(config)) is not None:
        raise ConfigError([str(violation)])
    layers = split_layers(config, vocab_size)
    model = Transformer(
        config.model,
        vocab_size,
        part=Part({stage: layers[stage] for stage in context.stages}, context.topology.num_stages),
        tensor_parallel=TensorParallel(
            context.tp_group, config.parallel.sequence_parallel, config.parallel.tp_overlap_parts
        ),
        context_parallel=ContextParallel(context.cp_group, config.parallel.cp_attention),
        engine=config.engine,
        objective=objective,
        seed=config.run.seed,
        device=context.device,
    ).to(dtype)
    if with_values:
        initialise(model.tensors(), config.run.seed)
    fuses = config.engine.gradient_accumulation_fusion
    if fuses or splits_backward(config.parallel.schedule):
        model.weight_gradients = WeightGradients()
        hand_over = hand_over_weight_gradients if fuses else postpone_weight_gradients
        hand_over(model if fuses else model.blocks, model.weight_gradients)
    if config.engine.compiles:
        # Blocks that differ in their weights alone share one compiled graph.
        for block in model.blocks.values():
            block.compile(dynamic=False)
    return model


def without_training(
    trained: Transformer, config: Config, vocab_size: int, *, context: ParallelContext, objective: Learning
) -> Transformer:
    """A model that shares every parameter with one that is being trained, and computes whole sequences without a loss.

    It knows neither the split of sequences (sequence and context parallelism) nor recomputation, and it may be asked
    between any two steps: what a step changes it has, too.

    Args:
        trained: this rank's part, whose parameters are whole between steps (ZeRO stages 0 to 2).
        config: of the run.
        vocab_size: as ``trained`` was built with.
        context: as ``trained`` was built with.
        objective: as ``trained`` was built with.
    """
    view = Transformer(
        config.model,
        vocab_size,
        part=trained.part,
        tensor_parallel=TensorParallel(context.tp_group),
        context_parallel=ContextParallel(),
        engine=replace(config.engine, recompute="none"),
        objective=objective,
        seed=config.run.seed,
        device=torch.device("meta"),
    ).eval()
    for shared, own in zip(view.modules(), trained.modules(), strict=True):
        assert type(shared) is type(own), "both are built from one config"
        shared._parameters.update(own._parameters)
        shared._buffers.update(own._buffers)
        vars(shared).update({name: value for name, value in vars(own).items() if isinstance(value, Tensor)})
    view.before_use = lambda _: trained.before_use(trained)
    return view


def build_full_model(
    model: Model,
    vocab_size: int,
    *,
    objective: Learning | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Transformer:
    """The whole model in one process: ``model(tokens)`` gives logits [B, S, V].

    The vocabulary has no padding, so that each tensor is the full one. With an objective, ``model.run(0, None,
    micro_batch)`` gives its terms, or its measures, too.
    """
    whole = Transformer(
        replace(model, vocab_pad_multiple=1),
        vocab_size,
        part=Part({0: range(model.num_layers)}, 1),
        tensor_parallel=TensorParallel(),
        context_parallel=ContextParallel(),
        engine=Engine(),
        objective=objective,
        seed=seed,
        device=torch.device(device),
    ).to(dtype)
    initialise(whole.tensors(), seed)
    return whole
