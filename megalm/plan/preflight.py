"""Everything that can be wrong with a run is found here, before a process starts or a GPU is held. No torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.config.check import violations
from megalm.config.compose import composition
from megalm.config.job import Job, world_size_of
from megalm.config.schema import Config
from megalm.config.support import ONE_PER_REPLICA
from megalm.config.unused import unused_settings
from megalm.data.shards.dataset import DatasetInfo, inspect_dataset, inspect_datasets, open_datasets, tokenizer_of
from megalm.data.shards.index import read_index
from megalm.data.stream.blocks import LONG_READS, MOST_RANKS_OF_SINGLES, SINGLES, Blocks, is_open
from megalm.data.stream.order import BlendedOrder
from megalm.data.stream.phases import DataState, too_many_epochs
from megalm.errors import ConfigError, DataError
from megalm.objectives.registry import OBJECTIVES
from megalm.ownership import Claim, Ownership, owned
from megalm.plan.hardware import device_violations
from megalm.plan.plan import Plan
from megalm.runs.changes import changes_since
from megalm.runs.history import (
    History,
    extension_hint,
    history_of,
    length_notes,
    samples_at_end,
    schedule_lines,
    schedule_violations,
    spent_fields,
)
from megalm.runs.source_model import source_model
from megalm.runs.start import StartMode, resolve_start, run_folder
from megalm.runs.vocabulary import match_vocabulary

OWNER_LOCK = "owner.lock"
"""Where a run's folder says who trains in it."""


@contextmanager
def owned_plan(
    overrides: Sequence[str],
    world_size: int | None = None,
    *,
    say: Callable[[str], object],
    cancelled: Callable[[], bool] = lambda: False,
    check: Callable[[Config], object] = lambda _: None,
) -> Iterator[tuple[Plan, Ownership]]:
    """As :func:`make_plan`, in a run folder that is this run's alone while the block runs.

    Args:
        overrides: of the command line.
        world_size: ranks that a launcher has started; None: as many as the config asks for.
        say: told why one has to wait for the folder.
        cancelled: asked while waiting; ends it.
        check: what else the config must pass, and raises if it does not, before there is a folder.

    Raises:
        ConfigError: as :func:`make_plan`; or another run is in the folder, or it cannot be written.
    """
    with ExitStack() as held:
        ownerships: list[Ownership] = []

        def own(config: Config) -> Claim:
            check(config)
            folder = run_folder(config)
            remedy = "wait for it to end, stop it, or choose another run.name"
            lock = owned(folder / OWNER_LOCK, f"run.name={config.run.name}", remedy, say=say, cancelled=cancelled)
            try:
                if folder.is_symlink():  # to another disk, say, where nothing is yet
                    folder.resolve().mkdir(parents=True, exist_ok=True)
                ownerships.append(held.enter_context(lock))
            except OSError as error:
                raise ConfigError(
                    f"run.dir={config.run.dir}: {error.filename or folder} cannot be written: "
                    f"{error.strerror or error}; choose another run.dir or run.name"
                ) from None
            return ownerships[0].claim

        plan = make_plan(overrides, world_size, own)
        yield plan, ownerships[0]


def make_plan(
    overrides: Sequence[str], world_size: int | None = None, own: Callable[[Config], Claim | None] = lambda _: None
) -> Plan:
    """Compose a config and check it against the rules, the data and the checkpoint that it would start from.

    Args:
        overrides: of the command line.
        world_size: ranks that a launcher has started; None: as many as the config asks for.
        own: takes the run's folder, before anybody looks how far the run is.

    Raises:
        ConfigError: every violation there is.
        DataError: the dataset is missing or broken.
        CheckpointError: the checkpoint to start from does not load or does not fit.
    """
    composed = composition(overrides, source_model)
    config = composed.config
    ranks = world_size_of(config) if world_size is None else world_size
    check_config(config, ranks)
    datasets = inspect_datasets(config.data)
    if problems := [
        *_compiler_violations(config),
        *violations(config, ranks, datasets),
        *_validation_violations(config, datasets),
    ]:
        raise ConfigError(problems)
    claim = own(config)
    start = match_vocabulary(config, resolve_start(config, run_folder(config)), open_datasets(config.data))
    complete = start.mode is StartMode.RESUME and not start.is_named and start.step >= config.train.steps
    if complete:
        return Plan(config, ranks, start.notes, complete, start, claim)
    manifest = read_manifest(start.path) if start.path is not None and start.mode is StartMode.RESUME else None
    history = None if manifest is None else history_of(manifest)
    config, order_notes = _with_order(config, ranks, manifest)
    problems = [] if history is None else schedule_violations(config, history)
    problems += _epoch_violations(config, datasets, manifest, history)
    if problems:
        raise ConfigError(problems)
    notes = [
        *_validation_notes(datasets),
        *_turn_notes(config),
        *order_notes,
        *_reader_notes(config, ranks),
        *_what_is_new(config, ranks, manifest, history),
        *length_notes(config, history),
    ]
    notes += unused_settings(Job(config, ranks), is_launched=world_size is not None)
    indexes = tuple(dataset.indexes for dataset in datasets)
    return Plan(config, ranks, (*composed.notes, *start.notes, *notes), complete, start, claim, indexes)


def _with_order(config: Config, ranks: int, manifest: Manifest | None) -> tuple[Config, tuple[str, ...]]:
    """The config with the sizes of blocks that it leaves open, and what to say of them.

    A run that goes on keeps its order, however many ranks it has now.
    """
    notes: tuple[str, ...] = ()
    blocks = SINGLES
    if manifest is not None:
        blocks = Blocks.of_fingerprint(DataState.from_dict(manifest.data).current.fingerprint)
    elif ranks > MOST_RANKS_OF_SINGLES and is_open(config.data):
        blocks = LONG_READS
        notes = (
            f"{LONG_READS}: the run begins on more than {MOST_RANKS_OF_SINGLES} ranks, so it reads whole blocks, which "
            f"a shared file system bears; {SINGLES} is the order of a run that begins on fewer",
        )
    return replace(config, data=blocks.into(config.data)), notes


def _reader_notes(config: Config, ranks: int) -> tuple[str, ...]:
    """That many ranks read the same rows."""
    same = config.parallel.tp * config.parallel.pp
    if ranks <= MOST_RANKS_OF_SINGLES or same == 1 or config.data.readers == ONE_PER_REPLICA:
        return ()
    return (
        f"data.readers={config.data.readers}: {ranks:,} ranks read shards, {same} each the same rows; "
        f"data.readers={ONE_PER_REPLICA} has {ranks // same:,} of them read, and send the rows to the others",
    )


def _what_is_new(config: Config, world_size: int, manifest: Manifest | None, history: History | None) -> list[str]:
    """What of a resumed run is not as it was, one line each."""
    if manifest is None or history is None:
        rewarm = config.optim.rewarm_tokens
        return [] if rewarm is None else [f"optim.rewarm_tokens={rewarm}: not used, as the run begins here"]
    changes, spent = changes_since(manifest, config, world_size), spent_fields(config, history)
    if "loss_scale" in manifest.training["engine"]:
        spent["engine.initial_loss_scale"] = "the loss scale goes on from the checkpoint's"
    why = {field: f" (no effect: {reason})" for field, reason in spent.items()}
    lines = [f"changed  {change}{why.get(change.field, '')}" for change in changes]
    return [*lines, *schedule_lines(config, history)]


def _epoch_violations(
    config: Config, datasets: Sequence[DatasetInfo], manifest: Manifest | None, history: History | None
) -> list[str]:
    """Weights that are too small to be drawn, and datasets that the run would read more often than it may.

    What was read counts as it was: the batch, the length and the blend may have been others.
    """
    each = OBJECTIVES[config.objective.name].sequences_per_example
    sizes = [dataset.sequences(config.model.sequence_length) // each for dataset in datasets]
    try:
        order = BlendedOrder.of(sizes, config.data.weights, seed=config.run.seed, lanes=Blocks.of(config.data).lanes)
    except ValueError as error:
        return [f"data.weights={list(config.data.weights)}: {error}"]
    phase_start, earlier = 0, [Fraction()] * len(datasets)
    if manifest is not None:
        state = DataState.from_dict(manifest.data)
        begins_phase = config.data.phase > state.current.number
        phase_start = state.consumed_samples if begins_phase else state.current.start
        past = state if begins_phase else replace(state, consumed_samples=phase_start, phases=state.phases[:-1])
        earlier = [past.epochs_of(dataset.train_fingerprint, dataset.sequences) for dataset in datasets]
    samples = samples_at_end(config, history) - phase_start
    paths = [dataset.location for dataset in datasets]
    return too_many_epochs(order, paths, config.data.max_epochs, samples // each, earlier)


def _validation_violations(config: Config, datasets: Sequence[DatasetInfo]) -> list[str]:
    """A validation that is asked for, of datasets that have nothing to validate on."""
    if any(dataset.val_tokens for dataset in datasets):
        return []
    where = " ".join(dataset.location for dataset in datasets)
    every, keep_best = config.train.validate_every, config.checkpoint.keep_best
    return [
        f"{name}={value}: {where} was prepared without validation documents; {name}=0, or data.path=DIR with some "
        "(megalm prepare --val-fraction or --val-input)"
        for name, value in (("train.validate_every", every), ("checkpoint.keep_best", keep_best))
        if value
    ]


def _validation_notes(datasets: Sequence[DatasetInfo]) -> tuple[str, ...]:
    without = [dataset.location for dataset in datasets if not dataset.val_tokens]
    if not without:
        return ()
    what = "this run is not validated" if len(without) == len(datasets) else "validation is on the others"
    return (f"{' '.join(without)}: prepared without validation documents, so {what}",)


def _turn_notes(config: Config) -> tuple[str, ...]:
    """That turns of conversations end like documents, so that attention would be cut within a conversation."""
    stores = open_datasets(config.data) if config.data.reset_at_documents else ()
    if not any(read_index(store.below("train")).masked for store in stores):
        return ()
    tokenizer = tokenizer_of(stores)
    if tokenizer.chat is None or tokenizer.chat.turn_end_id != tokenizer.eos_id:
        return ()
    return (
        f"data.reset_at_documents=true: {tokenizer.roles.end} ends each turn of a conversation as well as each "
        "document, so attention and positions start again after every turn; data prepared with another --eos keep "
        "conversations whole",
    )


def _compiler_violations(config: Config) -> list[str]:
    """``torch.compile`` writes C++ (and for a GPU C), which this machine must be able to compile."""
    compilers = (os.environ.get("CXX", "g++"), "c++", "clang++")
    if not config.engine.compiles or any(shutil.which(name) for name in compilers):
        return []
    return [
        "engine.compile=true: this machine has no C++ compiler (g++, c++ or clang++); "
        "install one, set CXX, or engine.compile=false"
    ]


def check_config(config: Config, world_size: int) -> None:
    """Raise every violation that the config shows on ``world_size`` ranks; its data need not be there.

    Where they are, what they ask for is checked too, and every remedy that is offered fits them.
    """
    problems = violations(config, world_size)
    if datasets := datasets_here(config):
        problems = violations(config, world_size, datasets)
    problems += device_violations(config)
    if problems:
        raise ConfigError(problems)


def check_data(config: Config) -> str:
    """Whether the datasets of a config can be read and belong together, as far as they are folders of this machine.

    Returns:
        A line that says what was looked at.

    Raises:
        ConfigError: they do not fit the config.
        DataError: one is damaged, or they were made by different tokenizers.
    """
    elsewhere = [path for path in config.data.path if not Path(path).is_dir()]
    if elsewhere:
        return f"{'data':15}not checked: {', '.join(elsewhere)} is not a folder of this machine"
    datasets = inspect_datasets(config.data)
    if problems := _validation_violations(config, datasets):
        raise ConfigError(problems)
    tokens = sum(dataset.train_tokens for dataset in datasets)
    return f"{'data':15}{', '.join(config.data.path)}: {tokens:,} training tokens, all files there"


def datasets_here(config: Config) -> tuple[DatasetInfo, ...]:
    """The datasets of a config where all are whole folders of this machine; nothing is fetched, nothing is raised."""
    try:
        # Whoever needs the files looks at them; thousands of shards are not looked at twice.
        return tuple(inspect_dataset(Path(path), looks_at_files=False) for path in config.data.path)
    except (DataError, OSError, ValueError):
        return ()


def completion_lines(plan: Plan) -> list[str]:
    """What to say of a run that has nothing left to do."""
    config, step = plan.config, plan.start.step
    beyond = f", and more: it is at step {step:,}" if step > config.train.steps else ""
    return [
        f"run {config.run.name} is complete: all {config.train.steps:,} steps are done{beyond} ({plan.run_dir})",
        f"to continue it, ask for more: the same command with train.steps={2 * max(step, config.train.steps)}"
        f"{extension_hint(config)}; to train anew, choose another run.name",
    ]
