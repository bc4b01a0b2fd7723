"""The README is true: its folders exist, its check commands do what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megalm.cli.main import main
from megalm.config.compose import compose

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```\n(.*?)```", README, flags=re.DOTALL))
CHECKS = re.findall(r"^(?:\$ )?megalm check +(.*)$", BLOCKS, flags=re.MULTILINE)
TRAININGS = re.findall(r"megalm train +(.*)$", BLOCKS, flags=re.MULTILINE)


def test_it_shows_both_commands_and_how_to_launch() -> None:
    for text in ("make train", "make test", "torchrun --nproc-per-node", "mpirun -np", "sbatch --nodes"):
        assert text in README


@pytest.mark.parametrize("arguments", CHECKS)
def test_check_commands_print_what_it_shows(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check", *shlex.split(arguments)])
    output = capsys.readouterr()
    assert code in (0, 2)
    for line in output.err.splitlines():
        assert line in README, "the README shows every violation as it is printed"


@pytest.mark.parametrize("arguments", TRAININGS)
def test_train_commands_compose(arguments: str) -> None:
    compose(shlex.split(arguments))


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(path: str) -> None:
    assert (REPOSITORY / path).exists()


def test_the_folders_it_names_exist() -> None:
    block = README.split("## Layout of the folders")[1].split("```")[1]
    for name in re.findall(r"\b([a-z_]+)/", block):
        found = [
            *REPOSITORY.glob(name),
            *(REPOSITORY / "megalm").glob(f"**/{name}"),
            *(REPOSITORY / "tests").glob(name),
        ]
        found += list((REPOSITORY / "conf").glob(name))
        assert found, name
