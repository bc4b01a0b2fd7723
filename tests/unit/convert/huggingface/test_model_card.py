"""The model card of an exported folder: read by the hub's own library, with the figures of the run that it is of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from foreign_models import convert_quietly

from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.convert.huggingface.model_card import model_card
from megalm.runs.load import load_full_model
from megalm.runs.record import read_metrics, validation_rows

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def manifest(short_runs: tuple[Path, Path]) -> Manifest:
    return read_manifest(short_runs[0] / "checkpoints" / "step-00000004")


@pytest.fixture(scope="module")
def card_of(short_runs: tuple[Path, Path]) -> Callable[[Manifest], str]:
    """The card of a changed manifest."""
    trained = load_full_model(short_runs[0])
    model = replace(trained.config.model, vocab_size=trained.tokenizer.vocab_size)
    return lambda manifest: model_card(manifest, model, architecture="GPT2LMHeadModel", dtype="fp32")


def _on(manifest: Manifest, dataset: Path) -> Manifest:
    """The manifest, as if the run had read another dataset."""
    (corpus,) = manifest.data["corpora"]
    return replace(manifest, data={**manifest.data, "corpora": [{**corpus, "path": str(dataset / "train")}]})


def test_the_hub_reads_what_the_run_reached(short_runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    convert_quietly("megalm", "hf", short_runs[0], folder)
    card = hub.ModelCard.load(folder / "README.md")
    last = validation_rows(read_metrics(short_runs[0] / "metrics.jsonl"))[-1]
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_split) == ("perplexity", "validation")
    assert result.metric_value == pytest.approx(math.exp(last["val_loss"]), abs=1e-4)
    assert f"| validation loss | {last['val_loss']:.4f} nats per token" in card.text
    assert f"| tokens | {last['tokens']:,} |" in card.text
    assert "| parameters | " in card.text


def test_the_lines_that_load_the_model_do(short_runs: tuple[Path, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("transformers")
    convert_quietly("megalm", "hf", short_runs[0], tmp_path / "exported")
    monkeypatch.chdir(tmp_path / "exported")
    text = Path("README.md").read_text(encoding="utf-8")
    lines = text.split("```python\n")[1].split("```")[0]
    capsys.readouterr()
    exec(compile(lines.replace("max_new_tokens=50", "max_new_tokens=3"), "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("The")


def test_licenses_are_those_of_the_data_cards(
    manifest: Manifest, card_of: Callable[[Manifest], str], tmp_path: Path
) -> None:
    card = {"recipe": {"license": "cc-by-sa-4.0"}}
    (tmp_path / "data_card.json").write_text(json.dumps(card), encoding="utf-8")
    text = card_of(_on(manifest, tmp_path))
    assert f"- `{tmp_path / 'train'}`: cc-by-sa-4.0\n\nNo license of these weights is stated." in text
    (tmp_path / "data_card.json").unlink()
    assert f"- `{tmp_path / 'train'}`: not stated" in card_of(_on(manifest, tmp_path))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"recipe": 3, "removed": 4}', "\xff"])
def test_a_data_card_that_is_none_costs_no_export(
    manifest: Manifest, card_of: Callable[[Manifest], str], tmp_path: Path, content: str
) -> None:
    (tmp_path / "data_card.json").write_text(content, encoding="latin-1")
    assert "not stated" in card_of(_on(manifest, tmp_path))


def test_without_a_validation_there_is_no_result(manifest: Manifest, card_of: Callable[[Manifest], str]) -> None:
    text = card_of(replace(manifest, training={**manifest.training, "validation": None}))
    assert "model-index" not in text
    assert "validation loss" not in text
    assert hub.ModelCard(text).data.eval_results is None
