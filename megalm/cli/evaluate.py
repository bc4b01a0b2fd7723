"""``megalm evaluate``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.cli.command import add_run, parse, tell_unused
from megalm.cli.memorisation import MemorisationJob
from megalm.cli.table import COMMANDS
from megalm.cli.task_options import add_task_options, tasks_of_options
from megalm.cli.task_results import show_comparison, show_results
from megalm.config.arguments import user_path
from megalm.errors import ConfigError, ExitCode
from megalm.evaluate.perplexity import check_split, split_result, text_result
from megalm.evaluate.tasks.compare import compare_results
from megalm.evaluate.tasks.load import LoadedTask
from megalm.evaluate.tasks.requests import PreparedTask, prepare_tasks
from megalm.evaluate.tasks.results import metrics_row, save_results
from megalm.evaluate.tasks.run import TaskResult, evaluate_tasks
from megalm.evaluate.text import RawText, check_stride
from megalm.generate.asked import BATCH_SIZE, AskedModel
from megalm.generate.job import AskingJob, run_asking
from megalm.generate.open import opened
from megalm.generate.progress import AskingProgress
from megalm.runs.find import FoundModel, find_model
from megalm.training.evaluated import record_evaluation

_PROG = "megalm evaluate"


def main(arguments: Sequence[str], prog: str) -> int:  # noqa: ARG001 - ranks of a launcher have no other name for it
    """Run the command. Returns its exit code."""
    return run_asking("megalm.cli.evaluate:JOB", read, arguments)


@dataclass(frozen=True)
class Evaluate:
    """What is to be measured, checked.

    Attributes:
        found: the model.
        options: of the command line.
        overrides: of the command line, but for a second run.
        tasks: that the model is asked; none: it is evaluated on text.
        text: whose perplexity is asked for; None: that of the validation split.
        memorisation: the task that asks for what the run has read; None: it is not asked.
        other: the model that it is compared with, and the same tasks for its tokenizer; None: there is none.
    """

    found: FoundModel
    options: argparse.Namespace
    overrides: Sequence[str]
    tasks: list[PreparedTask]
    text: RawText | None
    memorisation: MemorisationJob | None
    other: tuple[FoundModel, list[PreparedTask]] | None

    @property
    def batch_size(self) -> int:
        """Rows that a replica computes together."""
        return self.options.batch_size or BATCH_SIZE

    def drive(self, model: AskedModel) -> ExitCode:
        """Measure, and show what was found."""
        if self.memorisation is not None:
            return self.memorisation.drive(model, self.overrides, as_json=self.options.json)
        if not self.tasks:
            self._perplexity(model)
            return ExitCode.DONE
        as_json = self.options.json
        if self.other is None:
            self._results(model, self.found, self.tasks, as_json=as_json)
            return ExitCode.DONE
        results = self._results(model, self.found, self.tasks)
        other, tasks = self.other
        model.close()  # room for the other one
        with opened(other, self.overrides, batch_size=self.batch_size) as second:
            others = self._results(second, other, tasks)
        names = str(self.found.checkpoint), str(other.checkpoint)
        show_comparison(names, compare_results(results, others), as_json=as_json)
        return ExitCode.DONE

    def _results(
        self, model: AskedModel, found: FoundModel, tasks: list[PreparedTask], *, as_json: bool = False
    ) -> list[TaskResult]:
        """Ask tasks, show what came of them, and keep it in the run; what cannot be kept is shown all the same."""
        results = _asked(model, tasks)
        files: list[Path] = []
        try:
            files = save_results(found.run, results, found.config)
            if (problem := record_evaluation(found, metrics_row(results))) is not None:
                print(problem, file=sys.stderr)
        finally:
            if as_json or not self.options.json:
                show_results(results, found.config, files, as_json=as_json)
        return results

    def _perplexity(self, model: AskedModel) -> None:
        if self.text is None:
            result = split_result(model)
        else:
            with AskingProgress("evaluate", 0, "windows") as progress:
                result = text_result(model, self.text, self.options.stride, progress.add)
        if self.options.json:
            print(json.dumps(result, ensure_ascii=False))
            return
        for name, value in result.items():
            print(f"{name:15} {_shown(value)}")


def read(arguments: Sequence[str], world_size: int | None) -> Evaluate:
    """Read and check the command line, the tasks and the data.

    Raises:
        ConfigError, DataError, CheckpointError: what is wrong with them, or with the run.
    """
    options = parse(_PROG, COMMANDS["evaluate"].help, arguments, _add_options)
    runs, overrides = _parted(options)
    problems = _contradictions(options, runs, world_size)
    loaded: list[LoadedTask] = []
    memorisation = None
    try:
        loaded, memorisation = tasks_of_options(options)
    except ConfigError as error:
        problems += error.lines
    if memorisation is not None and len(runs) == 2:
        problems.append(f"{' '.join(runs)}: --task={memorisation.name} asks a run for what it has read itself; one run")
    if problems:
        raise ConfigError(problems)
    if world_size is None:
        tell_unused("evaluate --task memorisation" if memorisation is not None else "evaluate", overrides)
    text = None if options.text is None else RawText.read(Path(options.text))
    found, *others = [find_model(run, overrides, world_size) for run in runs]
    if loaded or text is not None:
        found.check_causal()
    if not loaded and text is None and memorisation is None:
        check_split(found)
    if text is not None:
        check_stride(options.stride, found.config.model.sequence_length)
    other = (others[0], _prepared(loaded, others[0])) if others else None
    job = None if memorisation is None else MemorisationJob.prepare(memorisation, found)
    return Evaluate(found, options, overrides, _prepared(loaded, found), text, job, other)


def _prepared(loaded: list[LoadedTask], found: FoundModel) -> list[PreparedTask]:
    return prepare_tasks(loaded, found.tokenizer, found.config.model.sequence_length) if loaded else []


def _asked(model: AskedModel, tasks: list[PreparedTask]) -> list[TaskResult]:
    total = sum(task.requests for task in tasks)
    with AskingProgress("evaluate", total, "requests") as progress:
        return evaluate_tasks(model, tasks, progress=progress.add)


def _parted(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The runs, of which the second stands where overrides begin, and the overrides."""
    runs = [
        options.run,
        *[user_path(each) for each in options.overrides if "=" not in each and not each.startswith("~")],
    ]
    return runs, [each for each in options.overrides if "=" in each or each.startswith("~")]


def _contradictions(options: argparse.Namespace, runs: list[str], world_size: int | None) -> list[str]:
    """Options that do not go together, one line each."""
    problems = []
    if len(runs) > 2:
        problems.append(f"{' '.join(runs)}: {len(runs)} runs; one, or two that are compared")
    if len(runs) == 2 and not options.task:
        problems.append(f"{' '.join(runs)}: two runs are compared by --task NAME; megalm compare shows their losses")
    if len(runs) == 2 and world_size is not None:
        problems.append(f"{' '.join(runs)}: two runs are compared without a launcher, one after the other")
    if options.text is not None and options.task:
        problems.append(f"--text={options.text} and --task={' '.join(options.task)}: one of them")
    if options.stride is not None and options.text is None:
        problems.append(f"--stride={options.stride}: of windows over --text FILE")
    return problems


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--text", type=user_path, metavar="FILE", help="perplexity of a text, or of JSON Lines with a field text"
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens from one window over --text to the next; default: none overlap"
    )
    add_task_options(parser)


def _shown(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


JOB = AskingJob("megalm.cli.evaluate:JOB", read)
