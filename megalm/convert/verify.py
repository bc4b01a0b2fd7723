"""Verifies a conversion: what was written is read again and compared, tensor by tensor and by logits.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.config.schema import Model
from megalm.convert.checks import same_values
from megalm.convert.parallel import run_all
from megalm.convert.transfer import Transfer
from megalm.convert.weights import WeightSource
from megalm.errors import CheckpointError
from megalm.models.transformer import build_full_model

SEQUENCES = 4
LONGEST = 512
"""Tokens of each sequence, or the model's longest if that is shorter."""
LONGEST_OF_WINDOWS = 8192
"""Tokens of the one sequence that a model with wide attention windows is compared on, at most."""
BEYOND_WINDOW = 64
"""Tokens of that sequence that its window hides from the last one."""
TOLERANCE = 1e-4
"""Largest difference of two logits. In fp32 rounding alone may exceed it, where logits are in the hundreds as GPT-2's:
then fp64 tells. What the library computes in fp32 whatever it is asked for, as angles and RMSNorm, stays rounded."""
LIBRARY = "transformers"
ADVICE = (
    f"{LIBRARY} is not installed, so megalm computed the logits of both sides; pip install 'megalm[convert]' compares "
    f"with {LIBRARY}"
)


@dataclass(frozen=True)
class Side:
    """The source or the target of a conversion, to compute logits with.

    Attributes:
        source: its tensors.
        folder: a Hugging Face folder, with which the library computes; None: megalm computes.
        is_new: whether it was written just now, so that the library must find exactly what it wants.
    """

    source: WeightSource
    folder: Path | None
    is_new: bool = False


def compare_tensors(transfer: Transfer, target: WeightSource) -> None:
    """Check that every tensor of a source was written bit for bit.

    Args:
        transfer: the source, with the cast that the conversion made.
        target: what was written, read again.

    Raises:
        CheckpointError: naming the first tensor that differs.
    """
    if target.info.dtype != transfer.info.dtype:
        raise CheckpointError(f"written as {target.info.dtype}, not as {transfer.info.dtype}")
    run_all([partial(_compare, transfer, target, name) for name in transfer.shapes], cancel=transfer.cancel)


def compare_logits(source: Side, target: Side) -> list[str]:
    """Compare source's and target's logits for random sequences, in fp32, or in fp64 if fp32 rounds too much.

    Returns:
        What was found, as lines for the user.

    Raises:
        CheckpointError: they differ by more than rounding explains, or are no numbers.
    """
    tokens = _random_tokens(target.source.info.model)
    count, length = tokens.shape
    short = _compare_in(torch.float32, source, target, tokens)
    found = f"logits of {count} random {'sequence' if count == 1 else 'sequences'} of {length:,} tokens, {short}"
    if short.difference > TOLERANCE:
        long = _compare_in(torch.float64, source, target, tokens)
        found = f"{found}; that is more than {TOLERANCE:g}, and {long}"
        if long.difference > TOLERANCE:
            raise CheckpointError(f"{found}: more than {TOLERANCE:g} as well, so fp32's rounding does not explain it")
        found += ", so it is fp32's rounding"
    advice = [] if has_library() or (source.folder is None and target.folder is None) else [ADVICE]
    return [found, *advice]


def _random_tokens(model: Model) -> Tensor:
    """[B, S]; without the padding of models that number positions from its id + 1, where it has none in the library.

    A sequence in which a wide attention window hides something stands for all.
    """
    count, length, longest = (
        SEQUENCES,
        min(model.sequence_length, LONGEST),
        min(model.sequence_length, LONGEST_OF_WINDOWS),
    )
    reaching = [
        window + BEYOND_WINDOW for window in model.attention_windows if length < window + BEYOND_WINDOW <= longest
    ]
    if reaching:
        count, length = 1, max(reaching)
    words = model.vocab_size or 1
    tokens = torch.randint(words, (count, length), generator=torch.Generator().manual_seed(0))
    padding = model.position_offset - 1
    return torch.where(tokens == padding, (padding + 1) % words, tokens)


@dataclass(frozen=True)
class _Compared:
    """Logits of both sides, compared; as text, what was measured.

    Attributes:
        dtype: that both sides computed in.
        sides: who computed which.
        difference: the largest between two that are finite.
        largest: logit of the source.
        not_finite: logits that are NaN or infinite, on both sides alike.
        count: logits of one side.
    """

    dtype: torch.dtype
    sides: str
    difference: float
    largest: float
    not_finite: int
    count: int

    def __str__(self) -> str:
        name = "fp32" if self.dtype == torch.float32 else "fp64"
        text = (
            f"in {name}: largest difference {self.difference:.2g} {self.sides}, where the largest is {self.largest:.3g}"
        )
        return text + (f" and {self.not_finite:,} of {self.count:,} are NaN or infinite" if self.not_finite else "")


def _compare_in(dtype: torch.dtype, source: Side, target: Side, tokens: Tensor) -> _Compared:
    """Both sides' logits in a dtype, compared where they are numbers: others prove nothing, and may not differ."""
    expected, first = _logits(source, tokens, dtype)
    actual, second = _logits(target, tokens, dtype)
    one, other = expected.isfinite(), actual.isfinite()
    sides = f"between {first} (source) and {second} (target)"
    bad, other_bad = (int((~finite).sum()) for finite in (one, other))
    if not one.any() and not other.any():
        raise CheckpointError(
            f"logits of random sequences are all NaN or infinite ({bad:,} of {one.numel():,}), so that they prove "
            "nothing of the architecture; repair the weights that are not finite, or convert without --verify"
        )
    if not torch.equal(one, other):
        raise CheckpointError(
            f"logits of random sequences, {sides}: {bad:,} and {other_bad:,} of {one.numel():,} are NaN or infinite, "
            "and not the same ones"
        )
    difference = (expected - actual).abs_().masked_fill_(~one, 0.0).max()
    largest = expected.masked_fill(~one, 0.0).abs_().max()
    return _Compared(dtype, sides, float(difference), float(largest), bad, one.numel())


def has_library() -> bool:
    """Whether transformers can be imported."""
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


def _logits(side: Side, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, str]:
    """[B, S] ▶ [B, S, V] in a dtype, and who computed them."""
    if side.folder is None or not has_library():
        return _own_logits(side.source, tokens, dtype), "megalm"
    return _library_logits(side, side.folder, tokens, dtype)


@torch.inference_mode()
def _own_logits(source: WeightSource, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    model = _shortened(source.info.model, tokens.shape[-1])
    whole = build_full_model(model, model.vocab_size or 1, dtype=dtype).eval()
    for declared in whole.tensors():
        declared.tensor.copy_(source.read(declared.name))
    logits: Tensor = whole(tokens)
    return logits


def _shortened(model: Model, length: int) -> Model:
    """The same function of sequences up to a length: a table of angles for more would only take memory."""
    if model.position != "rotary":
        return model
    if model.rotary_scaling in ("llama3", "yarn") and model.rotary_original_length is None:
        original = model.sequence_length / model.rotary_factor
        # Of what the angles depend on, nothing may follow from the length any more.
        return (
            model
            if not original.is_integer()
            else _shortened(replace(model, rotary_original_length=int(original)), length)
        )
    return replace(model, sequence_length=length)


@torch.inference_mode()
def _library_logits(side: Side, folder: Path, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, str]:
    what = "what was written" if side.is_new else "the source"
    with _silence():
        import transformers

        kind = transformers.AutoModelForCausalLM if side.source.info.model.causal else transformers.AutoModelForMaskedLM
        try:
            loaded: Any = kind.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # whatever the library raises, it could not load the folder
            raise CheckpointError(f"{LIBRARY} cannot load {what}: {error}") from None
        model, loading = loaded
        if side.is_new and (problems := {kind: names for kind, names in loading.items() if names}):
            raise CheckpointError(f"{LIBRARY} did not find what it wanted in what was written: {problems}")
        try:
            logits: Tensor = model.eval()(input_ids=tokens).logits.to(dtype)
        except Exception as error:  # nor has it to be able to compute what it could load
            raise CheckpointError(f"{LIBRARY} cannot compute logits of {what}: {error}") from None
    return logits, f"{LIBRARY} {transformers.__version__}"


@contextmanager
def _silence() -> Iterator[None]:
    """Silence the library's progress bars, warnings and advice."""
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
