"""Three objectives that megalm does not ship, each a kind of its own, and their mathematics in plain PyTorch.

They use what an objective may use and nothing else: no part of megalm knows of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalm.config.schema import Model
from megalm.config.schema import Objective as Settings
from megalm.core.collectives import reduce_from_group
from megalm.core.parameters import Init, ParallelModule
from megalm.core.tensor_parallel import TensorParallel
from megalm.data.stream.batch import Batch, Ints, Rows
from megalm.mesh.slices import ShardSpec
from megalm.models.micro_batch import MicroBatch
from megalm.models.output import Output
from megalm.objectives.base import Objective
from megalm.objectives.clm import CausalLM, next_tokens
from megalm.verify.parity import Task, token_terms

ACTIVATION_WEIGHT = 0.3


class CalmActivations(CausalLM):
    """Next tokens, and a penalty on the mean square of what every block puts out."""

    carried: ClassVar[tuple[str, ...]] = ("activation",)

    @property
    def terms(self) -> tuple[str, ...]:
        return (*super().terms, "activation")

    def from_block(
        self, layer: int, x: Tensor, micro_batch: MicroBatch, *, tensor_parallel: TensorParallel
    ) -> Mapping[str, Tensor]:
        weight = tensor_parallel.own_tokens(micro_batch.loss_weight.T).T  # [B, S] ▶ [B, S/T]
        own = ACTIVATION_WEIGHT * (x.float().square().mean(dim=-1) * weight).sum()
        return {"activation": reduce_from_group(own, tensor_parallel.group) if tensor_parallel.splits_sequence else own}

    def loss(self, output: Output, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        values = output.cross_entropy(micro_batch.labels, micro_batch.loss_weight, z_loss=self.settings.z_loss)
        return {**dict(zip(super().terms, values.unbind(), strict=True)), **output.carried}


def calm_activations() -> Task:
    return Task(CalmActivations(Settings(z_loss=1e-2)), next_tokens, _calm_terms)


def _calm_terms(model, batch, place, settings) -> dict[str, Tensor]:
    outputs: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *args: outputs.append(args[2])) for block in model.blocks.values()]
    terms = token_terms(model, batch, place, settings)
    for handle in handles:
        handle.remove()
    mask = torch.from_numpy(batch.loss_mask).double()
    penalty = sum((x.float().square().mean(-1) * mask).sum() for x in outputs) / mask.sum()
    return {**terms, "activation": ACTIVATION_WEIGHT * penalty}


class ScoreHead(ParallelModule):
    """One number per hidden vector; every tensor-parallel rank has all of it."""

    def __init__(self, hidden_size: int, std: float) -> None:
        super().__init__()
        self.weight = self.declare("weight", ShardSpec.replicated(1, hidden_size), Init.normal(std))
        self.bias = self.declare("bias", ShardSpec.replicated(1), Init.constant(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H] ▶ [B]."""
        return F.linear(x, self.weight, self.bias).squeeze(1)


class Score(Objective):
    """A number per sequence, read off its last real token: squared error, as a reward model's or a regression's."""

    unit: ClassVar[str] = "sequence"
    measures: ClassVar[tuple[str, ...]] = ("loss", "absolute_error")

    def make_batch(self, tokenizer, seed):
        return scored_rows

    def make_heads(self, model: Model, *, tensor_parallel: TensorParallel) -> Mapping[str, nn.Module]:
        return {"score": ScoreHead(model.hidden_size, 0.2)}

    def head_parameters(self, model: Model) -> int:
        return model.hidden_size + 1

    def loss(self, output: Output, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        return {"loss": (self._error(output, micro_batch).square() * micro_batch.loss_weight).sum()}

    def measure(self, output: Output, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        error, weight = self._error(output, micro_batch).double(), micro_batch.loss_weight
        return {"loss": (error.square() * weight).sum(), "absolute_error": (error.abs() * weight).sum()}

    def _error(self, output: Output, micro_batch: MicroBatch) -> Tensor:
        score = output.heads["score"](output.hidden_at(micro_batch.row_inputs["last"])).float()
        return score - micro_batch.row_inputs["target"]


def scored_rows(rows: Rows, samples: Ints) -> Batch:
    """The target is the share of even tokens; one sequence in five carries no loss."""
    batch = next_tokens(rows, samples)
    inside = np.arange(batch.tokens.shape[1]) < rows.valid[:, None]
    target = ((batch.tokens % 2 == 0) & inside).sum(axis=1) / rows.valid
    return Batch(
        batch.tokens,
        batch.labels,
        (samples % 5 != 0).astype(np.float32),
        samples,
        row_inputs={"last": rows.valid - 1, "target": target.astype(np.float32)},
    )


def score() -> Task:
    return Task(Score(Settings()), scored_rows, _score_terms)


def _score_terms(model, batch, place, settings) -> dict[str, Tensor]:
    del settings
    last = torch.from_numpy(batch.row_inputs["last"])
    found = model.output.heads["score"](_last_hidden(model, batch, place)[torch.arange(len(last)), last]).float()
    mask = torch.from_numpy(batch.loss_mask).double()
    return {"loss": ((found - torch.from_numpy(batch.row_inputs["target"])).square() * mask).sum() / mask.sum()}


def _last_hidden(model, batch, place) -> Tensor:
    """[B, S, H] after the final norm."""
    seen: list[Tensor] = []
    handle = model.output.final_norm.register_forward_hook(lambda *args: seen.append(args[2]))
    model(torch.from_numpy(batch.tokens), place)
    handle.remove()
    return seen[0]


class Preference(Objective):
    """Of two neighbouring rows the first is preferred (Bradley and Terry 1952), by the rows' log-probabilities."""

    unit: ClassVar[str] = "pair"
    sequences_per_example: ClassVar[int] = 2
    measures: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    @property
    def terms(self) -> tuple[str, ...]:
        return ("loss", "margin")

    def make_batch(self, tokenizer, seed):
        return pairs_of_rows

    def loss(self, output: Output, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        margin, weight = self._margin(output, micro_batch), micro_batch.loss_weight[::2]
        return {"loss": -(F.logsigmoid(margin) * weight).sum(), "margin": (margin.detach() * weight).sum()}

    def measure(self, output: Output, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        margin, weight = self._margin(output, micro_batch).double(), micro_batch.loss_weight[::2]
        return {"loss": -(F.logsigmoid(margin) * weight).sum(), "accuracy": ((margin > 0) * weight).sum().double()}

    def _margin(self, output: Output, micro_batch: MicroBatch) -> Tensor:
        """[B / 2]."""
        rows = output.sequence_log_probabilities(micro_batch.labels, micro_batch.token_inputs["completion"])
        chosen, rejected = rows.view(-1, 2).unbind(1)
        return chosen - rejected


def pairs_of_rows(rows: Rows, samples: Ints) -> Batch:
    """The mask of the rows says what of them is a completion; one pair in three carries no loss."""
    batch = next_tokens(rows, samples)
    counts = ((samples % 2 == 0) & (samples // 2 % 3 != 0)).astype(np.float32)
    return Batch(batch.tokens, batch.labels, counts, samples, token_inputs={"completion": batch.loss_mask})


def preference() -> Task:
    return Task(Preference(Settings()), pairs_of_rows, _preference_terms)


def _preference_terms(model, batch, place, settings) -> dict[str, Tensor]:
    del settings
    logits, labels = model(torch.from_numpy(batch.tokens), place).float(), torch.from_numpy(batch.labels)
    completion = torch.from_numpy(batch.token_inputs["completion"])
    rows = -(F.cross_entropy(logits.mT, labels, reduction="none") * completion).sum(dim=1)
    margin, mask = rows[::2] - rows[1::2], torch.from_numpy(batch.loss_mask[::2]).double()
    pairs = mask.sum()
    return {
        "loss": -(F.logsigmoid(margin) * mask).sum() / pairs,
        "margin": (margin.detach() * mask).sum() / pairs,
    }


TASKS = {"calm": calm_activations, "score": score, "preference": preference}
