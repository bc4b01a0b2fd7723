"""What ``pip install megalm`` brings: everything that a run needs, and nothing else."""

from __future__ import annotations

import os
import re
import shlex
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


@pytest.mark.slow
def test_from_an_empty_folder_the_quickstart_says_how_to_prepare_its_data_and_then_trains(
    built: Path, tmp_path: Path
) -> None:
    """With the wheel's files alone: no checkout, no ``conf/`` beside the user."""
    (wheel,) = built.glob("*.whl")
    site, user = tmp_path / "site", tmp_path / "user"
    user.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def megalm(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "megalm", *arguments]
        return subprocess.run(command, cwd=user, env=environment, capture_output=True, text=True, check=False)

    where = [sys.executable, "-c", "import megalm; print(megalm.__file__)"]
    found = subprocess.run(where, cwd=user, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(site))
    train = ["train", "experiment=quickstart", "parallel=single", "train.steps=2", "train.validate_every=0"]
    train += ["optim.warmup_tokens=0", "report.prompt=null", "logging.wandb=disabled"]
    refused = megalm(*train)
    assert refused.returncode == 3
    (printed,) = re.findall(r"`(megalm prepare [^`]+)`", refused.stderr)
    prepared = megalm(*shlex.split(printed)[1:])
    assert prepared.returncode == 0, prepared.stderr
    trained = megalm(*train)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert (user / "runs" / "quickstart" / "checkpoints" / "step-00000002").is_dir()


def test_the_source_archive_builds_without_git(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    listed = subprocess.run(["tar", "tzf", archive], capture_output=True, text=True, check=True).stdout
    for name in ("/pyproject.toml", "/conf/config.yaml", "/megalm/py.typed", "/README.md", "/LICENSE"):
        assert name in listed
