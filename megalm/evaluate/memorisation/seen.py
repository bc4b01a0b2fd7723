"""What a checkpoint's weights have read: data and ledger of its run, checked before a rank starts. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.schema import Config
from megalm.data.shards.dataset import check_folder, open_datasets, with_validation
from megalm.data.shards.tokens import SplitTokens
from megalm.data.stream.ledger import Ledger
from megalm.data.stream.phases import DataState
from megalm.errors import DataError
from megalm.runs.find import FoundModel
from megalm.runs.ledger import corpora_of_run, ledger_of_checkpoint, steps_of_run


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        train: the training splits of its datasets, in order.
        held_out: the validation splits of those that have one.
        ledger: of what the checkpoint has read.
        samples: sequences that it has read.
        sequence_length: tokens of each.
    """

    train: tuple[SplitTokens, ...]
    held_out: tuple[SplitTokens, ...]
    ledger: Ledger
    samples: int
    sequence_length: int

    @property
    def fingerprints(self) -> list[str]:
        """Of the contents of all splits."""
        return [split.index.fingerprint for split in (*self.train, *self.held_out)]


def data_read_by(found: FoundModel) -> RunData:
    """The data that a checkpoint's weights have read.

    Raises:
        DataError: there is no record of what they have read, the data are not here, or they are others.
    """
    if not found.manifest.data:
        raise DataError(
            f"{found.checkpoint}: says nothing of the samples that it was trained on, as a converted model does, so "
            "how often it saw a text is not known; a run that megalm train has trained"
        )
    state = DataState.from_dict(found.manifest.data)
    datasets = open_datasets(found.config.data)
    for dataset in datasets:
        check_folder(dataset)
    corpora = corpora_of_run(found.config, found.run)
    ledger = ledger_of_checkpoint(found.config, corpora, state, steps_of_run(found.config, found.run))
    return RunData(
        train=tuple(SplitTokens(shards.store) for shards in corpora.shards),
        held_out=tuple(SplitTokens(dataset.below("val")) for dataset in with_validation(datasets)),
        ledger=ledger,
        samples=state.consumed_samples,
        sequence_length=corpora.sequence_length,
    )


def notes_of(config: Config) -> list[str]:
    """What else the weights may have read that no ledger of this run tells, in words."""
    first = config.checkpoint.init_from or config.checkpoint.finetune_from
    if first is None:
        return []
    return [f"the weights began as those of {first}; what these had read is not counted"]
