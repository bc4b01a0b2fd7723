"""A token that begins every text does so in data, generation, evaluation and export alike, or in none of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from foreign_models import GPT2, convert_quietly, write_random_run
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megalm.config.schema import Data
from megalm.data.prepare.corpora import CorpusOptions
from megalm.data.prepare.executors import Workers
from megalm.data.prepare.recipe import Recipe
from megalm.data.prepare.run import prepare
from megalm.data.shards.dataset import open_datasets, tokenizer_of
from megalm.data.stream.loader import validation_batches
from megalm.data.stream.sequences import Corpora
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.evaluate.perplexity import run_evaluate
from megalm.generate.asked import AskedModel
from megalm.generate.requests import Completion
from megalm.generate.run import run_generate
from megalm.objectives.clm import next_tokens

TEXTS = [f"text {i} of several plain words, none of them new" for i in range(40)]
PROMPT = "text of words"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose own files begin every text with ``<s>``, as Llama's do."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("given")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def prepared(given: Path, folder: Path, add_bos: bool | None) -> Path:
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, text in enumerate(TEXTS):
        (corpus / f"{number:02d}.txt").write_text(text)
    recipe = Recipe(
        corpus="text",
        options=CorpusOptions((str(corpus),)),
        tokenizer=str(given),
        add_bos=add_bos,
        val_fraction=0.4,
        chunk_tokens=64,
    )
    prepare(
        recipe, folder / "data", workers=Workers(None, 1), overwrite=False, progress=lambda *_: None, command="a test"
    )
    return folder / "data"


@pytest.mark.parametrize("add_bos", [None, False])
def test_data_generation_evaluation_and_export_begin_alike(
    add_bos: bool | None, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    start = [1] if add_bos is None else []
    data = prepared(given, tmp_path, add_bos)
    tokenizer = tokenizer_of(open_datasets(Data(path=(str(data),))))
    run = tmp_path / "run"
    write_random_run(run, replace(GPT2, vocab_size=tokenizer.vocab_size, sequence_length=32), tokenizer=tokenizer)
    seen: list[list[int]] = []
    nothing = [Completion(tokens=(), text="", finish="length")]
    monkeypatch.setattr(
        AskedModel,
        "generate",
        lambda _, requests, **__: [seen.append(list(each.tokens)) or nothing for each in requests],
    )
    run_generate(run, PROMPT, max_new_tokens=1, temperature=0.0, top_k=0, seed=0)
    assert seen == [[*start, *tokenizer.encode(PROMPT)]]
    run_generate(run, "", max_new_tokens=1, temperature=0.0, top_k=0, seed=0)
    assert seen[1] == (start or [tokenizer.eos_id]), "an empty prompt begins a document"

    corpora = Corpora.open([store.below("val") for store in open_datasets(Data(path=(str(data),)))], 32)
    (batch, *_) = validation_batches(corpora, None, 4, dp_rank=0, dp_size=1, make_batch=next_tokens)
    row = batch.tokens[0].tolist()
    ends = [place for place, token in enumerate(row[:-1]) if token == tokenizer.eos_id]
    assert row[:1] == start or not start
    assert all((row[place + 1] == 1) == bool(start) for place in ends)
    result = run_evaluate(run, [f"data.path=[{data}]", "train.micro_batch_size=4"])
    assert result["tokens"] > 0 and "note" not in result

    convert_quietly("megalm", "hf", run, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(PROMPT).input_ids == [*start, *tokenizer.encode(PROMPT)]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    convert_quietly("hf", "megalm", tmp_path / "hf", tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.encode_prompt(PROMPT) == seen[0]
    assert (again.roles.bos, again.roles.end) == ("<s>", "</s>")


def test_perplexity_on_data_that_begin_otherwise_says_so(given: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(given)
    run = tmp_path / "run"
    write_random_run(run, replace(GPT2, vocab_size=tokenizer.vocab_size, sequence_length=32), tokenizer=tokenizer)
    data = prepared(given, tmp_path, add_bos=False)
    result = run_evaluate(run, [f"data.path=[{data}]", "train.micro_batch_size=4"])
    assert result["note"] == (
        "these documents begin with nothing and end with </s>, the model's with <s> and </s>: the perplexity is "
        "of documents as they are in these data; megalm prepare --add-bos, --no-add-bos and --eos make them as the "
        "model's"
    )
