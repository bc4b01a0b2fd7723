"""README and docs are true: links lead somewhere, commands parse or compose, Python runs, made pages are current."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from megalm.cli.command import add_run, parse
from megalm.cli.main import COMMANDS, main
from megalm.config.compose import compose
from megalm.errors import ConfigError, ExitCode

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
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
THEORY = [
    block for language, block in FENCE.findall((REPOSITORY / "docs/theory.md").read_text()) if language == "python"
]
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
    for line in "\n".join(code).splitlines():
        found = re.match(r"(?:\$ )?(?:.* -m )?megalm (\w+) ([^#\n]*\S)\s*(?:#.*)?$", line)
        if found and found.group(1) in COMMANDS and not re.search(r"[…]|RUN|PATH|COMMAND|\.\.\.", line):
            yield f"{found.group(1)} {found.group(2)}"


EXAMPLES = sorted({command for page in PAGES if page.name not in MADE_OF_CODE for command in _commands(page)})


def test_enough_examples_are_found() -> None:
    assert len(EXAMPLES) > 30
    assert {command.split()[0] for command in EXAMPLES} >= {
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


@pytest.mark.parametrize("command", EXAMPLES)
def test_every_command_is_one(command: str) -> None:
    name, *arguments = shlex.split(command)
    module = import_module(f"megalm.cli.{name}")
    if name in ("train", "check", "verify"):
        if re.search(r"mine|bare|min |many|team|my\.yaml|now:|hydra", command):
            return  # of the user's own files in docs/settings.md, which tests/cli/test_own_settings.py makes
        with contextlib.suppress(ConfigError) if name == "check" else contextlib.nullcontext():
            compose([re.sub(r"=([^\[]*?),.*", r"=\1", setting) for setting in arguments if not setting.startswith("-")])
    elif name == "evaluate":
        parse(f"megalm {name}", "", arguments, add_run)
    elif hasattr(module, "_add_options"):
        parse(f"megalm {name}", "", arguments, module._add_options)
    elif hasattr(module, "_parser"):
        module._parser(f"megalm {name}").parse_args(arguments)
    else:
        assert name in ("inspect", "compare")


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
    for value in re.findall(r"tensor\(([-+.\de]+)", printed):
        assert abs(float(value)) < 1e-4, f"a difference that should be rounding: {printed}"
    lists = re.findall(r"tensor\(\[([^\]]+)\]\).*\[([^\]]+)\]", printed)
    for got, want in lists:
        assert [float(x) for x in got.split(",")] == pytest.approx([float(x) for x in want.split(",")], rel=1e-3)


def test_the_functions_that_theory_names_are_there() -> None:
    text = _text(REPOSITORY / "docs/theory.md")
    named = re.findall(r"`(megalm/[\w/]+\.py)` \(`?([A-Za-z_]+)`?", text)
    assert len(named) > 8
    for file, name in named:
        source = (REPOSITORY / file).read_text()
        assert re.search(rf"(def|class) {name}\b", source) or name in ("each", "executes", "stages", "the", "labels"), (
            file,
            name,
        )


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
