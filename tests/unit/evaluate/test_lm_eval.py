"""megalm's models in EleutherAI's harness answer as the same models of the library do."""

from __future__ import annotations

from typing import Any

import pytest
from foreign_models import convert_quietly

from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.data.tokenization.training import train_byte_level_bpe
from megalm.errors import ConfigError

transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

from lm_eval.api.instance import Instance  # noqa: E402

from megalm.evaluate.lm_eval import MegalmLM  # noqa: E402

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps. "
PAIRS = [
    ("The quick brown", " fox"),
    ("The quick brown ", "fox jumps"),
    ("", "The dog"),
    ("dog, and", " the dog sleeps. "),
    ("dog, and", " the cat sleeps. "),
    (TEXT * 12, "The quick"),
]
"""A space at the border, nothing before, choices of one context, and more than the model's sequences hold."""


def _requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=number, metadata=("task", number, 1))
        for number, each in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("harness")
    tokenizer: Tokenizer = train_byte_level_bpe([TEXT * 3], 300)
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=2,
        n_positions=64,
        vocab_size=tokenizer.vocab_size,
        initializer_range=0.3,
        bos_token_id=tokenizer.eos_id,
        eos_token_id=tokenizer.eos_id,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "hf")
    tokenizer.save(folder / "hf")
    convert_quietly("hf", "megalm", folder / "hf", folder / "run")
    convert_quietly("megalm", "hf", folder / "run", folder / "exported")
    theirs = HFLM(pretrained=str(folder / "exported"), device="cpu", dtype="float32", batch_size=3)
    return folder / "run", MegalmLM(str(folder / "run"), dtype="fp32", batch_size=3), theirs


def test_log_likelihoods(models) -> None:
    _, ours, theirs = models
    requests = _requests("loglikelihood", PAIRS)
    for own, other in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert own[0] == pytest.approx(other[0], abs=1e-3)
        assert own[1] == other[1]


def test_rolling_log_likelihoods(models) -> None:
    _, ours, theirs = models
    requests = _requests("loglikelihood_rolling", [(TEXT,), (TEXT * 15,), ("dog",)])
    assert ours.loglikelihood_rolling(requests) == pytest.approx(theirs.loglikelihood_rolling(requests), abs=1e-3)


def test_generation_until_a_stop_text(models) -> None:
    _, ours, theirs = models
    settings = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    requests = _requests("generate_until", [("The quick", settings), ("dog", settings), (TEXT * 12, settings)])
    assert ours.generate_until(requests) == theirs.generate_until(requests)


def test_settings_that_megalm_has_not_are_refused(models) -> None:
    run, ours, _ = models
    with pytest.raises(ConfigError, match=r"gen_kwargs: typical_p=0\.2: not a setting"):
        ours.generate_until(_requests("generate_until", [("dog", {"until": [], "typical_p": 0.2})]))
    with pytest.raises(ConfigError, match=r"max_gen_toks=64: leaves no room"):
        ours.generate_until(_requests("generate_until", [("dog", {"until": [], "max_gen_toks": 64})]))
    with pytest.raises(ConfigError, match=r"max_length=65: from 1 to 64"):
        MegalmLM(str(run), max_length=65)


def test_what_is_cut_is_said(models, capsys: pytest.CaptureFixture) -> None:
    _, ours, _ = models
    ours.loglikelihood(_requests("loglikelihood", PAIRS))
    assert "1 requests lost their beginning: more tokens than 64" in capsys.readouterr().err
