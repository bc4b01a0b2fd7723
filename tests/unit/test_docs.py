"""README and docs are true: links lead somewhere, commands parse or compose, Python runs, made pages are current."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from megalm.cli.command import parse
from megalm.cli.main import main
from megalm.cli.table import COMMANDS
from megalm.config.compose import compose
from megalm.config.schema import Config
from megalm.errors import ExitCode

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [
    *(
        REPOSITORY / name
        for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "slurm/README.md")
    ),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    REPOSITORY / "tests" / "README.md",
]
MADE_OF_CODE = ("commands.md", "config.md", "exit-codes.md")
TRUE_NOW = [page for page in PAGES if page.name not in (*MADE_OF_CODE, "CHANGELOG.md", "settings.md")]
"""Pages written by hand that speak of the present and of this checkout, not of a user's files."""
WRITTEN_BY_RUNS = {
    *(
        "tasks/step",
        "config.yaml",
        "attempts/",
        "attempts/N.yaml",
        "checkpoints/",
        "logs/",
        "runs/NAME/",
        "tensorboard/",
        "wandb/",
        "train/",
        "val/",
        "results/",
    ),
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
THEORY = [
    block for language, block in FENCE.findall((REPOSITORY / "docs/theory.md").read_text()) if language == "python"
]
WHAT_THEORY_PRINTS = {
    1: "409[56]",
    3: r"attention\.qkv\.weight': \(64, 32\)",
    5: "mlm 0.15 False",
    6: r"\[\(4, 8\), \(4, 8\), \(4, 8\), \(4, 8\)\]",
    7: "gpipe 0.273 of 0.273\n1f1b 0.273 of 0.273\nzb_h1 0.111",
    9: "0 2608 GiB.*\n1 682 GiB.*\n2 362 GiB.*\n3 41 GiB",
}
"""Of blocks whose lines are no difference or pair of lists: what follows from the formula by hand."""
PYTHON = [
    block for language, block in FENCE.findall((REPOSITORY / "docs/python.md").read_text()) if language == "python"
]


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _commands(page: Path) -> Iterator[str]:
    """Command lines of megalm in blocks and in cells of tables, without prompts, comments and continuations."""
    text = _text(page).replace("\\\n", " ")
    code = [block for language, block in FENCE.findall(text) if language in ("", "sh")]
    code += re.findall(r"\| `(megalm [^`]+)` \|", text)
    code += re.findall(r"^    (.*)$", text, re.MULTILINE)
    code += re.findall(r"\| `(sbatch [^`]+)` \|", text)
    job = re.compile(r"^sbatch .*slurm/train\.sbatch ", re.MULTILINE)
    for line in job.sub("megalm train ", "\n".join(code)).splitlines():
        found = re.match(r"(?:\$ )?(?:.* -m )?megalm (\w+) ([^#\n]*\S)\s*(?:#.*)?$", line)
        if found and found.group(1) in COMMANDS and not re.search(r"[…]|RUN|PATH|COMMAND|\.\.\.", line):
            yield f"{found.group(1)} {found.group(2)}"


EXAMPLES = sorted(
    {(command, page.name) for page in PAGES if page.name not in MADE_OF_CODE for command in _commands(page)}
)


def test_enough_examples_are_found() -> None:
    assert len(EXAMPLES) > 30
    assert {command.split()[0] for command, _ in EXAMPLES} >= {
        "train",
        "check",
        "prepare",
        "convert",
        "inspect",
        "compare",
        "data",
    }
    for text in ("make train", "make test", "torchrun --nproc-per-node", "mpirun -np", "sbatch --nodes"):
        assert text in _text(REPOSITORY / "README.md")


@pytest.mark.parametrize(("command", "page"), EXAMPLES)
def test_every_command_is_one(
    command: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    name, *arguments = shlex.split(command)
    module = import_module(f"megalm.cli.{name}")
    if name == "check" or (page == "settings.md" and name in ("train", "verify")):
        return  # the next test runs check; tests/cli/test_own_settings.py has the user's own files of settings.md
    if name in ("train", "verify"):
        compose([re.sub(r"=([^\[]*?),.*", r"=\1", setting) for setting in arguments if not setting.startswith("-")])
    elif hasattr(module, "_add_options"):
        parse(f"megalm {name}", "", arguments, module._add_options)
    elif hasattr(module, "_parser"):
        module._parser(f"megalm {name}").parse_args(arguments)
    else:
        monkeypatch.chdir(tmp_path)  # where no run is: options are read first, and then there is no such run
        assert main([name, *arguments]) in (ExitCode.BAD_CONFIG, ExitCode.BAD_DATA)
        assert "no such" in capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_check_commands_print_what_the_page_shows(page: Path, capsys: pytest.CaptureFixture) -> None:
    for command in _commands(page):
        name, *arguments = shlex.split(command)
        if name != "check" or page.name == "settings.md" or "--" in command:
            continue
        assert main(["check", *arguments]) in (ExitCode.DONE, ExitCode.BAD_CONFIG)
        for line in capsys.readouterr().err.splitlines():
            assert line in _text(page), "every violation is shown as it is printed"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    outside_code = FENCE.sub("", _text(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", outside_code):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        found = page if not path else page.parent / path
        assert found.exists(), f"{target} in {page.name}"
        if anchor:
            headings = re.findall(r"^#+ +(.*)$", _text(found), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


def test_every_page_is_in_the_index_and_in_the_site() -> None:
    index, site = _text(REPOSITORY / "docs/index.md"), _text(REPOSITORY / "mkdocs.yml")
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name
        assert f"- {page.name}" in site, page.name


@pytest.mark.parametrize("number", range(len(THEORY)))
def test_the_lines_of_theory_run_and_agree_with_their_formula(number: int) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(THEORY[number], f"theory.md, block {number}", "exec"), {})
    printed = out.getvalue()
    assert printed.strip()
    assert re.search(WHAT_THEORY_PRINTS.get(number, ""), printed), printed
    for value in re.findall(r"tensor\(([-+.\de]+)", printed):
        assert abs(float(value)) < 1e-4, f"a difference that should be rounding: {printed}"
    lists = re.findall(r"tensor\(\[([^\]]+)\]\).*\[([^\]]+)\]", printed)
    for got, want in lists:
        assert [float(x) for x in got.split(",")] == pytest.approx([float(x) for x in want.split(",")], rel=1e-3)


def test_the_functions_that_theory_names_are_there() -> None:
    named = re.findall(r"`(megalm/[\w/]+\.py)` \(([^)]*)\)", _text(REPOSITORY / "docs/theory.md"))
    assert len(named) > 8
    for file, words in named:
        defined = {
            node.name
            for node in ast.walk(ast.parse((REPOSITORY / file).read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert set(re.findall(r"`(\w+)`", words)) <= defined, (file, words)


@pytest.mark.parametrize("page", TRUE_NOW, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_files_and_fields_that_a_page_names_are_there(page: Path) -> None:
    groups = {
        name: {field.name for field in dataclasses.fields(group)}
        for name, group in typing.get_type_hints(Config).items()
    }
    for quoted in re.findall(r"`([^`\n]+)`", FENCE.sub("", _text(page))):
        for group, field in re.findall(r"(?<![\w./])([a-z]+)\.([a-z_]+)=", quoted):
            assert group not in groups or field in groups[group], f"{quoted}: no such field"
        if quoted in WRITTEN_BY_RUNS or re.search(r"\b(NAME|TASK)\b", quoted):  # or of the user's naming
            continue
        if re.fullmatch(r"[\w/]+\.(py|yaml|toml|sbatch)|[\w]+/[\w/]*", quoted):
            tops = (REPOSITORY, REPOSITORY / "megalm", REPOSITORY / "tests", page.parent)
            assert any((top / quoted).exists() for top in tops), f"{quoted}: no such file"


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    said = [
        node.value
        for file in (REPOSITORY / "megalm").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    messages = re.findall(r"^\| `([^`]+)` \|", _text(REPOSITORY / "docs/troubleshooting.md"), re.MULTILINE)
    assert len(messages) > 15
    for message in messages:
        for part in filter(None, (part.strip() for part in message.split("…"))):
            assert any(part in text for text in said), f"{part!r}: no message says so"


def test_the_python_of_the_docs_runs(
    short_runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(short_runs[0])
    (tmp_path / "runs" / "from python").symlink_to(short_runs[1])
    assert len(PYTHON) == 3
    for block in (PYTHON[0], PYTHON[2]):  # training is what tests/unit/test_api.py does
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, "python.md", "exec"), {})
        assert out.getvalue().strip()
    assert (tmp_path / "curves.png").exists()
    assert "megalm.train(config)" in PYTHON[1]


def test_both_first_pages_have_the_same_commands() -> None:
    english, chinese = _text(REPOSITORY / "README.md"), _text(REPOSITORY / "README.zh-CN.md")

    def rows(text: str) -> list[str]:
        return re.findall(r"^\| [^|]* \| (`[^|]+`) \|", text, re.MULTILINE)

    assert rows(english) == rows(chinese)
    assert len(rows(english)) > 12
    printed = [block for _, block in FENCE.findall(english) if block.startswith("$ make train")]
    assert len(printed) == 1
    assert printed == [block for _, block in FENCE.findall(chinese) if block.startswith("$ make train")]
    launch = [block for _, block in FENCE.findall(english) if block.startswith(("torchrun", "make "))]
    strip = lambda block: re.sub(r" *#.*", "", block)  # noqa: E731 - comments are translated
    assert {strip(block) for block in launch if not block.startswith("make train\n")} <= {
        strip(block) for _, block in FENCE.findall(chinese)
    }


def test_pages_made_of_code_are_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tools/docs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "theory" / "index.html").exists()
