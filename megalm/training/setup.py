"""Trains on one rank. What is built first: layout, model, engine, data, start point, callbacks; then the loop runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megalm.config.job import topology_of
from megalm.config.schema import Config
from megalm.core.dtype import DTYPES
from megalm.data.shards.dataset import open_datasets, tokenizer_of, with_validation
from megalm.data.shards.index import Index
from megalm.data.shards.store import Store
from megalm.data.stream.batch import MakeBatch
from megalm.data.stream.batch_size import BatchSize
from megalm.data.stream.loader import TrainLoader, example_batch
from megalm.data.stream.sequences import Corpora
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.engine.feed import Feed
from megalm.engine.lr_schedule import LearningRate
from megalm.engine.validation import Validator
from megalm.errors import ConfigError, DivergedError, ExitCode
from megalm.launch import RankInfo
from megalm.launch.signals import StopRequest
from megalm.mesh.groups import ParallelContext
from megalm.models.counts import flops_per_token, parameter_count
from megalm.models.transformer import Transformer, build_transformer
from megalm.objectives.base import Objective
from megalm.objectives.registry import make_objective
from megalm.ownership import Claim
from megalm.plan.hardware import match_device, peak_flops
from megalm.runs.attempts import keep_config
from megalm.runs.changes import changes_since
from megalm.runs.history import history_of, schedule_for
from megalm.runs.start import StartPoint, await_visible, run_folder
from megalm.runs.vocabulary import TOKENIZER, tokenizer_record
from megalm.training.callbacks.base import Attempt, Callback, CallbackList, Outcome, RunContext
from megalm.training.restoring import Restored, restore
from megalm.training.saving import Saver
from megalm.training.trainer import Trainer, Utilisation

_OUTCOMES = {Outcome.DONE: ExitCode.DONE, Outcome.INTERRUPTED: ExitCode.INTERRUPTED, Outcome.REQUEUE: ExitCode.REQUEUE}


def run_training(
    config: Config,
    rank: RankInfo,
    stop: StopRequest,
    start: StartPoint,
    claim: Claim | None = None,
    indexes: Sequence[Mapping[str, Index]] = (),
) -> ExitCode:
    """What every rank runs, in an initialised process group: set up, train, and say how it ended."""
    trainer, callbacks = build_trainer(config, rank, stop, start, claim, indexes)
    stop.before_sudden_end(trainer.linger)
    outcome = Outcome.FAILED
    try:
        outcome = trainer.fit()
    except DivergedError:
        outcome = Outcome.DIVERGED
        raise
    except Exception:
        trainer.linger()
        raise
    finally:
        try:
            callbacks.on_end(outcome)
        finally:
            callbacks.close()
    return _OUTCOMES[outcome]


@dataclass(frozen=True)
class _Data:
    """What a run reads, and how its rows become batches.

    Attributes:
        train: the training splits.
        val: the validation splits; None: there are none.
        tokenizer: that made them.
        make_batch: of the objective.
    """

    train: Corpora
    val: Corpora | None
    tokenizer: Tokenizer
    make_batch: MakeBatch

    @classmethod
    def open(cls, config: Config, objective: Objective, indexes: Sequence[Mapping[str, Index]]) -> _Data:
        """Open the datasets that a config names; with their ``indexes``, nothing is opened before rows are read."""
        datasets = open_datasets(config.data)

        def split(name: str, found: Sequence[Store], known: list[Index] | None) -> Corpora:
            length, each = config.model.sequence_length, objective.sequences_per_example
            return Corpora.open([dataset.below(name) for dataset in found], length, each, known)

        if indexes:
            validating = [dataset for dataset, known in zip(datasets, indexes, strict=True) if "val" in known]
            train_known = [known["train"] for known in indexes]
            val_known = [known["val"] for known in indexes if "val" in known]
        else:
            validating, train_known, val_known = list(with_validation(datasets)), None, None
        tokenizer = tokenizer_of(datasets, None if train_known is None else train_known[0])
        return cls(
            train=split("train", datasets, train_known),
            val=split("val", validating, val_known) if validating else None,
            tokenizer=tokenizer,
            make_batch=objective.make_batch(tokenizer, config.run.seed),
        )

    def loader(self, config: Config, context: ParallelContext) -> TrainLoader:
        """This rank's training batches."""
        return TrainLoader(
            self.train,
            config.data,
            make_batch=self.make_batch,
            batch_size=BatchSize.of(config.train, config.model.sequence_length),
            dp_rank=context.coordinates.dp,
            dp_size=context.topology.dp,
            seed=config.run.seed,
        )

    def feed(self, config: Config, context: ParallelContext) -> Feed:
        """What brings training batches to this rank."""
        example = example_batch(self.train, self.make_batch, reset_at_documents=config.data.reset_at_documents)
        return Feed(context, config.data.readers, example)


def build_trainer(
    config: Config,
    rank: RankInfo,
    stop: StopRequest,
    start: StartPoint,
    claim: Claim | None = None,
    indexes: Sequence[Mapping[str, Index]] = (),
) -> tuple[Trainer, CallbackList]:
    """Everything that a rank trains with; collective over all ranks of an initialised process group.

    ``start`` was chosen on one rank: two that looked for themselves might see different checkpoints. ``claim`` says
    that the run's folder is this run's alone, and is asked before something is written there. ``indexes`` are those of
    the plan; without them this rank looks at the files of the data itself.

    Raises:
        DataError, CheckpointError: the data or the checkpoint do not fit the config.
    """
    run_dir = run_folder(config)
    await_visible(start)
    context = ParallelContext.create(topology_of(config, rank.world_size), rank.device)
    objective = make_objective(config.objective)
    _check_micro_batch(config, objective)
    data = _Data.open(config, objective, indexes)
    vocab_size = config.model.vocab_size or data.train.vocab_size
    config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    parameters = parameter_count(config.model, vocab_size).total + objective.head_parameters(config.model)
    engine = _build_engine(config, vocab_size, context, objective, parameters, is_loaded=start.path is not None)
    loader = data.loader(config, context)
    restored = restore(start, engine, loader, context, seed=config.run.seed)
    schedule = schedule_for(config, None if restored.resumed is None else history_of(restored.resumed))
    if context.rank == 0:
        _begin_folder(run_dir, data.tokenizer, claim)
    callbacks = CallbackList(_make_callbacks(config, claim) if context.rank == 0 else [])
    attempt = _begin_attempt(config, run_dir, start, restored, rank.world_size) if context.rank == 0 else None
    callbacks.on_start(_run_context(config, context, restored, schedule, attempt, parameters))
    tasks = None
    if config.evaluate.tasks:
        from megalm.training.tasks import TrainingTasks

        tasks = TrainingTasks(
            config,
            context=context,
            model=engine.model,
            objective=objective,
            tokenizer=data.tokenizer,
            run_dir=run_dir,
            callbacks=callbacks,
            stop=stop,
        )
    lineage = {**restored.lineage, TOKENIZER: tokenizer_record(data.tokenizer)}
    trainer = Trainer(
        config,
        context=context,
        engine=engine,
        loader=loader,
        feed=data.feed(config, context),
        validator=None if data.val is None else Validator(config, context, data.val, objective, data.make_batch),
        tasks=tasks,
        saver=Saver(config, context, run_dir, lineage=lineage, start=start, claim=claim),
        callbacks=callbacks,
        learning_rate=schedule,
        utilisation=Utilisation(flops_per_token(config.model, vocab_size), _peak(config, context)[1]),
        stop=stop,
        progress=restored.progress,
    )
    return trainer, callbacks


def _build_engine(
    config: Config, vocab_size: int, context: ParallelContext, objective: Objective, parameters: int, *, is_loaded: bool
) -> DeepSpeedEngine:
    """The model under its optimizer, with its initial weights unless a checkpoint is loaded into it.

    ``parameters`` is how many the whole model has.
    """
    model = build_transformer(
        config,
        vocab_size,
        context=context,
        dtype=DTYPES[config.engine.dtype],
        objective=objective,
        with_values=not is_loaded,
    )
    _assert_nothing_lost(context, model, parameters)
    return DeepSpeedEngine(model, context, config)


def _begin_folder(run_dir: Path, tokenizer: Tokenizer, claim: Claim | None) -> None:
    """The run's folder, whole in itself: config and tokenizer lie beside the weights."""
    if claim is not None:
        claim.check()
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(run_dir)


def _run_context(
    config: Config,
    context: ParallelContext,
    restored: Restored,
    schedule: LearningRate,
    attempt: Attempt | None,
    parameters: int,
) -> RunContext:
    """What callbacks are told when the run begins."""
    name, peak = _peak(config, context)
    return RunContext(
        config=config,
        run_dir=run_folder(config),
        start_step=restored.progress.step,
        total_steps=config.train.steps,
        total_tokens=schedule.total_tokens,
        attempt=attempt,
        topology=context.topology.describe(),
        device=_device_in_words(context.device),
        parameters=parameters,
        loaded=restored.words,
        mfu_peak=None if peak is None else f"{peak / 1e12:.0f} TFLOP/s ({name}, {config.engine.dtype}, dense)",
    )


def _peak(config: Config, context: ParallelContext) -> tuple[str | None, float | None]:
    """Name of the device, and its peak FLOP/s in the run's number format; None where it is unknown."""
    name = _peak_name(config, context.device)
    return name, peak_flops(name, config.engine.dtype)


def _check_micro_batch(config: Config, objective: Objective) -> None:
    each, size = objective.sequences_per_example, config.train.micro_batch_size
    if size % each:
        raise ConfigError(
            f"train.micro_batch_size={size}: objective.name={config.objective.name} learns from {each} sequences at a "
            f"time; a multiple of {each}"
        )


def _assert_nothing_lost(context: ParallelContext, model: Transformer, expected: int) -> None:
    """The ranks' parameters, each counted once, are as many as one process would hold: no layer was lost or doubled."""
    local = sum(t.shard.numel for t in model.tensors() if context.owns(t.record) and not t.record.is_buffer)
    count = torch.tensor(float(local), dtype=torch.float64, device=context.device)
    total = int(context.world_group.all_reduce(count))
    if total != expected:
        raise AssertionError(f"the ranks hold {total:,} parameters, the model has {expected:,}")


def _make_callbacks(config: Config, claim: Claim | None) -> list[Callback]:
    """In the order in which they hear of events; the record comes first.

    Rank 0 alone imports what they need.
    """
    from megalm.training.callbacks.closing_report import ClosingReport
    from megalm.training.callbacks.console import ConsoleLog
    from megalm.training.callbacks.metrics_jsonl import MetricsJsonl

    callbacks: list[Callback] = [MetricsJsonl(claim)]
    if config.logging.tensorboard:
        from megalm.training.callbacks.tensorboard import TensorBoardLog

        callbacks.append(TensorBoardLog())
    if config.logging.wandb != "disabled":
        from megalm.training.callbacks.wandb import WandbLog

        callbacks.append(WandbLog(config.logging.wandb))
    return [*callbacks, ConsoleLog(config.logging.every), ClosingReport()]


def _begin_attempt(config: Config, run_dir: Path, start: StartPoint, restored: Restored, ranks: int) -> Attempt:
    """Keep this start's config, and say what it changes."""
    number, kept = keep_config(config, run_dir)
    changes = [] if restored.resumed is None else changes_since(restored.resumed, config, ranks)
    return Attempt(
        number=number,
        config=kept,
        step=restored.progress.step,
        samples=restored.progress.samples,
        tokens=restored.progress.tokens,
        began_with=None if start.path is None else str(start.path),
        changes={change.field: (change.before, change.after) for change in changes},
    )


def _peak_name(config: Config, device: torch.device) -> str | None:
    if config.cluster.gpu is not None and device.type == "cuda":
        return config.cluster.gpu
    return match_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _device_in_words(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
