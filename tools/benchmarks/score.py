"""Log-likelihoods of multiple choice beside lm-evaluation-harness's ``hf``: one model, dtype, threads and batch size.

Both answer the same requests as the harness asks them, in turn, and the ratio is the median of the pairs. What they
answer is compared, too.
"""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.table import Row

BATCH = 16
ITEMS, CHOICES = 12, 4
CONTEXT_TOKENS, CHOICE_TOKENS = (64, 192), (1, 12)
TARGET = 1.3
_SAME = 1e-3

Request = tuple[tuple[str, str], list[int], list[int]]


def rows(folder: Path, run: Path, rounds: int) -> list[Row]:
    """The ratio, and the largest difference between the answers.

    Args:
        folder: of a model of Hugging Face's, with a tokenizer.
        run: the same as a run of megalm's.
        rounds: pairs.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    from megalm.evaluate.lm_eval import MegalmLM

    ours = MegalmLM(path=str(run), dtype="fp32", device="cpu", batch_size=BATCH)
    theirs = HFLM(pretrained=str(folder), dtype=torch.float32, device="cpu", batch_size=BATCH)
    requests = _requests(random.Random(1))
    seconds = []
    for _ in range(rounds):
        own, found = _timed(ours, requests)
        other, expected = _timed(theirs, requests)
        seconds.append((own, other))
    difference = max(abs(a - b) for (a, _), (b, _) in zip(found, expected, strict=True))
    name = f"fp32, batch {BATCH}: {ITEMS} items of {CHOICES} choices"
    return [
        Row(f"{name}", statistics.median(b / a for a, b in seconds), "×", TARGET, note="lm-eval's hf time / megalm's"),
        Row(f"{name}: largest difference", difference, "nats", _SAME, at_most=True),
    ]


def _timed(model: Any, requests: list[Request]) -> tuple[float, list[tuple[float, bool]]]:
    started = time.perf_counter()
    answers = model._loglikelihood_tokens(requests, disable_tqdm=True)
    return time.perf_counter() - started, answers


def _requests(draw: random.Random) -> list[Request]:
    """Items as the harness has them: each choice is a request with the item's whole context."""
    requests = []
    for _ in range(ITEMS):
        context = [draw.randrange(4000) for _ in range(draw.randint(*CONTEXT_TOKENS))]
        for _ in range(CHOICES):
            choice = [draw.randrange(4000) for _ in range(draw.randint(*CHOICE_TOKENS))]
            requests.append((("", ""), context, choice))
    return requests
