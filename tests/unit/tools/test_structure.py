"""The structure that ``tools/structure.py`` measures, on a package made for it and on megalm itself."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
TOOL = REPOSITORY / "tools" / "structure.py"

BLOCK = "\n".join(f"    total_{n} = {n} * factor" for n in range(6))

MODULES = {
    "__init__": "",
    "loose": "def one():\n    return 1\n",
    "low/__init__": "",
    "low/a": f"from megalm.low import b\n\n\ndef longest(factor):\n{BLOCK}\n    return factor\n",
    "low/b": "from megalm.high import top\n\n\ndef f():\n    from megalm.low.a import longest\n    return longest\n",
    "high/__init__": "",
    "high/top": f"def same(factor):\n{BLOCK}\n    return None\n",
}

PYPROJECT = """
[[tool.importlinter.contracts]]
type = "layers"
layers = ["megalm.high", "megalm.low"]
"""


def _measured(*folders: Path) -> dict[str, str]:
    done = subprocess.run([sys.executable, TOOL, *folders], capture_output=True, text=True, check=True)
    return dict(
        line.split(maxsplit=1) if ":" in line else (line[:24].strip(), line[24:]) for line in done.stdout.splitlines()
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in MODULES.items():
        path = tmp_path / "megalm" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    return tmp_path


def test_every_figure_of_a_small_package(checkout: Path) -> None:
    figures = _measured(checkout)
    assert figures["files"] == "7"
    assert figures["lines"] == str(sum(text.count("\n") for text in MODULES.values()))
    assert figures["longest function"] == "8 (megalm.low.a.longest)"
    assert figures["circles"] == "1", "a and b, one of them inside a function"
    assert figures["arrows that point up"] == "1", "low.b -> high.top"
    assert figures["loose files"] == "1"
    assert figures["repeated lines"] == "12", "six lines in two places"


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, TOOL, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{tmp_path}: no checkout of megalm" in done.stderr


def test_no_module_of_megalm_is_in_a_circle_and_no_import_points_up() -> None:
    figures = _measured(REPOSITORY)
    assert figures["circles"] == "0"
    assert figures["arrows that point up"] == "0"


def test_every_module_that_says_it_needs_no_torch_is_held_to_it() -> None:
    """A docstring is no proof: the import contract is."""
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (held,) = (contract["source_modules"] for contract in contracts if "torch" in contract.get("forbidden_modules", ()))
    says = []
    for path in sorted((REPOSITORY / "megalm").rglob("*.py")):
        docstring = path.read_text(encoding="utf-8").split('"""')[1:2]
        if docstring and "No torch" in docstring[0]:
            says.append(".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"))
    assert len(says) > 50
    free = [name for name in says if not any(name == module or name.startswith(f"{module}.") for module in held)]
    assert not free, "say `No torch` and are in no contract"
