"""Trains runs as ``megalm train`` does, many of them per start of ranks, and ends some before their end."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzzing.draw import CHUNK_TOKENS, Fields, overrides_of
from megalm.errors import MegalmError
from megalm.launch.discovery import LOCAL, RankInfo
from megalm.launch.function_ranks import RankFailure, run_on_ranks
from megalm.launch.signals import StopRequest
from megalm.plan.plan import Plan
from megalm.plan.preflight import make_plan

_SECONDS_TO_START, _SECONDS_PER_RUN = 240.0, 60.0
_LONG_PROMPT_WORDS = 60
_MOST_REPORTED = 3000


class KilledError(BaseException):
    """Ends a rank in the middle of a step, past everything that saves."""


@dataclass(frozen=True)
class Run:
    """One start of a run.

    Attributes:
        fields: its config.
        stop_after: step after which it is to end; None: its last.
        killed: whether it is to end without saving.
    """

    fields: Fields
    stop_after: int | None = None
    killed: bool = False


class _StopAfter(StopRequest):
    """Asks for a stop when so many steps have been taken; every rank counts its own."""

    def __init__(self, steps: int | None, *, killed: bool) -> None:
        super().__init__()
        self._steps, self._killed = steps, killed
        self._asked = 0

    def pending(self) -> str | None:
        """Called once per step, after it."""
        self._asked += 1
        if self._steps is None:
            return None
        if self._killed and self._asked > self._steps:
            raise KilledError
        return "INT" if not self._killed and self._asked >= self._steps else None


def start_all(runs: Sequence[Run]) -> list[str | None]:
    """Start every run; for each, what went wrong, if anything did. Runs of as many ranks share a start of ranks."""
    problems: list[str | None] = [None] * len(runs)
    items: dict[int, list[tuple[int, str, int | None, bool]]] = {}
    for number, run in enumerate(runs):
        try:
            plan = make_plan(overrides_of(run.fields))
        except MegalmError as error:
            problems[number] = f"refused: {error}"
        except Exception as error:
            problems[number] = f"the check fails: {error!r}"
        else:
            items.setdefault(plan.world_size, []).append((number, plan.to_json(), run.stop_after, run.killed))
    for world_size, same in items.items():
        timeout = _SECONDS_TO_START + _SECONDS_PER_RUN * len(same)
        results = run_on_ranks(world_size, train, [item[1:] for item in same], timeout_seconds=timeout)
        for item, result in zip(same, results, strict=True):
            if isinstance(result, RankFailure):
                problems[item[0]] = f"{result.summary}\n{result.report[-_MOST_REPORTED:]}"
    return problems


def train(item: tuple[str, int | None, bool]) -> None:
    """What each rank runs."""
    import torch.distributed as dist

    from megalm.training.setup import run_training

    text, stop_after, killed = item
    plan = Plan.from_json(text)
    if plan.complete:
        return
    rank, size = dist.get_rank(), dist.get_world_size()
    info = RankInfo(
        rank=rank,
        world_size=size,
        local_rank=rank,
        local_world_size=size,
        launcher=LOCAL,
        master_addr="127.0.0.1",
        master_port=0,
    )
    stop = _StopAfter(stop_after, killed=killed)
    try:
        run_training(plan.config, info, stop, plan.start, indexes=plan.indexes)
    except KilledError:
        dist.barrier()


def make_datasets(folder: Path) -> dict[str, str]:
    """A dataset of text and one of prompts and completions, some of them longer than a row; paths by kind."""
    from megalm.data.prepare.corpora import CorpusOptions
    from megalm.data.prepare.executors import Workers
    from megalm.data.prepare.recipe import Recipe
    from megalm.data.prepare.run import prepare

    words = [f"{first}{second}" for first in ("ka", "lo", "mi", "ne") for second in ("ra", "su", "to", "vi", "xe")]
    texts = [" ".join(words[(n * k * k + k) % len(words)] for k in range(20 + n % 30)) for n in range(1, 150)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    rows = [
        {"prompt": " ".join(text.split() * (1 + n % 4))[: 8 * _LONG_PROMPT_WORDS], "completion": words[n % len(words)]}
        for n, text in enumerate(texts)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    paths = {"plain": folder / "plain", "masked": folder / "masked"}
    common: dict[str, Any] = {"chunk_tokens": CHUNK_TOKENS, "val_fraction": 0.1}
    with redirect_stderr(io.StringIO()):
        for recipe, out in (
            (
                Recipe(
                    corpus="jsonl",
                    options=CorpusOptions((str(folder / "text.jsonl"),)),
                    tokenizer_vocab=301,
                    tokenizer_kind="wordpiece",
                    **common,
                ),
                paths["plain"],
            ),
            (
                Recipe(
                    corpus="sft",
                    options=CorpusOptions((str(folder / "chat.jsonl"),)),
                    tokenizer=str(paths["plain"] / "tokenizer.json"),
                    **common,
                ),
                paths["masked"],
            ),
        ):
            prepare(
                recipe,
                out,
                workers=Workers(None, 1),
                overwrite=False,
                progress=lambda *_: None,
                command="tools/fuzz.py",
            )
    return {kind: str(path) for kind, path in paths.items()}
