"""``megalm generate``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megalm.cli.command import add_run, parse, tell_unused
from megalm.cli.table import COMMANDS
from megalm.config.arguments import user_path
from megalm.config.violation import format_value
from megalm.errors import ConfigError, ExitCode
from megalm.generate.asked import BATCH_SIZE, AskedModel
from megalm.generate.chat import HELP, check_chat, converse, read_from_terminal
from megalm.generate.job import AskingJob, run_asking
from megalm.generate.output import as_objects, output_file
from megalm.generate.progress import AskingProgress
from megalm.generate.prompts import Prompt, Settings, check_settings, read_prompts, requests_of, text_prompt
from megalm.generate.requests import Completion, GenerateRequest, Sampling
from megalm.runs.find import FoundModel, find_model

_CHUNK = 16
"""Batches that ranks are told of at a time: enough to keep rows full, few enough that an interruption costs little."""

_PROG = "megalm generate"


def main(arguments: Sequence[str], prog: str) -> int:  # noqa: ARG001 - ranks of a launcher have no other name for it
    """Run the command. Returns its exit code."""
    return run_asking("megalm.cli.generate:JOB", read, arguments)


@dataclass(frozen=True)
class Generate:
    """What is to be generated, checked.

    Attributes:
        found: the model.
        options: of the command line.
        settings: of every prompt.
        prompts: that are to be continued; none in a conversation.
        requests: of the prompts.
    """

    found: FoundModel
    options: argparse.Namespace
    settings: Settings
    prompts: list[Prompt]
    requests: list[GenerateRequest]

    @property
    def overrides(self) -> Sequence[str]:
        """Of the command line."""
        return tuple(self.options.overrides)

    @property
    def batch_size(self) -> int:
        """Rows that a replica computes together: no more than there are."""
        rows = max(self.settings.samples, self.settings.beams) * max(len(self.prompts), 1)
        return min(self.options.batch_size, rows)

    def drive(self, model: AskedModel) -> ExitCode:
        """Show or write what the model makes of them."""
        if self.options.chat:
            if sys.stdin.isatty():
                print(HELP, file=sys.stderr)
            converse(model, self.settings, system=self.options.system, read_line=read_from_terminal)
        elif self.options.input is None:
            self._show(model)
        else:
            self._write(model)
        return ExitCode.DONE

    def _show(self, model: AskedModel) -> None:
        prompt, single = self.options.prompt, self.settings.samples == 1
        streams = single and self.settings.beams == 1 and not self.options.json and sys.stdout.isatty()
        if streams:
            sys.stdout.write(prompt)
            completions = model.generate(self.requests, on_text=lambda _request, _sample, piece: _put(piece))[0]
            _put("\n")
        else:
            completions = model.generate(self.requests)[0]
        if self.options.json:
            for each in as_objects({"prompt": prompt}, completions):
                print(json.dumps(each, ensure_ascii=False))
            return
        for number, completion in enumerate(completions, 1):
            if not single:
                print(f"--- {number} of {len(completions)}" + _score(completion))
            if not streams:
                print(prompt + completion.text)
            if completion.probabilities is not None:
                print(_table(model, completion))

    def _write(self, model: AskedModel) -> None:
        path, settings = Path(self.options.output), self.settings
        made_by = {
            "checkpoint": str(self.found.checkpoint),
            "weights": self.found.weights_hash,
            "prompts": [len(self.prompts), _digest(self.prompts)],
            "dtype": self.found.config.engine.dtype,
            **_plain(settings),
        }
        with output_file(path, made_by, prompts=len(self.prompts), samples=settings.samples) as file:
            start = file.done
            if start:
                print(f"{path}: goes on behind {start:,} of {len(self.prompts):,} prompts", file=sys.stderr)
            chunk = _CHUNK * self.batch_size * max(self.found.world_size, 1)
            with AskingProgress("generate", len(self.prompts), "prompts", start) as progress:
                for first in range(start, len(self.prompts), chunk):
                    requests = self.requests[first : first + chunk]

                    def done(number: int, completions: list[Completion], first: int = first) -> None:
                        file.add(first + number, as_objects(self.prompts[first + number].fields, completions))
                        progress.add(1, sum(len(each.tokens) for each in completions))

                    model.generate(requests, on_done=done)
            print(progress.summary(), file=sys.stderr)


def read(arguments: Sequence[str], world_size: int | None) -> Generate:
    """Read and check the command line, and the prompts.

    Raises:
        ConfigError, DataError, CheckpointError: what is wrong with them, or with the run.
    """
    options = parse(_PROG, COMMANDS["generate"].help, arguments, _add_options)
    settings = _checked(options, world_size)
    if world_size is None:
        tell_unused("generate", options.overrides)
    found = find_model(options.run, options.overrides, world_size)
    found.check_causal()
    prompts: list[Prompt] = []
    if options.chat:
        check_chat(found.tokenizer, settings, options.system)
    elif options.input is not None:
        prompts = read_prompts(Path(options.input), found.tokenizer)
    else:
        prompts = [text_prompt(found.tokenizer, options.prompt)]
    return Generate(found, options, settings, prompts, requests_of(found, prompts, settings))


def _checked(options: argparse.Namespace, world_size: int | None) -> Settings:
    """The settings of every prompt.

    Raises:
        ConfigError: everything that is wrong with the options, one line each.
    """
    problems = _contradictions(options, world_size)
    settings = Settings()
    try:
        sampling = _sampling(options)
    except ConfigError as error:
        problems += error.lines
        sampling = Sampling()
    try:
        settings = Settings(
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            stop=tuple(options.stop),
            samples=options.samples,
            beams=options.beams,
            length_penalty=options.length_penalty,
            alternatives=options.logprobs,
            slides=options.slide,
        )
        check_settings(settings)
    except ConfigError as error:
        problems += error.lines
    if problems:
        raise ConfigError(problems)
    return settings


def _sampling(options: argparse.Namespace) -> Sampling:
    temperature = options.temperature
    if temperature is None:
        temperature = 0.0 if options.beams > 1 else 0.8
    return Sampling(
        temperature=temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )


def _contradictions(options: argparse.Namespace, world_size: int | None) -> list[str]:
    """Options that do not go together, one line each."""
    problems = []
    given = [name for name in ("prompt", "input", "chat") if getattr(options, name) not in (None, False)]
    if len(given) != 1:
        named = " and ".join(f"--{name}" for name in given) or "no prompt"
        problems.append(f"{named}: one of --prompt TEXT, --input FILE and --chat")
    if (options.input is None) != (options.output is None):
        problems.append("--input and --output: both, or neither: prompts are read from one file, texts go to the other")
    elif options.output is not None and not Path(options.output).absolute().parent.is_dir():
        problems.append(f"--output={options.output}: there is no folder {Path(options.output).parent}; make it")
    if options.system is not None and not options.chat:
        problems.append(f"--system={format_value(options.system)}: of a conversation; --chat")
    if options.chat and world_size is not None:
        problems.append("--chat: needs a terminal, which ranks of a launcher have not; start megalm without it")
    if options.batch_size < 1:
        problems.append(f"--batch-size={options.batch_size}: not a number of rows; 1 or above")
    return problems


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    what = parser.add_argument_group("what is continued, one of")
    what.add_argument("--prompt", metavar="TEXT", help="any text, quoted for the shell alone")
    what.add_argument(
        "--input", type=user_path, metavar="FILE", help='JSON Lines: {"prompt": "…"} or {"messages": […]} on each'
    )
    what.add_argument("--chat", action="store_true", help="a conversation, with the run's chat template")
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="FILE",
        help="where the texts of --input go, in order; resumed if interrupted",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message of --chat")
    parser.add_argument("--json", action="store_true", help="print objects as in --output")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default: 120, or what the model has room for after the prompt"
    )
    how.add_argument("--temperature", type=float, metavar="T", help="default: 0.8; 0: greedy")
    how.add_argument("--top-k", type=int, default=40, metavar="K", help="default: %(default)s; 0: no limit")
    how.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus; default: %(default)s, no limit")
    how.add_argument("--min-p", type=float, default=0.0, metavar="P", help="default: %(default)s, no limit")
    how.add_argument("--repetition-penalty", type=float, default=1.0, metavar="F", help="default: %(default)s, none")
    how.add_argument("--beams", type=int, default=1, metavar="N", help="beam search; default: %(default)s, none")
    how.add_argument("--length-penalty", type=float, default=1.0, metavar="A", help="of beams; default: %(default)s")
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be given repeatedly")
    how.add_argument("--samples", type=int, default=1, metavar="N", help="texts per prompt; default: %(default)s")
    how.add_argument("--seed", type=int, default=1234, metavar="S", help="of the draws; default: %(default)s")
    how.add_argument(
        "--logprobs", type=int, metavar="N", help="report each token's log-probability, and the N likeliest tokens"
    )
    how.add_argument(
        "--slide", action="store_true", help="go on past the model's longest sequence, which sees its later part"
    )
    how.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, metavar="N", help="rows computed together; default: %(default)s"
    )


def _put(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _score(completion: Completion) -> str:
    return "" if completion.score is None else f", score {completion.score:.4f}"


def _table(model: AskedModel, completion: Completion) -> str:
    """Each token with its log-probability, and the likeliest in its place."""

    def spelt(token: int) -> str:
        return format_value(model.tokenizer.decode([token]) or model.tokenizer.name_of(token))

    lines = []
    for token, told in zip(completion.tokens, completion.probabilities or (), strict=True):
        others = "  ".join(f"{spelt(other)} {value:.3f}" for other, value in told.alternatives)
        lines.append(f"{told.log_probability:9.4f}  {spelt(token):20}  {others}".rstrip())
    return "\n".join(lines)


def _plain(settings: Settings) -> dict[str, object]:
    values = asdict(settings)
    return {**values.pop("sampling"), **values, "stop": list(settings.stop)}


def _digest(prompts: Sequence[Prompt]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.tokens}\n".encode())
    return digest.hexdigest()


JOB = AskingJob("megalm.cli.generate:JOB", read)
