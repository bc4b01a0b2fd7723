"""What a run's folder and its data say together: which samples its steps took, and its ledger. No torch."""

from __future__ import annotations

from pathlib import Path

from megalm.checkpoint.manifest import read_manifest
from megalm.checkpoint.store import CHECKPOINTS_FOLDER, find_latest
from megalm.config.schema import Config
from megalm.data.shards.dataset import open_datasets
from megalm.data.shards.vocabulary import Vocabulary, check_same
from megalm.data.stream.batch_size import BatchSize
from megalm.data.stream.ledger import Ledger, Steps
from megalm.data.stream.order import BlendedOrder
from megalm.data.stream.phases import DataState, Phase, fingerprint_of, new_state, order_of
from megalm.data.stream.sequences import Corpora
from megalm.data.tokenization.tokenizer import TOKENIZER_FILE
from megalm.errors import DataError
from megalm.objectives.registry import OBJECTIVES
from megalm.runs.folder import METRICS_FILE
from megalm.runs.record import attempt_rows, read_metrics, step_rows


def corpora_of_run(config: Config, run_dir: Path) -> Corpora:
    """The training splits that a run's config names.

    Raises:
        DataError: one is missing or incomplete, or was made by another tokenizer than the run's.
    """
    datasets = open_datasets(config.data)
    corpora = Corpora.open(
        [dataset.below("train") for dataset in datasets],
        config.model.sequence_length,
        OBJECTIVES[config.objective.name].sequences_per_example,
    )
    own = run_dir / TOKENIZER_FILE
    if own.exists():
        model = Vocabulary.parse(own.read_text(encoding="utf-8", errors="replace"), str(own))
        for dataset in datasets:
            what = f"data.path={dataset.location}"
            check_same(model, Vocabulary.of_dataset(dataset), what, "so these are not what the run reads")
    return corpora


def steps_of_run(config: Config, run_dir: Path) -> Steps:
    """The record of the steps so far, and the plan of those to come.

    Raises:
        DataError: the record does not say how many samples came before it.
    """
    path = run_dir / METRICS_FILE
    rows = read_metrics(path) if path.exists() else []
    taken = step_rows(rows)
    begins = taken[0]["step"] - 1 if taken else max((row["step"] for row in attempt_rows(rows)), default=0)
    latest = find_latest(run_dir / CHECKPOINTS_FOLDER)
    if not rows and latest is not None:
        raise DataError(
            f"{path}: missing, and the run is at step {latest.step}; only this record says which samples a step took"
        )
    earlier = next((row["samples"] for row in attempt_rows(rows) if row["step"] == begins), 0)
    tokens = max((row["tokens"] for row in rows if "tokens" in row), default=0)
    samples = taken[-1]["samples"] if taken else earlier
    planned = BatchSize.of(config.train, config.model.sequence_length).resumed(samples, tokens)
    if begins and not earlier:
        raise DataError(f"{path}: begins with step {begins + 1}, and nothing says how many samples came before it")
    return Steps([row["samples"] for row in taken], planned, begins, earlier)


def ledger_of_sample(config: Config, corpora: Corpora, run_dir: Path, steps: Steps, sample: int) -> Ledger:
    """The ledger of the phase that a sample belongs to.

    Raises:
        DataError: the config's data are not those of that phase.
    """
    order = order_of(corpora, config.data, config.run.seed)
    fingerprint = fingerprint_of(corpora, order, config.data, config.run.seed)
    latest = find_latest(run_dir / CHECKPOINTS_FOLDER)
    state = (
        new_state(config.data.phase, fingerprint)
        if latest is None
        else DataState.from_dict(read_manifest(latest.path).data)
    )
    number = max(n for n, phase in enumerate(state.phases) if phase.start <= sample)
    phase = state.phases[number]
    if phase.number != config.data.phase:
        raise DataError(f"data.phase={config.data.phase}: sample {sample} was read in {_named(phase)}")
    _check_same_data(config, corpora, order, phase)
    end = state.phases[number + 1].start if number + 1 < len(state.phases) else max(steps.samples, phase.start)
    return Ledger(corpora, order, start=phase.start, end=end, steps=steps)


def ledger_of_checkpoint(config: Config, corpora: Corpora, state: DataState, steps: Steps) -> Ledger:
    """The ledger of all that a checkpoint's weights have read, which must be of one phase.

    Args:
        config: of the run; its data must be those of that phase.
        corpora: the training splits that it names.
        state: of the data, as the checkpoint has it.
        steps: which samples the steps took.

    Raises:
        DataError: the samples are of several phases, or of another than that of the config's data.
    """
    read = [phase for phase, samples in state.samples_of_phases() if samples]
    if len(read) > 1:
        numbers = ", ".join(str(phase.number) for phase in read)
        raise DataError(
            f"data.phase={config.data.phase}: the checkpoint has read the data of phases {numbers}, and how often it "
            f"saw a text is known of one phase's data alone; a checkpoint of phase {read[0].number}"
        )
    phase = read[0] if read else state.current
    if phase.number != config.data.phase:
        raise DataError(f"data.phase={config.data.phase}: what the checkpoint has read is of {_named(phase)}")
    order = order_of(corpora, config.data, config.run.seed)
    _check_same_data(config, corpora, order, phase)
    return Ledger(corpora, order, start=phase.start, end=state.consumed_samples, steps=steps)


def _check_same_data(config: Config, corpora: Corpora, order: BlendedOrder, phase: Phase) -> None:
    """Raise DataError where anything that decides the order of a phase differs."""
    DataState(0, (phase,)).continued(phase.number, fingerprint_of(corpora, order, config.data, config.run.seed))


def _named(phase: Phase) -> str:
    """A phase, and how to name its data."""
    return (
        f"phase {phase.number}; give its data: data.phase={phase.number} "
        f"model.sequence_length={phase.sequence_length} data.path=…"
    )
