"""What ``pip install megalm`` brings: everything that a run needs, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.checkout import REPOSITORY, copy_checkout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and source archive, by ``python -m build``, from a copy that holds what git knows."""
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source") / "megalm", tmp_path_factory.mktemp("dist")
    copy_checkout(source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr
    return out


def test_the_wheel_holds_code_configs_and_types_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    package = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "megalm").rglob("*.py")}
    configs = {f"megalm/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "conf").rglob("*.yaml")}
    assert package | configs | {"megalm/py.typed"} <= names
    assert not [name for name in names if not name.startswith(("megalm/", "megalm-"))]
    assert "megalm = megalm.cli.main:main" in entry_points


def test_the_source_archive_builds_without_git(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    listed = subprocess.run(["tar", "tzf", archive], capture_output=True, text=True, check=True).stdout
    for name in ("/pyproject.toml", "/conf/config.yaml", "/megalm/py.typed", "/README.md", "/LICENSE"):
        assert name in listed
