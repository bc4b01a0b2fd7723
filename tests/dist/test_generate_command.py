"""``megalm generate`` as users start it: by every launcher of this machine, killed and started again.

``tests/slurm`` has it under srun.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runs import Running
from fork_server import run_megalm, server
from test_launchers import LAUNCHERS

pytestmark = pytest.mark.slow

ALONE = (sys.executable, "-m", "megalm")
SPLIT = ["parallel.tp=2", "launch.ranks=4"]
PROMPTS = ["def forward(", "return ", "", "class Group", "# a", "import torch\n", "self."]
SETTINGS = ["--max-new-tokens", "12", "--temperature", "0.7", "--seed", "3", "--samples", "2"]


def start(command: tuple[str, ...], *arguments: str) -> Running:
    """Start the command; without a launcher it is forked, and so are its ranks: see ``fork_server.py``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if command == ALONE:
        return server().fork(
            run_megalm,
            ["generate", *arguments],
            environment=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    return subprocess.Popen(
        [*command, "generate", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def generate(command: tuple[str, ...], *arguments: str) -> tuple[int, str]:
    """(exit code, everything that was printed)."""
    with start(command, *arguments) as process:
        out, err = process.communicate(timeout=150)
    return process.returncode, out + err


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps({'prompt': prompt, 'id': n})}\n" for n, prompt in enumerate(PROMPTS)))
    return path


@pytest.fixture(scope="module")
def expected(short_runs: tuple[Path, Path], prompts: Path) -> str:
    """What one process writes."""
    output = prompts.with_name("alone.jsonl")
    code, said = generate(ALONE, str(short_runs[0]), "--input", str(prompts), "--output", str(output), *SETTINGS)
    assert code == 0, said
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == [(n, s) for n in range(len(PROMPTS)) for s in (0, 1)]
    return output.read_text()


@pytest.mark.parametrize("launcher", ["megalm", *LAUNCHERS])
def test_texts_are_those_of_one_process(
    launcher: str, short_runs: tuple[Path, Path], prompts: Path, expected: str, tmp_path: Path
) -> None:
    command = LAUNCHERS.get(launcher, ALONE)
    if not Path(command[0]).exists():
        pytest.skip(f"{launcher} is not installed beside {sys.executable}")
    layout = SPLIT if launcher == "megalm" else SPLIT[:1]
    output = tmp_path / "out.jsonl"
    files = ["--input", str(prompts), "--output", str(output)]
    code, said = generate(command, str(short_runs[0]), *files, *SETTINGS, *layout)
    assert code == 0, said
    assert output.read_text() == expected
    assert said.count("7 prompts") == 1, "rank 0 alone speaks"


def test_a_file_whose_writer_was_killed_is_gone_on_with(short_runs: tuple[Path, Path], tmp_path: Path) -> None:
    many, output = tmp_path / "many.jsonl", tmp_path / "out.jsonl"
    many.write_text("".join(f"{json.dumps({'prompt': f'def f{n}('})}\n" for n in range(200)))
    arguments = [str(short_runs[0]), "--input", str(many), "--max-new-tokens", "16", "--batch-size", "2"]
    whole = tmp_path / "whole.jsonl"
    assert generate(ALONE, *arguments, "--output", str(whole))[0] == 0
    part = output.with_name("out.jsonl.part")
    with start(ALONE, *arguments, "--output", str(output)) as process:
        deadline = time.monotonic() + 120
        while not (part.exists() and part.read_bytes().count(b"\n") > 20):
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    with part.open("ab") as file:
        file.write(b'{"prompt": "half a li')  # as a machine leaves it that loses power
    kept = part.read_bytes().count(b"\n")
    code, said = generate(ALONE, *arguments, "--output", str(output))
    assert code == 0, said
    assert f"{output}: goes on behind {kept:,} of 200 prompts" in said
    assert output.read_text() == whole.read_text()
    assert not part.exists()


def test_what_can_be_known_before_a_rank_starts_is_refused_in_a_line(
    short_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = str(short_runs[0])
    code, said = generate(ALONE, run, "--prompt", "a", "--max-new-tokens", "40", *SPLIT)
    (line,) = said.splitlines()
    assert (code, "max_new_tokens=40 are more than model.sequence_length=32" in line) == (2, True), said
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "tokenizer.json").unlink()
    code, said = generate(ALONE, str(copy), "--prompt", "a", *SPLIT)
    (line,) = said.splitlines()
    assert (code, "tokenizer.json" in line) == (3, True), said
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"prompt": "a"}\n{"text": "a"}\n')
    code, said = generate(ALONE, run, "--input", str(empty), "--output", str(tmp_path / "o"), *SPLIT)
    (line,) = said.splitlines()
    assert (code, "line 2" in line) == (3, True), said
