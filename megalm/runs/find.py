"""A trained model that is to be asked: its files and its layout, checked before a rank starts. No torch.

The layout is the user's, not that of training: one process, unless ``parallel.tp``, ``parallel.pp`` or ``launch.ranks``
say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from megalm.checkpoint.manifest import COMPLETE_FILE, Manifest, combined_hash, read_manifest
from megalm.checkpoint.store import locate
from megalm.config.check import find_violations
from megalm.config.compose import load_run_config
from megalm.config.job import world_size_of
from megalm.config.schema import Config, Engine, Launch, Parallel, Train
from megalm.data.shards.dataset import TOKENIZER_FILE
from megalm.data.shards.vocabulary import Vocabulary
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import ConfigError, DataError
from megalm.models.counts import resolve_vocab_size
from megalm.runs.folder import run_folder_of
from megalm.runs.vocabulary import check_own_tokenizer

_OF_THE_LAYOUT = ("parallel", "launch", "model", "world_size", "engine")
"""Sections whose rules hold for a model that is asked, too."""


@dataclass(frozen=True)
class KnownModel:
    """A model, but for its weights.

    Attributes:
        run: folder of the run.
        checkpoint: the folder that the weights are in; of a run that is training, the one that they would be saved to.
        config: of the run, with what was changed for this use and the layout of this use.
        tokenizer: the one that it was trained with.
        vocabulary: the tokenizer, as data are compared with it.
        world_size: ranks that hold it.
    """

    run: Path
    checkpoint: Path
    config: Config
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    world_size: int

    @property
    def vocab_size(self) -> int:
        """Words of the model."""
        return resolve_vocab_size(self.config.model, self.tokenizer.vocab_size)

    def check_tokens(self, token: int, what: str) -> None:
        """Refuse ids that the model has no embedding of: a tokenizer may have more words than its model.

        Raises:
            DataError: naming the token.
        """
        rows = self.vocab_size
        if not 0 <= token < rows:
            raise DataError(
                f"{what}: has token {token} ({self.tokenizer.name_of(token)}), and the model has {rows:,} rows; "
                f"{self.vocabulary} has more words than the model: a new run with checkpoint.init_from and "
                "checkpoint.extend_vocab=true learns them"
            )

    def check_causal(self) -> None:
        """Refuse a model that gives no probability of the next token.

        Raises:
            ConfigError: it is an encoder.
        """
        if not self.config.model.causal:
            raise ConfigError(
                f"{self.run}: model.causal=false: an encoder recovers masked tokens, it continues no text"
            )


@dataclass(frozen=True)
class FoundModel(KnownModel):
    """A trained model on the disk.

    Attributes:
        manifest: of the checkpoint.
    """

    manifest: Manifest

    @property
    def weights_hash(self) -> str | None:
        """One hash of all weights, the same for every layout; None: the checkpoint is older than such hashes."""
        fingerprints = self.manifest.fingerprints
        return None if fingerprints is None else combined_hash(fingerprints)


def find_model(run: str | Path, overrides: Sequence[str] = (), world_size: int | None = None) -> FoundModel:
    """The model of a run or of one of its checkpoints, and the layout in which it is to be asked.

    Args:
        run: folder of the run or its name in ``runs/``: its newest complete checkpoint is taken, or that which
            ``checkpoint.resume=PATH`` names; or one of its checkpoints, ``runs/NAME/checkpoints/step-00000200``.
        overrides: ``field=value`` changes to the run's config.
        world_size: ranks that a launcher has started; None: as many as the layout needs, or ``launch.ranks``.

    Raises:
        ConfigError: the folder is no run, an override is wrong, or the layout does not fit the model.
        CheckpointError: there is no complete checkpoint, or it does not fit the tokenizer.
        DataError: the run's tokenizer is missing or damaged.
    """
    folder = run_folder_of(run)
    named: list[str] = []
    if (folder / COMPLETE_FILE).is_file():
        named = [f"checkpoint.resume={folder.resolve()}"]
        folder = folder.resolve().parent.parent  # runs/NAME/checkpoints/step-…
    config = load_run_config(folder, [*_alone(), "checkpoint.resume=auto", *overrides, *named])
    world_size = world_size_of(config) if world_size is None else world_size
    _check_layout(config, world_size)
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
    resume = config.checkpoint.resume
    checkpoint = locate(folder if resume in ("auto", "never") else resume).path
    vocabulary = Vocabulary.of(tokenizer, folder / TOKENIZER_FILE)
    manifest = read_manifest(checkpoint)
    check_own_tokenizer(checkpoint, manifest, vocabulary)
    return FoundModel(folder, checkpoint, config, tokenizer, vocabulary, world_size, manifest)


def _alone() -> list[str]:
    """Overrides that undo the layout of training."""
    default = Parallel()
    layout = {field.name: getattr(default, field.name) for field in fields(Parallel)}
    values = {f"parallel.{name}": value for name, value in layout.items()} | {"launch.ranks": Launch().ranks}
    return [f"{name}={_as_text(value)}" for name, value in values.items()]


def _as_text(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _check_layout(config: Config, world_size: int) -> None:
    """Refuse a layout that does not fit the model; rules of training alone are not asked.

    Raises:
        ConfigError: everything that is wrong, one line each.
    """
    problems = []
    parallel = config.parallel
    for field, right in (("cp", 1), ("virtual_stages", 1)):
        value = getattr(parallel, field)
        if value != right:
            problems.append(
                f"parallel.{field}={value}: for training alone; parallel.{field}={right}, and parallel.tp and "
                "parallel.pp split a model that is asked"
            )
    replicas = max(world_size // max(parallel.tp * parallel.pp, 1), 1)
    asked = replace(
        config,
        parallel=replace(parallel, cp=1, virtual_stages=1),
        engine=Engine(dtype=config.engine.dtype, zero_stage=0 if config.engine.dtype == "fp32" else 1),
        train=Train(steps=1, micro_batch_size=1, global_batch_size=replicas * parallel.pp),
    )
    found = find_violations(asked, world_size)
    problems += [str(each) for each in found if each.field.partition(".")[0] in _OF_THE_LAYOUT]
    if problems:
        raise ConfigError(problems)
