"""What decides which sample is which, and since when. No torch.

A run may change its data on purpose (another blend for the last tenth, a longer sequence length): each such stretch is
a *phase*. Within a phase nothing that decides the order may change, and a checkpoint that says otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from megalm.config.schema import Data
from megalm.data.stream.blocks import Blocks
from megalm.data.stream.order import BlendedOrder, derive_key, samples_of_each
from megalm.data.stream.sequences import Corpora
from megalm.errors import DataError

STATE_VERSION = 2
_EACH = "sequences per example"


@dataclass(frozen=True)
class Phase:
    """A stretch of a run that reads one order.

    Attributes:
        number: ``data.phase``.
        start: samples that the run had taken when it began.
        fingerprint: what decides the order, by the names that a user sets.
    """

    number: int
    start: int
    fingerprint: dict[str, Any]

    @property
    def sequence_length(self) -> int:
        """Tokens of each of its samples."""
        return int(self.fingerprint["model.sequence_length"])

    def samples_by_contents(self, samples: int) -> Iterator[tuple[str, int]]:
        """(fingerprint of a dataset's contents, how many of the first ``samples`` samples are of it)."""
        quotas, lanes = self.fingerprint["data.weights"], self.fingerprint["data.lanes"]
        each = self.fingerprint.get(_EACH, 1)
        for number, count in enumerate(samples_of_each(quotas, lanes, samples // each)):
            yield self.fingerprint[f"data.path[{number}]"], count * each


@dataclass(frozen=True)
class DataState:
    """Everything that the data of a run remembers.

    Attributes:
        consumed_samples: samples that the trainer has taken, over all replicas.
        phases: of the run so far; the last one goes on.
    """

    consumed_samples: int
    phases: tuple[Phase, ...]

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint stores it."""
        return {"version": STATE_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> DataState:
        """What a checkpoint stores.

        Raises:
            DataError: another version of megalm wrote it.
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(
                f"the checkpoint's position in the data has version {state.get('version')}; this megalm reads version "
                f"{STATE_VERSION}: start a new run from its weights with checkpoint.init_from"
            )
        return cls(int(state["consumed_samples"]), tuple(Phase(**phase) for phase in state["phases"]))

    @property
    def current(self) -> Phase:
        """The phase that goes on."""
        return self.phases[-1]

    @property
    def consumed_tokens(self) -> int:
        """Tokens of the samples consumed, each counted at the length that it had."""
        return sum(samples * phase.sequence_length for phase, samples in self.samples_of_phases())

    def samples_of_phases(self) -> Iterator[tuple[Phase, int]]:
        """Each phase and the samples that were taken in it."""
        ends = [*(phase.start for phase in self.phases[1:]), self.consumed_samples]
        for phase, end in zip(self.phases, ends, strict=False):  # of no phase there are none
            yield phase, end - phase.start

    def epochs_of(self, contents: str, sequences: Callable[[int], int]) -> Fraction:
        """How often a dataset has been read in all phases so far, found by its contents: paths may have changed.

        Args:
            contents: fingerprint of the dataset's training split.
            sequences: sequence length ▶ sequences of that length in the dataset.
        """
        return sum(
            (
                Fraction(count, sequences(phase.sequence_length))
                for phase, samples in self.samples_of_phases()
                for found, count in phase.samples_by_contents(samples)
                if contents and found == contents
            ),
            Fraction(),
        )

    def continued(self, number: int, fingerprint: dict[str, Any]) -> DataState:
        """The state of a run that goes on with these data: in the same phase, or in a new one from here on.

        Raises:
            DataError: within a phase something differs, so the samples would be others; every difference is named.
        """
        last = self.current
        if number > last.number:
            return DataState(self.consumed_samples, (*self.phases, Phase(number, self.consumed_samples, fingerprint)))
        if number < last.number:
            raise DataError(
                f"data.phase={number}: the checkpoint is in phase {last.number} already; data.phase={last.number} goes "
                f"on with it, data.phase={last.number + 1} begins another"
            )
        changed = _differences(fingerprint, last.fingerprint)
        if changed:
            remedy = (
                f"resume with the same data; data.phase={number + 1} begins a new phase with these; or start a new run "
                "from these weights with checkpoint.init_from"
            )
            raise DataError("\n".join([*changed, remedy]))
        return self


def new_state(number: int, fingerprint: dict[str, Any]) -> DataState:
    """The state of a run that has read nothing."""
    return DataState(0, (Phase(number, 0, fingerprint),))


def order_of(corpora: Corpora, settings: Data, seed: int) -> BlendedOrder:
    """The order of a phase; a new phase does not begin with the samples that the first began with.

    Raises:
        DataError: a weight is too small.
    """
    phase_seed = seed if settings.phase == 0 else int(derive_key(seed, settings.phase)[0] >> 1)
    try:
        return BlendedOrder.of(
            corpora.sizes,
            settings.weights,
            seed=phase_seed,
            **asdict(Blocks.of(settings)),
        )
    except ValueError as error:
        raise DataError(f"data.weights: {error}") from None


def fingerprint_of(corpora: Corpora, order: BlendedOrder, settings: Data, seed: int) -> dict[str, Any]:
    """What decides the order of a phase, by the names that a user sets; paths are not in it, contents are."""
    return {
        **{f"data.path[{n}]": shards.index.fingerprint for n, shards in enumerate(corpora.shards)},
        "data.weights": list(order.quotas),
        "model.sequence_length": corpora.sequence_length,
        "run.seed": seed,
        **{f"data.{name}": value for name, value in asdict(Blocks.of(settings)).items()},
        # Left out where it is 1, as in checkpoints that were written before it could be anything else.
        **({_EACH: corpora.sequences_per_example} if corpora.sequences_per_example > 1 else {}),
    }


def too_many_epochs(
    order: BlendedOrder, paths: Sequence[str], limits: Sequence[float], samples: int, before: Sequence[Fraction] = ()
) -> list[str]:
    """For each corpus that a run reads more often than its limit (0: none), what is wrong.

    Args:
        order: of the phase that is to be read.
        paths: of the corpora, for messages.
        limits: how often each may be read.
        samples: what the phase has had when the run ends, counted as the order counts.
        before: how often each corpus was read in earlier phases; empty: never.
    """
    problems = []
    earlier = before or [Fraction()] * len(paths)
    for path, limit, epochs, past in zip(paths, limits, order.epochs_after(samples), earlier, strict=False):
        if limit and past + epochs > limit:
            smaller = ", give it a smaller weight," if len(paths) > 1 else ""
            again = f" ({float(past):.2f} of them in earlier phases)" if past else ""
            problems.append(
                f"data.max_epochs: the run reads {path} {float(past + epochs):.2f} times{again}, the limit is "
                f"{limit:g}; train for fewer steps{smaller} or raise the limit"
            )
    return problems


def _differences(mine: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    lines = []
    for name in dict.fromkeys([*mine, *saved]):
        if mine.get(name) != saved.get(name):
            lines.append(
                f"{name}={_spoken(mine.get(name))}: the checkpoint was trained with {_spoken(saved.get(name))}"
            )
    return lines


def _spoken(value: Any) -> str:
    if value is None:
        return "nothing"
    text = str(value)
    return f"contents {text[:12]}…" if isinstance(value, str) and len(text) > 24 else text
