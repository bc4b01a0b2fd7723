"""Each architecture that people fine-tune, from the library to megalm and back: bytes, config and logits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import convert_quietly
from safetensors.torch import load_file, save_file

from megalm.convert.run import RunSource
from megalm.convert.weights import WeightSource
from megalm.errors import CheckpointError
from megalm.models.counts import parameter_count
from megalm.models.transformer import build_full_model
from tests.library_models import MODELS, ONE_OF_EACH, make, save, tokens

transformers = pytest.importorskip("transformers")

LAYOUTS = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2)]
CASES = [(name, tp, pp) for name in ONE_OF_EACH for tp, pp in LAYOUTS]
CASES += [(name, 2, 2) for name in MODELS if name not in ONE_OF_EACH]
WRITTEN = (
    "use_cache",
    "dtype",
    "transformers_version",
    "architectures",
    "rope_parameters",
    "partial_rotary_factor",
    "position_embedding_type",
    "sinusoidal_pos_embds",
)
"""What a config says beside the architecture, or in other words."""


@pytest.fixture(autouse=True)
def _no_gradients_and_no_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes most of the time
    with torch.no_grad():
        yield


def _own_logits(source: WeightSource, drawn: torch.Tensor) -> torch.Tensor:
    model = source.info.model
    whole = build_full_model(model, model.vocab_size or 0).eval()
    for declared in whole.tensors():
        declared.parameter.copy_(source.read(declared.name))
    return whole(drawn)


def _loaded(folder: Path, causal: bool) -> Any:
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    loaded, found = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(found.values()), found
    return loaded.eval()


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Without a second bias of untied encoders, which the library keeps and does not compute with."""
    found = load_file(folder / "model.safetensors")
    if "lm_head.decoder.bias" in found:
        found.pop("lm_head.bias", None)
    return found


_ROPE: dict[str, dict[str, float]] = {"yarn": {"beta_fast": 32.0, "beta_slow": 1.0}}
"""What the library takes where a config is silent."""


def _meaning(config: Any) -> dict[str, Any]:
    values = config.to_dict()
    values.pop("_name_or_path")
    if not values.get("use_sliding_window", True):
        values.pop("max_window_layers")  # of no layer then
    rope = values.get("rope_parameters") or {}
    return {name: value for name, value in values.items() if name not in WRITTEN} | {
        "rope": {
            **_ROPE.get(rope.get("rope_type"), {}),
            **{name: value for name, value in rope.items() if value is not None},
        }
    }


@pytest.mark.parametrize(("name", "tp", "pp"), CASES)
def test_there_and_back(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    theirs = save(name, tmp_path / "theirs")
    report = convert_quietly(
        "hf", "megalm", tmp_path / "theirs", tmp_path / "run", tp=tp, pp=pp, verify=(tp, pp) == (2, 2)
    )
    run = RunSource(tmp_path / "run")
    model = run.info.model
    drawn = tokens(theirs.config.pad_token_id if model.position_offset else None)
    expected = theirs(input_ids=drawn).logits
    torch.testing.assert_close(_own_logits(run, drawn), expected, rtol=0, atol=1e-4)
    convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "ours", verify=(tp, pp) == (2, 2))
    ours = _loaded(tmp_path / "ours", model.causal)
    torch.testing.assert_close(ours(input_ids=drawn).logits, expected, rtol=0, atol=1e-4)
    assert type(ours) is type(theirs)
    assert _meaning(ours.config) == _meaning(theirs.config)
    before, after = _tensors(tmp_path / "theirs"), _tensors(tmp_path / "ours")
    renamed = {"lm_head.weight": "embed_out.weight"} if "neox" in name else {}
    assert {renamed.get(key, key) for key in before} == after.keys()
    for key, value in before.items():
        assert torch.equal(after[renamed.get(key, key)], value), key
    # Biases that the library has and does not compute with are counted by it.
    spare = sum(parameter.numel() for key, parameter in theirs.named_parameters() if key == "lm_head.bias")
    spare = spare if model.head == "masked_lm" and not model.tie_embeddings else 0
    assert parameter_count(model).total == sum(parameter.numel() for parameter in theirs.parameters()) - spare
    assert all("left out" not in note or "sinusoidal" in note for note in report.notes), report.notes


@pytest.mark.parametrize("name", MODELS)
def test_what_megalm_leaves_out_would_show(name: str, tmp_path: Path) -> None:
    """Windows, query norms and rows before the first position change logits here; else the test above proved little."""
    from dataclasses import replace

    save(name, tmp_path / "theirs")
    convert_quietly("hf", "megalm", tmp_path / "theirs", tmp_path / "run")
    run = RunSource(tmp_path / "run")
    model = run.info.model
    drawn = tokens(model.position_offset - 1)
    expected = _own_logits(run, drawn)
    widest = max(model.attention_windows)
    if 0 < widest < model.sequence_length:
        run.info = replace(run.info, model=replace(model, attention_windows=(widest + 1,)))
        assert (_own_logits(run, drawn) - expected).abs().max() > 1e-2
    if model.position_offset:
        run.info = replace(
            run.info,
            model=replace(model, position_offset=0, sequence_length=model.sequence_length + model.position_offset),
        )
        assert (_own_logits(run, drawn) - expected).abs().max() > 1e-2


def test_rows_that_no_token_uses_are_kept(tmp_path: Path) -> None:
    save("roberta", tmp_path / "theirs")
    before = load_file(tmp_path / "theirs" / "model.safetensors")["roberta.embeddings.position_embeddings.weight"]
    assert before[:2].abs().min() > 0
    convert_quietly("hf", "megalm", tmp_path / "theirs", tmp_path / "run", tp=2)
    assert torch.equal(RunSource(tmp_path / "run").read("position.weight"), before)


def test_a_run_is_exported_as_what_it_came_from(tmp_path: Path) -> None:
    """Mistral without a window is also a Llama, and a Phi-3 a Llama with its tensors cut; XLM-R is a RoBERTa."""
    for name in ("mistral-nemo", "phi3-partial", "xlm-roberta"):
        save(name, tmp_path / name)
        convert_quietly("hf", "megalm", tmp_path / name, tmp_path / f"{name}-run")
        convert_quietly("megalm", "megalm", tmp_path / f"{name}-run", tmp_path / f"{name}-again", pp=2)
        convert_quietly("megalm", "hf", tmp_path / f"{name}-again", tmp_path / f"{name}-hf")
        types = [
            json.loads((tmp_path / folder / "config.json").read_text())["model_type"] for folder in (name, f"{name}-hf")
        ]
        assert types[0] == types[1]


def test_absent_fields_are_what_the_library_takes_for_them(tmp_path: Path) -> None:
    """A published config may leave out what its class defaults to."""
    from megalm.convert.huggingface.names import read_architecture

    for name in MODELS:
        config = make(name).config
        values = json.loads(config.to_json_string(use_diff=False))
        for left_out in ("num_key_value_heads", "sliding_window", "head_dim", "max_position_embeddings"):
            if left_out not in values:
                continue
            rest = {key: value for key, value in values.items() if key not in (left_out, "layer_types")}
            (tmp_path / "config.json").write_text(json.dumps(rest))
            theirs = type(config)(**rest)
            model = read_or_none(read_architecture, tmp_path / "config.json")
            if model is None:
                continue
            assert model.kv_heads == getattr(theirs, "num_key_value_heads", model.num_heads), (name, left_out)
            assert model.sequence_length + model.position_offset == theirs.max_position_embeddings, (name, left_out)
            assert model.head_size == (getattr(theirs, "head_dim", None) or model.hidden_size // model.num_heads)
            windows = [model.attention_window(layer) for layer in range(model.num_layers)]
            kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * model.num_layers
            window = getattr(theirs, "sliding_window", None) or 0
            assert windows == [window if kind == "sliding_attention" else 0 for kind in kinds], (name, left_out)


def read_or_none(read: Any, file: Path) -> Any:
    """The model of a config; None where the defaults do not fit its other sizes, which is refused."""
    from megalm.errors import CheckpointError

    try:
        return read(file).model
    except CheckpointError as error:
        assert "num_kv_heads" in str(error), error
        return None


EXTRA: dict[str, dict[str, str | tuple[int, ...]]] = {
    "qwen3": {"lm_head.weight": "model.embed_tokens.weight"},
    "mistral-tied": {"lm_head.weight": "model.embed_tokens.weight", "model.rotary_emb.inv_freq": (5,)},
    "roberta": {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
        "roberta.embeddings.position_ids": (1, 34),
        "roberta.pooler.dense.weight": (40, 40),
        "roberta.pooler.dense.bias": (40,),
    },
    "distilbert": {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
}
"""What published files hold beside the tensors: copies of others, by name; buffers and heads that mean nothing here."""


@pytest.mark.parametrize("name", EXTRA)
def test_what_published_files_hold_twice_or_besides(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    sound = load_file(file)
    sound.pop("lm_head.decoder.bias", None)
    more = {
        key: sound[of].clone() if isinstance(of, str) else torch.ones(of, dtype=torch.int64 if "ids" in key else None)
        for key, of in EXTRA[name].items()
    }
    save_file(sound | more, file, metadata={"format": "pt"})
    convert_quietly("hf", "megalm", tmp_path / "theirs", tmp_path / "run", verify=True)
    convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "ours", verify=True)
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(ours[key], value) for key, value in sound.items())
    copy = next(key for key, of in EXTRA[name].items() if isinstance(of, str))
    save_file(sound | more | {copy: more[copy] + 1.0}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="differs from"):
        convert_quietly("hf", "megalm", tmp_path / "theirs", tmp_path / "other")


@pytest.mark.parametrize("name", ["mistral", "qwen3", "phi3", "starcoder2", "roberta", "distilbert"])
def test_a_model_without_its_head_is_told_so(name: str, tmp_path: Path) -> None:
    """As the library saves a bare model: no head, and names without the prefix."""
    theirs = make(name)
    theirs.base_model.save_pretrained(tmp_path / "bare")
    tied = theirs.config.tie_word_embeddings and "Causal" in type(theirs).__name__
    if tied:
        convert_quietly("hf", "megalm", tmp_path / "bare", tmp_path / "run", verify=True)
        return
    with pytest.raises(CheckpointError, match=r"has no (output projection|masked-word head)") as refused:
        convert_quietly("hf", "megalm", tmp_path / "bare", tmp_path / "run")
    advises = "set tie_word_embeddings to true in config.json" in str(refused.value)
    assert advises == ("Causal" in type(theirs).__name__)
    if advises:
        config = json.loads((tmp_path / "bare" / "config.json").read_text())
        (tmp_path / "bare" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        convert_quietly("hf", "megalm", tmp_path / "bare", tmp_path / "run", verify=True)
