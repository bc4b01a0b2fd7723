"""Proves a conversion: what was written is read again, compared tensor by tensor, and asked for logits.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.adapters.checks import same_values
from megalm.checkpoint.adapters.parallel import run_all
from megalm.checkpoint.adapters.transfer import Transfer
from megalm.checkpoint.adapters.weights import WeightSource
from megalm.core.sharding import declared_parameters
from megalm.errors import CheckpointError
from megalm.models.gpt import build_full_model

SEQUENCES = 4
LONGEST = 64
"""Tokens of each sequence, where the model takes as many."""
TOLERANCE = 1e-4
"""Largest difference of two logits, unless fp32 rounds this model's by more."""
ROUNDINGS = 4
"""A larger difference is let pass up to this many times what fp32 rounds the very same logits by. Both sides round, and
where logits are in the hundreds, as GPT-2's, each does so by 1e-4."""
LIBRARY = "transformers"
ADVICE = (
    f"{LIBRARY} is not installed, so megalm computed the logits of both sides; pip install 'megalm[convert]' compares "
    f"with {LIBRARY}"
)


@dataclass(frozen=True)
class Side:
    """One end of a conversion, for its logits.

    Attributes:
        source: its tensors.
        folder: where the library finds it; None: megalm computes.
        is_new: whether it was written just now, so that the library must find exactly what it wants.
    """

    source: WeightSource
    folder: Path | None
    is_new: bool = False


def compare_tensors(transfer: Transfer, target: WeightSource) -> None:
    """Prove that every tensor of a source is in what was written, bit for bit.

    Args:
        transfer: the source, with the cast that the conversion made.
        target: what was written, read again.

    Raises:
        CheckpointError: naming the first tensor that differs.
    """
    if target.info.dtype != transfer.info.dtype:
        raise CheckpointError(f"written as {target.info.dtype}, not as {transfer.info.dtype}")
    run_all([partial(_compare, transfer, target, name) for name in transfer.shapes], call_off=transfer.call_off)


def compare_logits(source: Side, target: Side) -> list[str]:
    """Prove that both sides answer random sequences alike, in fp32.

    Returns:
        What was found, as lines for the user.

    Raises:
        CheckpointError: they differ by more than rounding explains.
    """
    model = target.source.info.model
    length = min(model.sequence_length, LONGEST)
    tokens = torch.randint(model.vocab_size or 1, (SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    expected, first = _logits(source, tokens)
    actual, second = _logits(target, tokens)
    difference, largest = _largest_difference(expected, actual), float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
    found = (
        f"logits of {SEQUENCES} random sequences of {length} tokens, in fp32: largest difference {difference:.2g} "
        f"between {first} (source) and {second} (target), where the largest is {largest:.3g}"
    )
    if difference > TOLERANCE:
        rounding = _rounding(target.source, tokens)
        if not difference <= ROUNDINGS * rounding:
            raise CheckpointError(f"{found}: more than {TOLERANCE:g}, and fp32 rounds them by {rounding:.2g} only")
        found += f"; fp32 rounds these logits by {rounding:.2g} against fp64"
    advice = [] if has_library() or (source.folder is None and target.folder is None) else [ADVICE]
    return [found, *advice]


def has_library() -> bool:
    """Whether the library can be imported."""
    return importlib.util.find_spec(LIBRARY) is not None


def _compare(transfer: Transfer, target: WeightSource, name: str) -> None:
    with transfer.hold(name) as expected:
        actual = target.read(name)
        if not same_values(expected, actual):
            raise CheckpointError(f"{name}: what was written is not what was read{_first(expected, actual)}")


def _first(expected: Tensor, actual: Tensor) -> str:
    """Where two tensors differ first, and how."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        kinds = [f"{list(tensor.shape)} {tensor.dtype}" for tensor in (actual, expected)]
        return f": {kinds[0]}, not {kinds[1]}"
    different = (expected != actual).flatten().nonzero()
    if not len(different):
        return ": a zero of the other sign"
    place = int(different[0])
    return f": element {place} is {actual.flatten()[place]:g}, not {expected.flatten()[place]:g}"


def _logits(side: Side, tokens: Tensor) -> tuple[Tensor, str]:
    """[B, S] ▶ [B, S, V] fp32, and who computed them."""
    if side.folder is None or not has_library():
        return _own_logits(side.source, tokens), "megalm"
    return _library_logits(side, side.folder, tokens)


def _rounding(source: WeightSource, tokens: Tensor) -> float:
    """What fp32 changes in a model's logits, compared with fp64."""
    short, long = (_own_logits(source, tokens, dtype) for dtype in (torch.float32, torch.float64))
    return _largest_difference(short.double(), long)


@torch.inference_mode()
def _own_logits(source: WeightSource, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    model = source.info.model
    whole = build_full_model(model, model.vocab_size or 1, dtype=dtype).eval()
    for declared in declared_parameters(whole):
        declared.parameter.copy_(source.read(declared.name))
    logits: Tensor = whole(tokens)
    return logits


@torch.inference_mode()
def _library_logits(side: Side, folder: Path, tokens: Tensor) -> tuple[Tensor, str]:
    with _silence():
        import transformers

        kind = transformers.AutoModelForCausalLM if side.source.info.model.causal else transformers.AutoModelForMaskedLM
        try:
            loaded: Any = kind.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # whatever the library raises, it could not load the folder
            what = "what was written" if side.is_new else "the source"
            raise CheckpointError(f"{LIBRARY} cannot load {what}: {error}") from None
        model, loading = loaded
        if side.is_new and (problems := {kind: names for kind, names in loading.items() if names}):
            raise CheckpointError(f"{LIBRARY} did not find what it wanted in what was written: {problems}")
        logits: Tensor = model.eval()(input_ids=tokens).logits.float()
    return logits, f"{LIBRARY} {transformers.__version__}"


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing that the library says while it loads reaches the user: progress bars, warnings, advice."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from transformers.utils import logging

        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def _largest_difference(one: Tensor, other: Tensor) -> float:
    """Infinity where one is NaN and the other is not: weights that are not finite must at least spread alike."""
    same = (one == other) | (one.isnan() & other.isnan())
    return float((one - other).abs().masked_fill(same, 0.0).nan_to_num(float("inf"), float("inf")).max())
