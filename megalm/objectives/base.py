"""What an objective is.

An objective says everything about what is learnt, in one class, and nothing else knows which objective a run has. In
the order in which a step uses them:

1. :meth:`Objective.make_batch`: rows of tokens ▶ a batch, in the loader's thread (NumPy, no torch);
2. :meth:`Objective.make_heads`: layers on the last pipeline stage besides the model's own;
3. :meth:`Objective.from_block`: scalars from inside the blocks, which travel from stage to stage;
4. :meth:`Objective.loss`: the terms that are minimised, by name, on the last stage;
5. :meth:`Objective.measure`, :meth:`Objective.counts`, :meth:`Objective.scores`: what validation reports.

This module imports no torch, so an objective that leaves its mathematics to :class:`megalm.models.output.Output`, as
``clm``, ``mlm`` and ``sft`` do, is known to checks that run before torch is loaded.

Shapes: B rows, S sequence length, H hidden, V vocabulary, T tensor-parallel degree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from megalm.config.schema import Model
from megalm.config.schema import Objective as Settings
from megalm.data.stream.batch import Batch, MakeBatch
from megalm.data.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megalm.core.tensor_parallel import TensorParallel
    from megalm.models.micro_batch import MicroBatch
    from megalm.models.output import Output


class Objective(ABC):
    """What a run learns; see the module. Instances hold settings and no state.

    The loss of a step is a mean over *units* (tokens, sequences, pairs) of the global batch. ``Batch.loss_mask`` says
    which units count; ``MicroBatch.loss_weight`` is that mask times the normalisation, so that an objective adds up
    ``loss_weight · loss`` over its micro-batch and is right on every layout. See ``engine/global_mean.py``.

    Attributes:
        settings: the config's ``objective`` group.
        unit: what the loss is a mean over; ``metrics.jsonl`` counts them as ``loss_{unit}s`` and ``val_{unit}s``.
        sequences_per_example: stored sequences that belong together, such as 2 for a pair; they are read as neighbours
            and are never parted by shuffling, replicas or micro-batches.
        carried: names of the scalars that :meth:`from_block` gives.
        measures: names of the sums that :meth:`measure` gives.
    """

    unit: ClassVar[str] = "token"
    sequences_per_example: ClassVar[int] = 1
    carried: ClassVar[tuple[str, ...]] = ()
    measures: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that :meth:`loss` gives, ``loss`` first, the value that a run reports as its loss."""
        return ("loss",)

    @abstractmethod
    def make_batch(self, tokenizer: Tokenizer, seed: int) -> MakeBatch:
        """The function that makes a batch of rows.

        Args:
            tokenizer: the one that made the rows.
            seed: of the run, for what is drawn at random.

        Raises:
            DataError: the tokenizer has not the tokens that the objective needs.
        """

    def make_heads(self, model: Model, *, tensor_parallel: TensorParallel) -> Mapping[str, nn.Module]:  # noqa: ARG002
        """Layers that the last stage has besides the model's own, by name, with declared parameters; most have none."""
        return {}

    def head_parameters(self, model: Model) -> int:  # noqa: ARG002
        """Elements of the parameters of :meth:`make_heads`, all tensor-parallel ranks together."""
        return 0

    def from_block(
        self, layer: int, x: Tensor, micro_batch: MicroBatch, *, tensor_parallel: TensorParallel
    ) -> Mapping[str, Tensor]:
        """Scalars of a block's output, by the names in ``carried``; blocks' scalars of a name are added.

        Called for objectives that carry something, on every tensor-parallel rank.

        Args:
            layer: number of the block.
            x: its output, [B, S, H], or [B, S/T, H] under sequence parallelism.
            micro_batch: weights of the losses, among others.
            tensor_parallel: which tokens of the micro-batch ``x`` has.

        Returns:
            fp32 scalars, the same on every tensor-parallel rank; those of context-parallel ranks are added.
        """
        raise NotImplementedError(f"{type(self).__name__} carries nothing")

    @abstractmethod
    def loss(self, output: Output, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        """The terms of a micro-batch, whose sum is minimised.

        Returns:
            Scalars by the names in :attr:`terms`, weighted by ``micro_batch.loss_weight``, the same on every
            tensor-parallel rank. Those of all micro-batches and replicas are added. A term without a gradient is
            reported and not minimised.
        """

    @abstractmethod
    def measure(self, output: Output, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        """What validation adds up over a split.

        Returns:
            fp64 scalars by the names in :attr:`measures`, weighted by ``micro_batch.loss_weight``, which here is the
            mask alone. The mean of ``loss`` is the validation loss.
        """

    def num_counts(self, vocab_size: int) -> int:  # noqa: ARG002
        """Elements of :meth:`counts`."""
        return 1

    def counts(self, batch: Batch, vocab_size: int) -> NDArray[np.float64]:  # noqa: ARG002
        """What validation counts in a batch before the model sees it; its sum is the number of units."""
        return np.array([batch.loss_mask.sum(dtype=np.float64)])

    def scores(self, sums: Mapping[str, float], counts: NDArray[np.float64]) -> dict[str, float | int | None]:
        """What validation reports, by the names of ``metrics.jsonl``: here the mean of each measure.

        Args:
            sums: of :meth:`measure`, over the whole split.
            counts: of :meth:`counts`, over the whole split.

        Returns:
            ``val_{measure}`` and ``val_{unit}s``; means of no unit are None.
        """
        units = float(counts.sum())
        means = {f"val_{name}": sums[name] / units if units else None for name in self.measures}
        return {**means, f"val_{self.unit}s": round(units)}
