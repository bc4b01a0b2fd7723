"""megalm's models in EleutherAI's harness answer as the same models of the library do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from foreign_models import convert_quietly

from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.data.tokenization.training import train_byte_level_bpe
from megalm.errors import ConfigError, DataError
from tests.chat_models import MODELS

transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

from lm_eval.api.instance import Instance  # noqa: E402

from megalm.evaluate.lm_eval import MegalmLM, main  # noqa: E402

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


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ({"path": "RUN", "paths": "x", "tpp": 2}, r"model_args: paths: megalm has no such argument; path, tp, "),
        ({}, "model_args: no path; path=runs/NAME"),
        ({"path": "RUN", "batch_size": 0}, "batch_size=0: no number of rows; 1 or above, or auto"),
        ({"path": "RUN", "batch_size": "many"}, "batch_size=many: no number of rows"),
    ],
)
def test_arguments_that_are_wrong(models, arguments: dict[str, Any], wrong: str) -> None:
    run, _, _ = models
    with pytest.raises(ConfigError, match=wrong):
        MegalmLM(**{name: str(run) if value == "RUN" else value for name, value in arguments.items()})


def test_a_task_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lm_eval", "--model", "megalm", "--model_args", "path=x", "--tasks", "nosuchtask"])
    with pytest.raises(ConfigError, match=r"--tasks: Tasks not found: nosuchtask; .* ls tasks` lists them"):
        main()


def test_generation_is_greedy_where_a_task_names_neither_sampling_nor_temperature(models) -> None:
    _, ours, theirs = models
    for settings in ({"until": ["e"], "max_gen_toks": 12}, {"until": ["e"], "max_gen_toks": 12, "top_p": 0.9}):
        requests = _requests("generate_until", [("The quick", settings), ("dog", settings)])
        assert ours.generate_until(requests) == theirs.generate_until(requests)


def test_sampling_that_is_asked_for(models) -> None:
    _, ours, _ = models

    def temperature(**settings: Any) -> float:
        return ours._generation("dog", {"until": [], "max_gen_toks": 4, **settings}).sampling.temperature

    assert temperature(do_sample=True) == 0.0, "as the harness warns"
    assert temperature(temperature=0.5) == 0.5
    assert temperature(temperature=0.5, do_sample=False) == 0.0
    with pytest.raises(ConfigError, match=r"gen_kwargs: num_beams=2: beam search draws nothing"):
        temperature(temperature=1, num_beams=2)
    with pytest.raises(ConfigError, match=r"gen_kwargs: top_k=many: not a number"):
        temperature(do_sample=True, top_k="many")


def test_repeats_of_a_request_are_different_texts_and_the_same_every_time(models) -> None:
    """As ``repeats`` of a task have them, which a vote over its answers needs."""
    _, ours, _ = models
    settings = {"until": [], "max_gen_toks": 8, "temperature": 1.0}
    asked = [("The quick", settings)] * 3 + [("dog", settings)]
    texts = ours.generate_until(_requests("generate_until", asked))
    assert len(set(texts)) == 4
    assert ours.generate_until(_requests("generate_until", asked)) == texts
    assert ours.generate_until(_requests("generate_until", asked[:1])) == texts[:1]
    other = {**settings, "seed": 1}
    assert set(ours.generate_until(_requests("generate_until", [("The quick", other)] * 3))).isdisjoint(texts)
    greedy = [("The quick", {**settings, "temperature": 0})] * 2
    assert len(set(ours.generate_until(_requests("generate_until", greedy)))) == 1


def test_a_continuation_whose_beginning_is_in_a_token_of_the_context(models) -> None:
    """Both texts are three tokens, so that the length of the context's leaves nothing of the continuation."""
    _, ours, _ = models
    context, continuation = "The quick bro", "wn"
    apart, whole = ours.tok_encode(context), ours.tok_encode(context + continuation)
    assert len(apart) >= len(whole), "else this tests nothing"
    before, after = ours._encode_pair(context, continuation)
    assert before + after == whole
    assert before == apart[: len(before)]
    assert ours._tokenizer.decode(after) == " brown"
    ((score, _),) = ours.loglikelihood(_requests("loglikelihood", [(context, continuation)]))
    assert score < 0


@pytest.mark.parametrize("name", ["llama-2", "llama-3", "mistral", "qwen"])
def test_conversations_of_the_harness_have_the_ids_of_the_library(name: str, tmp_path: Path) -> None:
    """Marks are tokens, bos is there once, and the beginning of an answer is left open."""
    from lm_eval.models.huggingface import HFLM

    vocabulary = Tokenizer.load(MODELS[name].write(tmp_path / "hf")).vocab_size
    config = transformers.LlamaConfig(
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        max_position_embeddings=64,
        vocab_size=vocabulary,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    convert_quietly("hf", "megalm", tmp_path / "hf", tmp_path / "run")
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32")
    ours = MegalmLM(str(tmp_path / "run"), dtype="fp32")
    asked = {"role": "user", "content": "The capital of France?"}
    answer = {"role": "assistant", "content": "Paris"}
    for chat, prompted in (([asked], True), ([asked, answer, asked], True), ([asked, answer], False)):
        text = ours.apply_chat_template(chat, add_generation_prompt=prompted)
        assert text == theirs.apply_chat_template(chat, add_generation_prompt=prompted)
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.apply_chat_template([asked, answer], add_generation_prompt=False).endswith("Paris")


def test_a_conversation_that_the_template_refuses(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(MODELS["gemma"].write(tmp_path))
    harness = MegalmLM.__new__(MegalmLM)
    harness._tokenizer = tokenizer
    with pytest.raises(DataError, match="refuses it: System role not supported; another template"):
        harness.apply_chat_template([{"role": "system", "content": "Be brief."}])


def test_what_is_cut_is_said(models, capsys: pytest.CaptureFixture) -> None:
    _, ours, _ = models
    ours.loglikelihood(_requests("loglikelihood", PAIRS))
    assert "1 requests lost their beginning: more tokens than 64" in capsys.readouterr().err
