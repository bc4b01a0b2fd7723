"""The model card of an exported folder, from what a run's checkpoint and its data card say. No torch.

The YAML at its beginning is what the model hub reads (https://huggingface.co/docs/hub/model-cards). It names no
license of the weights: that is for who publishes them to say. The text lists the licenses of the datasets, as their
data cards state them.
"""

from __future__ import annotations

import json
from math import exp, isfinite
from pathlib import Path
from typing import Any

import yaml

from megalm.checkpoint.manifest import Manifest
from megalm.config.schema import Model
from megalm.data.place import DATA_CARD_FILE
from megalm.mesh.topology import Topology
from megalm.models.counts import parameter_count

CARD_FILE = "README.md"


def model_card(manifest: Manifest, model: Model, *, architecture: str, dtype: str) -> str:
    """The text of ``README.md``.

    Args:
        manifest: of the checkpoint that was converted.
        model: its architecture, ``vocab_size`` set.
        architecture: the library's class.
        dtype: of the weights, in words.
    """
    config = manifest.config
    name = str(config.get("run", {}).get("name", "megalm-model"))
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if model.causal else "fill-mask",
        "tags": ["megalm", "pytorch", "safetensors"],
        **_results(manifest, name, model),
    }
    cards = {corpus["path"]: _data_card(Path(corpus["path"]).parent) for corpus in _corpora(manifest)}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        f"Pretrained with megalm {manifest.megalm_version}, exported as `{architecture}`.",
        _use(architecture, model),
        _table("## Model", _model_rows(model, dtype)),
        _table("## Training", _training_rows(manifest)),
        _data(manifest, cards),
        _license(cards),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _use(architecture: str, model: Model) -> str:
    auto = "AutoModelForCausalLM" if model.causal else "AutoModelForMaskedLM"
    lines = [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        f'model = {auto}.from_pretrained(".")  # {architecture}',
    ]
    if model.causal:
        lines += [
            'ids = tokenizer("The", return_tensors="pt")["input_ids"]',
            "print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))",
        ]
    return "\n".join(["```python", *lines, "```"])


def _model_rows(model: Model, dtype: str) -> dict[str, str]:
    width = "" if model.head_dim is None else f" of {model.head_dim}"
    return {
        "parameters": f"{parameter_count(model).total:,}",
        "layers, hidden size, heads": f"{model.num_layers}, {model.hidden_size:,}, {model.num_heads}{width}",
        "sequence length": f"{model.sequence_length:,} tokens",
        "vocabulary": f"{model.vocab_size:,} tokens",
        "attention": "causal" if model.causal else "bidirectional",
        "positions, norm, activation": f"{model.position}, {model.norm}, {model.activation}",
        "weights": dtype,
    }


def _training_rows(manifest: Manifest) -> dict[str, str]:
    config, progress = manifest.config, manifest.training.get("progress")
    if not progress:
        return {}
    optim, train = config.get("optim", {}), config.get("train", {})
    degrees = {key: manifest.topology.get(key, 1) for key in ("tp", "pp", "cp", "dp", "virtual_stages")}
    rows = {
        "objective": str(config.get("objective", {}).get("name", "clm")),
        "steps": f"{manifest.step:,}",
        "tokens": f"{progress['tokens']:,}",
        "global batch": f"{train.get('global_batch_size')} sequences",
        "optimizer": f"AdamW, learning rate {optim.get('lr')}, weight decay {optim.get('weight_decay')}, gradients "
        f"clipped to a norm of {optim.get('clip_grad_norm')}",
        "number format": str(config.get("engine", {}).get("dtype")),
        "layout": Topology(
            tp=degrees["tp"],
            pp=degrees["pp"],
            cp=degrees["cp"],
            dp=degrees["dp"],
            virtual_stages=degrees["virtual_stages"],
        ).describe(),
        "seed": str(config.get("run", {}).get("seed")),
    }
    loss, validation = _validation_loss(manifest), manifest.training.get("validation") or {}
    if loss is not None:
        what = "the whole validation split" if validation.get("whole_split") else "part of the validation split"
        rows["validation loss"] = f"{loss:.4f} nats per token (perplexity {exp(loss):,.2f}), on {what}"
    return rows


def _results(manifest: Manifest, name: str, model: Model) -> dict[str, Any]:
    """The validation result as the hub's ``model-index`` has it; empty where there is none."""
    loss, corpora = _validation_loss(manifest), _corpora(manifest)
    if loss is None or not corpora:
        return {}
    names = dict.fromkeys(Path(corpus["path"]).parent.name for corpus in corpora)  # a dataset of two phases once
    dataset = {"type": "text", "name": ", ".join(names)}
    result = {
        "task": {"type": "text-generation" if model.causal else "fill-mask"},
        "dataset": {**dataset, "split": "validation"},
        "metrics": [{"type": "perplexity", "name": "validation perplexity", "value": round(exp(loss), 4)}],
    }
    return {"model-index": [{"name": name, "results": [result]}]}


def _validation_loss(manifest: Manifest) -> float | None:
    """In nats per token; None where the checkpoint has none that is finite."""
    loss = (manifest.training.get("validation") or {}).get("val_loss")
    return loss if isinstance(loss, float) and isfinite(loss) else None


def _corpora(manifest: Manifest) -> list[dict[str, Any]]:
    """What was read of each dataset, in the order of the phases."""
    return list(manifest.data.get("corpora") or ())


def _data(manifest: Manifest, cards: dict[str, dict[str, Any] | None]) -> str:
    lines = [
        f"- `{corpus['path']}`: {corpus['tokens']:,} tokens read, {corpus['epochs']:.2f} epochs; contents "
        f"`{str(corpus['contents'])[:16]}`{_of_card(cards[corpus['path']])}"
        for corpus in _corpora(manifest)
    ]
    return "## Data\n\n" + "\n".join(lines) if lines else ""


def _license(cards: dict[str, dict[str, Any] | None]) -> str:
    lines = [f"- `{path}`: {_stated_license(card) or 'not stated'}" for path, card in cards.items()]
    stated = ["Licenses of the texts, as their data cards state them:", "", *lines, ""] if lines else []
    return "\n".join(["## License", "", *stated, "No license of these weights is stated."])


def _data_card(dataset: Path) -> dict[str, Any] | None:
    """The dataset's own card; None where it is no longer there, or is none."""
    try:
        card = json.loads((dataset / DATA_CARD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return card if isinstance(card, dict) else None


def _of_card(card: dict[str, Any] | None) -> str:
    """Where the texts are from and what was kept of them; empty where the card does not say."""
    if card is None:
        return ""
    try:
        removed = ", ".join(f"{count:,} {rule}" for rule, count in card["removed"].items()) or "none"
        kept = f"{card['documents']:,} of {card['read']:,} documents kept (removed: {removed})"
        return f". Source: {card['source']}; {kept}, prepared by `{card['command']}`"
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def _stated_license(card: dict[str, Any] | None) -> str | None:
    recipe = (card or {}).get("recipe")
    stated = recipe.get("license") if isinstance(recipe, dict) else None
    return " ".join(stated.split()) if isinstance(stated, str) else None


def _table(title: str, rows: dict[str, str]) -> str:
    if not rows:
        return ""
    return "\n".join([title, "", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
