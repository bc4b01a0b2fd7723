#!/usr/bin/env python3
"""Write an experiment on in-context learning: a small model learns arithmetic whose operation only examples tell.

    tools/in_context.py --questions two_digit_addition.jsonl --out experiment

A document has lines such as ``98#45=143``, numbers with all of their digits, so that lines are alike. What ``#`` means
is drawn for each document and named nowhere: the sum, the first number, or the second. A model that has read many such
documents can know of a line without examples only how often each operation comes; lines before it say which one this
is. The questions are of GPT-3's two-digit addition (Brown et al. 2020, section 3.9.1; ``{"context": "Q: What is 98 plus
45?…", "completion": " 143"}``); neither their pairs of numbers nor the same the other way round stand in the text,
whatever the operation.

Written are ``text.jsonl`` (for megalm prepare), ``questions.jsonl`` and the task ``unnamed_addition.yaml``; then the
commands are printed that train the model and ask it. The vocabulary is of single bytes, so that each digit is a token.

Exit codes: 0 done, 2 bad arguments, 3 questions that cannot be read.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# For a checkout that is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from megalm.config.arguments import LineParser, user_path
from megalm.errors import ConfigError, DataError
from megalm.launch.guard import guarded

Pair = tuple[int, int]

OPERATIONS: dict[str, tuple[Callable[[int, int], int], int]] = {
    "first": (lambda a, b: a, 9),  # noqa: ARG005
    "sum": (lambda a, b: a + b, 8),
    "second": (lambda a, b: b, 3),  # noqa: ARG005
}
"""Name ▶ the operation and its weight. The sum is not the commonest, so that it is no good guess without examples."""

LINES = 12
"""Of a document, which has 120 tokens with its end: a sequence of the model."""
NUMBERS = range(100)
_QUESTION = re.compile(r"\bWhat is (\d{1,2}) plus (\d{1,2})\?")

TASK = """\
# Sums whose operation is not named: "98#45=", as in the text of tools/in_context.py.
about: addition that only the examples name
kind: generation
data: {data}
prompt: "{{{{ a }}}}#{{{{ b }}}}="
target: "{{{{ sum }}}}"
separator: ""
example_separator: "\\n"
max_new_tokens: 4
stop: ["\\n"]
metrics:
  - exact_match: {{normalise: none}}
"""
COMMANDS = """\
megalm prepare --corpus jsonl --input {out}/text.jsonl --tokenizer-vocab 257 --val-fraction 0.01 --chunk-tokens 1200 \\
  --out {out}/data
megalm train experiment=quickstart parallel=single engine=fp32_zero1 data.path={out}/data run.name=in_context \\
  model.num_layers=3 model.hidden_size=128 model.sequence_length=120 train.global_batch_size=32 \\
  train.micro_batch_size=16 train.steps=2000 optim.lr=2e-3 train.validate_every=500 launch.ranks=2 \\
  report.prompt=null
for k in 0 1 8; do megalm evaluate runs/in_context --task {out}/unnamed_addition.yaml --examples $k; done"""


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--questions", type=user_path, required=True, metavar="FILE", help="of GPT-3's addition")
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--documents", type=int, default=60_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.documents < 1:
        parser.error("--documents: at least 1")
    return guarded(lambda: write(Path(options.questions), Path(options.out), options.documents, options.seed))


def write(questions: Path, out: Path, documents: int, seed: int) -> int:
    """Write the experiment into a new folder.

    Raises:
        ConfigError: the folder is there.
        DataError: a question is not of addition.
    """
    asked = read_pairs(questions)
    if out.exists():
        raise ConfigError(f"--out={out}: exists; a new folder")
    out.mkdir(parents=True)
    rows = ({"a": f"{a:02}", "b": f"{b:02}", "sum": f"{a + b:03}"} for a, b in asked)
    (out / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (out / "unnamed_addition.yaml").write_text(TASK.format(data=out / "questions.jsonl"), encoding="utf-8")
    with (out / "text.jsonl").open("w", encoding="utf-8") as file:
        for text in texts(asked, documents, seed):
            file.write(json.dumps({"text": text}) + "\n")
    print(COMMANDS.format(out=out))
    return 0


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of numbers that are asked for, in the order of the file.

    Raises:
        DataError: the file cannot be read, or a line has no question of addition.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        found = _QUESTION.search(line)
        if found is None:
            raise DataError(f"{path}: line {number}: no question such as What is 98 plus 45?")
        pairs.append((int(found[1]), int(found[2])))
    return pairs


def texts(asked: list[Pair], documents: int, seed: int) -> Iterator[str]:
    """Documents of one operation each, without the pairs that are asked for."""
    held_out = {*asked, *((b, a) for a, b in asked)}
    pairs = [(a, b) for a in NUMBERS for b in NUMBERS if (a, b) not in held_out]
    draw = random.Random(seed)
    operations = [operation for operation, _ in OPERATIONS.values()]
    weights = [weight for _, weight in OPERATIONS.values()]
    for _ in range(documents):
        (operation,) = draw.choices(operations, weights)
        yield "\n".join(f"{a:02}#{b:02}={operation(a, b):03}" for a, b in draw.choices(pairs, k=LINES))


if __name__ == "__main__":
    sys.exit(main())
