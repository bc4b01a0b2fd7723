"""Converts a model from one format to another: opens, checks, writes, verifies; the target appears whole or not at all.

A format that can be read is a line in ``READERS``, one that can be written a line in ``WRITERS``. Both import what they
need when they are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megalm.checkpoint.manifest import read_manifest
from megalm.checkpoint.store import locate
from megalm.config.schema import Model
from megalm.config.violation import spoken_list
from megalm.convert.folder import check_absent, new_folder
from megalm.convert.transfer import Progress, Transfer
from megalm.convert.weights import SourceInfo, WeightSource
from megalm.core.dtype import DTYPE_NAMES, DTYPES
from megalm.data.shards.vocabulary import Vocabulary, beyond
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import CheckpointError, ConfigError
from megalm.models.counts import parameter_count

SAME_DTYPE = "source"
LAYOUTS = ("megalm", "megatron")
"""Formats that are written as one piece per rank of a layout."""
SHARDED = ("hf",)
"""Formats whose weight files have a maximum size."""
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Request:
    """What is to be converted, and how.

    Attributes:
        source_format: a key of ``READERS``.
        target_format: a key of ``WRITERS``.
        source: what to read.
        target: folder to write; it must not exist yet, or be empty.
        tp: tensor-parallel degree of what is written.
        pp: pipeline-parallel degree of what is written.
        dtype: a key of ``DTYPES``, or ``source``: as it is.
        shard_bytes: maximum bytes of one weight file, for formats that have a maximum; None: ``SHARD_BYTES``.
        verify: whether to read everything again, and compare.
    """

    source_format: str
    target_format: str
    source: Path
    target: Path
    tp: int = 1
    pp: int = 1
    dtype: str = SAME_DTYPE
    shard_bytes: int | None = None
    verify: bool = False


@dataclass(frozen=True)
class Report:
    """The result of a conversion, as lines for the user.

    Attributes:
        done: what was written.
        notes: what it leaves out.
        verified: what ``--verify`` found.
        warnings: weights that are not finite.
    """

    done: str
    notes: tuple[str, ...]
    verified: tuple[str, ...]
    warnings: tuple[str, ...]


class Watcher(Protocol):
    """Receives the progress of a conversion."""

    def begin(self, what: str, total: int) -> Progress:
        """A phase begins.

        Args:
            what: it does, in words.
            total: bytes that the phase will process.

        Returns:
            A function to call with the bytes processed since the last call.
        """
        ...


def convert(request: Request, watcher: Watcher) -> Report:
    """Convert a model as a request says.

    Raises:
        ConfigError: the request itself is wrong, whatever the files hold.
        CheckpointError: the source is not whole, not what it says, or no model of the target's; or the target, read
            again, is not the source.
        OSError: the disk is full or broken.
    """
    check_request(request)
    check_absent(request.target)
    started = time.perf_counter()
    source = READERS[request.source_format](request.source)
    try:
        return _convert(source, request, watcher, started)
    finally:
        source.close()


def check_request(request: Request) -> None:
    """Refuse what is wrong with a request before anything is opened.

    Raises:
        ConfigError: every problem, one per line.
    """
    problems = []
    for name, value in (("tp", request.tp), ("pp", request.pp)):
        if value < 1:
            problems.append(f"--{name} {value}: must be at least 1")
        elif value > 1 and request.target_format not in LAYOUTS:
            problems.append(
                f"--{name} {value}: --to {request.target_format} has no layout; --{name} is for {spoken_list(LAYOUTS)}"
            )
    if request.shard_bytes is not None and request.target_format not in SHARDED:
        problems.append(
            f"--shard-gb {request.shard_bytes / 1e9:g}: --to {request.target_format} is not cut by size; --shard-gb is "
            f"for {spoken_list(SHARDED)}"
        )
    if problems:
        raise ConfigError(problems)


def _check_layout(model: Model, request: Request) -> None:
    """Refuse a layout that the target does not split the model over, before anything is written."""
    if request.target_format == "megalm":
        from megalm.convert.run import check_layout

        check_layout(model, tp=request.tp, pp=request.pp)
    if request.target_format == "megatron":
        from megalm.convert.megatron.args import layout_reasons

        if reasons := layout_reasons(model, request.tp, request.pp):
            raise ConfigError(reasons)


def _convert(source: WeightSource, request: Request, watcher: Watcher, started: float) -> Report:
    info = source.info
    dtype = info.dtype if request.dtype == SAME_DTYPE else DTYPES[request.dtype]
    tokenizer, notes = _tokenizer_of(source)
    transfer = Transfer(source, dtype)
    _check_layout(info.model, request)
    transfer.progress = watcher.begin("converting", transfer.total_bytes)
    verified: list[str] = []
    with new_folder(request.target) as folder:
        try:
            what = WRITERS[request.target_format](transfer, folder, request, tokenizer)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            if request.verify:
                verified = _verify(source, dtype, folder, request, watcher, tokenizer)
        except BaseException:
            transfer.cancel()
            raise
    parameters = parameter_count(info.model).total
    done = (
        f"{request.target}: {what}, {parameters:,} parameters in {len(transfer.shapes)} tensors, {DTYPE_NAMES[dtype]}, "
        f"{_size(size)}, {time.perf_counter() - started:.1f} s"
    )
    return Report(done, (*info.notes, *notes, *_losses(info, request)), tuple(verified), tuple(transfer.warnings))


def _losses(info: SourceInfo, request: Request) -> list[str]:
    """Parts of a model that the target format cannot hold and that do not change its logits."""
    if request.target_format != "hf":
        return []
    from megalm.convert.huggingface.families import family_of

    return family_of(info.model, info.architecture).losses(info.model)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**8 else f"{count / 1e6:.2f} MB"


def _verify(
    source: WeightSource,
    dtype: torch.dtype,
    folder: Path,
    request: Request,
    watcher: Watcher,
    tokenizer: Tokenizer | None,
) -> list[str]:
    from megalm.convert.verify import Side, compare_logits, compare_tensors

    expected = Transfer(source, dtype)
    expected.progress = watcher.begin("verifying", expected.total_bytes)
    try:
        with closing(READERS[request.target_format](folder)) as target:
            compare_tensors(expected, target)
            # The library would load the source without the cast that was asked for, and is asked to open no pickle.
            uncast = request.source_format == "hf" and dtype == source.info.dtype and not _is_pickled(request.source)
            found = compare_logits(
                Side(expected, request.source if uncast else None),
                Side(target, folder if request.target_format == "hf" else None, is_new=True),
            )
            found += _verify_tokenizer(source, target, tokenizer)
    except CheckpointError as error:
        message = str(error).replace(str(folder), str(request.target))
        raise CheckpointError(f"--verify: {message}") from None
    return [f"verified: {len(expected.shapes)} tensors, equal byte for byte after a round trip", *found]


def _is_pickled(source: Path) -> bool:
    """Whether the weights of a Hugging Face folder are pickles."""
    from megalm.convert.huggingface.files import is_pickled

    return is_pickled(source)


def _verify_tokenizer(source: WeightSource, target: WeightSource, tokenizer: Tokenizer | None) -> list[str]:
    from megalm.convert.verify_tokenizer import compare_by_library, compare_ids, compare_tokenizers

    compare_ids(source.info.ids, target.info.ids)
    if tokenizer is None:
        return []
    written, _ = _tokenizer_of(target)
    places = source.info.path, target.info.path
    found = [f"{compare_tokenizers(tokenizer, written, source_at=places[0], target_at=places[1])}: as they were"]
    if source.info.format == target.info.format == "hf":
        found += filter(None, [compare_by_library(*places)])
    return found


def _tokenizer_of(source: WeightSource) -> tuple[Tokenizer | None, list[str]]:
    """The model's tokenizer, and notes on it."""
    from megalm.convert.huggingface.read import safe_file
    from megalm.convert.huggingface.tokenizer_files import find_tokenizer

    # A run is the user's own, and may link to what lies elsewhere.
    safe = Path.joinpath if source.info.format == "megalm" else safe_file
    folder = source.info.tokenizer or (source.info.path if source.info.path.is_dir() else None)
    found = find_tokenizer(folder, safe=safe)
    notes = [found.note] if found.note else []
    if found.tokenizer is not None and folder is not None:
        notes += _vocabulary_notes(source, Vocabulary.of(found.tokenizer, folder))
    return found.tokenizer, notes


def _vocabulary_notes(source: WeightSource, vocabulary: Vocabulary) -> list[str]:
    """Tokens of a tokenizer that the model has no embedding for.

    Raises:
        CheckpointError: the tokenizer is another model's.
    """
    from megalm.convert.run import RunSource

    rows = source.info.model.vocab_size or 0
    if isinstance(source, RunSource):
        source.check_tokenizer(vocabulary)
    words, added = beyond(vocabulary, rows)
    if words:
        raise CheckpointError(
            f"tokenizer {vocabulary}: not this model's, which has {rows:,} words: {len(words):,} words such as "
            f"{words[0]!r} have no embedding; put the model's own tokenizer there, or move this one away to convert "
            "the weights alone"
        )
    if not added:
        return []
    return [
        f"the tokenizer has {vocabulary.size:,} tokens, the model {rows:,}: {', '.join(added[:5])} have no embedding; "
        "a run that begins with this model learns them with checkpoint.extend_vocab=true"
    ]


def _open_megalm(path: Path) -> WeightSource:
    from megalm.convert.run import open_source

    return open_source(path)


def _open_hf(path: Path) -> WeightSource:
    from megalm.convert.huggingface.read import open_source

    return open_source(path)


def _open_megatron(path: Path) -> WeightSource:
    from megalm.convert.megatron.read import open_source

    return open_source(path)


def _open_deepspeed(path: Path) -> WeightSource:
    from megalm.convert.deepspeed.read import open_source

    return open_source(path)


def _open_openai_gpt2(path: Path) -> WeightSource:
    from megalm.convert.openai.read import open_source

    return open_source(path)


def _write_megalm(transfer: Transfer, folder: Path, request: Request, tokenizer: Tokenizer | None) -> str:
    from megalm.convert.run import write_run

    write_run(transfer, folder, name=request.target.name, tokenizer=tokenizer, tp=request.tp, pp=request.pp)
    return f"a run of megalm in pieces for tp={request.tp} pp={request.pp}"


def _write_hf(transfer: Transfer, folder: Path, request: Request, tokenizer: Tokenizer | None) -> str:
    from megalm.convert.huggingface.write import write_hf

    shard_bytes = SHARD_BYTES if request.shard_bytes is None else request.shard_bytes
    family = write_hf(transfer, folder, tokenizer=tokenizer, shard_bytes=shard_bytes)
    if transfer.info.format == "megalm":
        from megalm.convert.huggingface.model_card import CARD_FILE, model_card

        manifest = read_manifest(locate(request.source).path)
        dtype = DTYPE_NAMES[transfer.info.dtype]
        card = model_card(manifest, transfer.info.model, architecture=family.architecture, dtype=dtype)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return f"{family.title} for Hugging Face ({family.architecture})"


def _write_megatron(transfer: Transfer, folder: Path, request: Request, tokenizer: Tokenizer | None) -> str:
    from megalm.convert.megatron.door import write_megatron

    write_megatron(transfer, folder, tp=request.tp, pp=request.pp)
    if tokenizer is not None:
        tokenizer.save(folder)
    return f"a checkpoint for Megatron-LM on tp={request.tp} pp={request.pp}"


READERS: dict[str, Callable[[Path], WeightSource]] = {
    "megalm": _open_megalm,
    "hf": _open_hf,
    "megatron": _open_megatron,
    "openai-gpt2": _open_openai_gpt2,
    "deepspeed": _open_deepspeed,
}
"""Formats by name ▶ what opens them."""

WRITERS: dict[str, Callable[[Transfer, Path, Request, Tokenizer | None], str]] = {
    "megalm": _write_megalm,
    "hf": _write_hf,
    "megatron": _write_megatron,
}
"""Formats by name ▶ what fills an empty folder, and says in words what it now holds."""
