"""Looking at a dataset before a run: every mistake is one clear line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from megalm.data.shards.dataset import SHIPPED_DATASETS, inspect_dataset
from megalm.data.shards.index import signed
from megalm.errors import DataError


@pytest.fixture
def dataset(tiny_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dataset, tmp_path / "d"))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(DataError, match=message):
        inspect_dataset(folder)


def test_a_sound_dataset(dataset: Path) -> None:
    info = inspect_dataset(dataset)
    assert (info.vocab_size, info.chunk_tokens, info.location) == (300, 256, str(dataset))
    assert info.train_tokens > info.val_tokens > 0


def test_a_missing_folder_names_the_command(tmp_path: Path) -> None:
    refused(tmp_path / "x", "no such folder; prepare it with `megalm prepare --corpus text .* --out .*/x")


def test_other_folders_are_no_dataset(tmp_path: Path) -> None:
    refused(tmp_path, "has no train/ and val/, so it is no prepared dataset")


def test_half_written_and_half_copied(dataset: Path) -> None:
    (dataset / "val" / "index.json").unlink()
    refused(dataset, r"val: half-written: it has shards but no index\.json")
    shutil.rmtree(dataset / "val")
    refused(dataset, "val: no dataset here; .* prepares one, and data.path=FOLDER names another")


def test_a_wrong_size_names_both_sizes(dataset: Path) -> None:
    shard = dataset / "train" / "shard-000000.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(dataset, rf"shard-000000\.tar: {size - 1} bytes, index\.json says {size}")


def test_a_missing_tokenizer(dataset: Path) -> None:
    (dataset / "tokenizer.json").unlink()
    refused(dataset, r"tokenizer\.json: missing")


def edit_index(dataset: Path, **changes) -> None:
    path = dataset / "val" / "index.json"
    path.write_text(json.dumps(signed({**json.loads(path.read_text()), **changes})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_sha256": "00"}, "train/ and val/ were prepared differently"),
        ({"tokens": "many"}, "tokens is 'many', not a count"),
        ({"vocab_size": 3.5}, "vocab_size is 3.5, not a count"),
        ({"chunk_tokens": 0}, "incomplete or damaged"),
        ({"checks": 5}, "incomplete or damaged"),
    ],
)
def test_a_changed_index_is_refused(dataset: Path, changes, message: str) -> None:
    edit_index(dataset, **changes)
    refused(dataset, message)


def test_a_number_of_tokens_that_does_not_fit_the_files_is_refused(dataset: Path) -> None:
    tokens = json.loads((dataset / "val" / "index.json").read_text())["tokens"]
    edit_index(dataset, tokens=tokens + 256)
    refused(dataset, r"shard-000000\.tar: \d+ bytes, index\.json says \d+: cut short")


def test_the_data_of_shipped_experiments_are_made_by_the_command_that_their_config_names() -> None:
    conf = Path(__file__).parents[4] / "conf" / "data"
    said = {}
    for path in conf.glob("*.yaml"):
        found = re.search(r"megalm prepare (.*) --out (\S+)", path.read_text())
        if found:
            said[found.group(2)] = found.group(1)
    assert said == SHIPPED_DATASETS
