"""``megalm evaluate RUN --task memorisation``: what a model gives word for word, and where it is from. No torch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.cli.task_results import print_json, print_table
from megalm.errors import DataError, ExitCode
from megalm.evaluate.memorisation import results
from megalm.evaluate.memorisation.candidates import Drawn
from megalm.evaluate.memorisation.measure import MemorisationResult, ask
from megalm.evaluate.memorisation.passages import Passages, count_all, draw_all
from megalm.evaluate.memorisation.seen import RunData, data_read_by, notes_of
from megalm.evaluate.memorisation.settings import Memorisation
from megalm.evaluate.tasks.results import save_records
from megalm.generate.asked import AskedModel
from megalm.generate.progress import AskingProgress
from megalm.runs.find import FoundModel
from megalm.training.evaluated import record_evaluation

_SHOWN = 3
"""Documents and steps of one of the worst cases that are shown; the files have more."""
_SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class MemorisationJob:
    """The task, checked, with the data of the run.

    Attributes:
        found: the model.
        settings: of the task.
        data: that the checkpoint's weights have read.
    """

    found: FoundModel
    settings: Memorisation
    data: RunData

    @classmethod
    def prepare(cls, settings: Memorisation, found: FoundModel) -> MemorisationJob:
        """Check that the task can be asked of a model.

        Raises:
            ConfigError: the model is an encoder, or its sequences are shorter than the passages.
            DataError: what its weights have read is not known, or not here.
        """
        found.check_causal()
        settings.check_length(found.config.model.sequence_length)
        return cls(found, settings, data_read_by(found))

    def drive(self, model: AskedModel, overrides: Sequence[str], *, as_json: bool) -> ExitCode:
        """Ask the model, keep what was found, and show it.

        Raises:
            DataError: no training document gives a passage.
        """
        passages = self._passages()
        total = len(passages.all) * len(self.settings.prompt_tokens)
        with AskingProgress("evaluate", total, "prompts") as progress:
            result = ask(model, self.settings, passages, progress.add)
        found = self.found
        record = results.as_json(result, self.data, found.config, found.tokenizer)
        rows = results.items(result, self.data, found.tokenizer)
        (file,) = save_records(found.run, [(record, rows)])
        if (problem := record_evaluation(found, results.metrics_row(record))) is not None:
            print(problem, file=sys.stderr)
        if as_json:
            print_json({"results": [record], "files": [str(file)]})
        else:
            self._show(result, record, overrides, file)
        return ExitCode.DONE

    def _passages(self) -> Passages:
        """What is asked for.

        Raises:
            DataError: no training document gives a passage, or a shard is missing or damaged.
        """
        splits = (*self.data.train, *self.data.held_out)
        with AskingProgress("draw", sum(split.index.documents for split in splits), "documents") as progress:
            training, held_out = draw_all(self.data, self.settings, progress.add)
        if not training.kept.hashes.size:
            raise DataError(self._nothing(training))
        with AskingProgress("search", sum(split.index.tokens for split in self.data.train), "tokens") as progress:
            return count_all(self.data, self.settings, training, held_out, progress.add)

    def _nothing(self, training: Drawn) -> str:
        """Why there is no passage to ask for."""
        settings = self.settings
        if training.unnamed == training.documents:
            wrong = f"documents={settings.documents}: none of {training.documents:,} training documents has this"
            return f"{settings.name}: {wrong} in its name; megalm data show DATASET --documents lists them"
        few = f"{training.too_short:,} of {training.documents:,}"
        return (
            f"{settings.name}: no training document is longer than {settings.passage_tokens} tokens ({few} are looked "
            "at and too short); shorter prompt_tokens or continuation_tokens"
        )

    def _show(
        self,
        result: MemorisationResult,
        record: dict[str, Any],
        overrides: Sequence[str],
        file: Path,
    ) -> None:
        print_table(results.HEADINGS, results.table(result))
        for line in (*results.notes(result), *notes_of(self.found.config)):
            print(line)
        read = sum(answer.passage.times > 0 for answer in result.answers)
        print(f"{result.verbatim:,} of {read:,} passages that were read are continued word for word")
        of_data = [each for each in overrides if each.startswith(("data.", "model.sequence_length="))]
        for number, case in enumerate(record["worst"], start=1):
            print()
            for line in _case_lines(number, case, ["megalm", "data", "show", str(self.found.run), *of_data]):
                print(line)
        print(f"\nkept in  {file}, and its passages in {file.with_suffix('.jsonl').name}")


def _case_lines(number: int, case: dict[str, Any], show: Sequence[str]) -> Iterator[str]:
    """One of the worst cases for people; ``show`` is the command that shows documents of the run."""
    shortest = next(length for length, verbatim in case["verbatim"].items() if verbatim)
    yield f"worst {number}: read {_times(case['times'])}, given word for word after {shortest} tokens"
    yield f"  prompt        {_shown(case['prompt'])}"
    yield f"  continuation  {_shown(case['continuation'])}"
    sources = [source for source in case["sources"] if source["times"]]
    for source in sources[:_SHOWN]:
        where = f"{source['dataset']} {source['shard']}, from its token {source['first']:,} on"
        yield f"  document      {source['document']} ({where}), read {_times(source['times'])}"
    if (more := case["copies"] - len(sources[:_SHOWN])) > 0:
        yield f"                and {more:,} more places; the file names {len(case['sources']):,}"
    steps = ", ".join(f"{step:,}" for step in case["steps"][:_SHOWN])
    yield f"  steps         {steps}{' and more' if len(case['steps']) > _SHOWN or case['more_steps'] else ''}"
    yield f"  trace         {shlex.join([*show, '--document', sources[0]['document']])}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _shown(text: str) -> str:
    """Text on one line, of bounded length."""
    return repr(text) if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]!r} …"
