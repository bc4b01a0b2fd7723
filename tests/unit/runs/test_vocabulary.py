"""A run that starts from a model meets data: the same tokenizer, one that grew, another; and rows that are added."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tokenizers
import torch
from foreign_models import BERT, GPT2, LLAMA, write_random_run

from megalm.checkpoint import extension
from megalm.checkpoint.extension import ExtendedReader
from megalm.checkpoint.fingerprint import fingerprint
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.store import locate
from megalm.config.schema import Config, Data, Model, Optim, Run, Train
from megalm.convert.weights import declared_of
from megalm.core.parameters import StatePiece
from megalm.data.document import Document
from megalm.data.shards.store import open_store
from megalm.data.shards.write import ShardWriter
from megalm.data.tokenization.document_tokens import encode_documents
from megalm.data.tokenization.postprocessor import with_marks
from megalm.data.tokenization.roles import Marks
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.data.tokenization.training import train_byte_level_bpe
from megalm.errors import CheckpointError
from megalm.mesh.parameter import ParameterRecord
from megalm.mesh.slices import ShardSpec
from megalm.models.transformer import build_full_model
from megalm.runs.start import StartMode, StartPoint
from megalm.runs.vocabulary import match_vocabulary

TEXTS = ["one and two and three"] * 3
MARKS = ["<|im_start|>", "<|im_end|>"]
TOKENIZER = train_byte_level_bpe(TEXTS, 270)


def grown() -> Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(TOKENIZER.definition)
    tokenizer.add_special_tokens(MARKS)
    return Tokenizer(tokenizer.to_str())


def write_data(folder: Path, tokenizer: Tokenizer) -> Path:
    writer = ShardWriter(
        folder / "train",
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        document_start=tokenizer.document_start,
        chunk_tokens=64,
        chunks_per_shard=2,
    )
    tokens, lengths, _ = encode_documents(tokenizer, [Document.plain("a", TEXTS[0] * 9)])
    writer.add(tokens, lengths.tolist(), ["a"])
    writer.close()
    (folder / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "run"
    write_random_run(folder, replace(GPT2, vocab_size=TOKENIZER.vocab_size), tokenizer=TOKENIZER)
    return folder


def match(
    run: Path,
    data: Path,
    mode: StartMode = StartMode.INIT_FROM,
    *,
    extend: bool = False,
    vocab_size: int | None = None,
) -> StartPoint:
    config = Config(
        run=Run(name="new", dir="runs"),
        model=replace(GPT2, vocab_size=vocab_size),
        data=Data(path=(str(data),)),
        optim=Optim(lr=1e-3),
        train=Train(steps=4, micro_batch_size=1, global_batch_size=2),
    )
    config = replace(config, checkpoint=replace(config.checkpoint, extend_vocab=extend))
    return match_vocabulary(config, StartPoint(mode, locate(run).path), [open_store(str(data))])


def test_data_of_the_models_own_tokenizer_pass_without_a_word(run: Path, tmp_path: Path) -> None:
    start = match(run, write_data(tmp_path / "data", TOKENIZER))
    assert (start.notes, start.extends_vocab) == ((), False)
    spelt = json.dumps(json.loads(TOKENIZER.definition), indent=2)
    assert match(run, write_data(tmp_path / "spelt", Tokenizer(spelt))).notes == ()


@pytest.mark.parametrize("mode", [StartMode.INIT_FROM, StartMode.FINETUNE, StartMode.RESUME])
@pytest.mark.parametrize("extend", [False, True])
def test_data_of_another_tokenizer_are_refused(run: Path, mode: StartMode, extend: bool, tmp_path: Path) -> None:
    other = train_byte_level_bpe(["quite other words"], 270)
    data = write_data(tmp_path / "data", other)
    with pytest.raises(CheckpointError) as error:
        match(run, data, mode, extend=extend)
    line = str(error.value)
    assert f"{data}/tokenizer.json ({other.vocab_size} tokens, sha256 {other.sha256[:12]})" in line
    assert f"{run}/tokenizer.json ({TOKENIZER.vocab_size} tokens, sha256 {TOKENIZER.sha256[:12]})" in line
    assert f"--tokenizer {run}/tokenizer.json" in line


def test_the_record_in_the_checkpoint_is_believed_where_the_file_is_another(run: Path, tmp_path: Path) -> None:
    other = train_byte_level_bpe(["quite other words"], 270)
    data, copy = write_data(tmp_path / "data", other), tmp_path / "copy"
    copy.symlink_to(run / "checkpoints")
    (tmp_path / "moved").mkdir()
    (run / "checkpoints").rename(tmp_path / "moved" / "checkpoints")
    try:
        (tmp_path / "moved" / "tokenizer.json").write_text(other.definition)
        with pytest.raises(CheckpointError, match="made by another tokenizer"):
            match(tmp_path / "moved", data)
    finally:
        (tmp_path / "moved" / "checkpoints").rename(run / "checkpoints")


def test_added_tokens_are_said_and_their_rows_offered(run: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", grown())
    with pytest.raises(CheckpointError, match=r"2 tokens added \(<\|im_start\|>, .*checkpoint\.extend_vocab=true"):
        match(run, data)
    start = match(run, data, extend=True)
    assert start.extends_vocab
    assert "2 tokens added" in start.notes[0]
    assert start.notes[1].startswith(f"2 rows are added to the {TOKENIZER.vocab_size} of the embeddings")
    assert StartPoint.from_dict(json.loads(json.dumps(asdict(start), default=str))) == start
    with pytest.raises(CheckpointError, match=r"cannot learn: begin a new one .* checkpoint\.finetune_from="):
        match(run, data, StartMode.RESUME, extend=True)


def test_documents_that_begin_otherwise_than_the_models_are_said(tmp_path: Path) -> None:
    tokenizer = train_byte_level_bpe(TEXTS, 270, ["<s>"])
    definition = with_marks(tokenizer.definition, ("<s>",), ())
    with_bos, without = Tokenizer(definition), Tokenizer(definition, marks=Marks(add_bos=False))
    assert with_bos.sha256 == without.sha256
    for number, (of_run, of_data, said) in enumerate(((with_bos, without, True), (without, without, False))):
        run = tmp_path / f"run{number}"
        write_random_run(run, replace(GPT2, vocab_size=270), tokenizer=of_run)
        notes = match(run, write_data(tmp_path / f"data{number}", of_data)).notes
        assert [("begin with nothing" in note, "the model's with <s> and" in note) for note in notes] == [
            (True, True)
        ] * said


def test_data_from_before_tokens_were_added_would_take_them_from_the_run(tmp_path: Path) -> None:
    tokenizer = grown()
    write_random_run(tmp_path / "run", replace(GPT2, vocab_size=tokenizer.vocab_size), tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match=r"the model's has 2 tokens added .*; prepare the data again with"):
        match(tmp_path / "run", write_data(tmp_path / "data", TOKENIZER))


def test_a_model_that_has_rows_for_them_keeps_its_shape(tmp_path: Path) -> None:
    write_random_run(tmp_path / "run", replace(GPT2, vocab_size=320), tokenizer=TOKENIZER)
    data = write_data(tmp_path / "data", grown())
    with pytest.raises(CheckpointError, match=r"model\.vocab_size=null, 2\d\d by the data: .* have 320 rows; set"):
        match(tmp_path / "run", data, extend=True)
    start = match(tmp_path / "run", data, extend=True, vocab_size=320)
    assert not start.extends_vocab
    with pytest.raises(CheckpointError, match="extend_vocab=true"):
        match(tmp_path / "run", data, vocab_size=320)
    with pytest.raises(CheckpointError, match=r"model\.vocab_size=384: .* have 320 rows; .*extend_vocab=true adds"):
        match(tmp_path / "run", write_data(tmp_path / "same", TOKENIZER), vocab_size=384)


def test_a_model_without_tokenizer_is_taken_at_its_word(tmp_path: Path) -> None:
    write_random_run(tmp_path / "run", replace(GPT2, vocab_size=TOKENIZER.vocab_size))
    (note,) = match(tmp_path / "run", write_data(tmp_path / "data", TOKENIZER)).notes
    assert "no tokenizer lies with" in note


@pytest.mark.parametrize("model", [GPT2, LLAMA, BERT], ids=["gpt2", "llama", "bert"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_old_rows_are_kept_and_new_ones_are_those_of_a_fresh_model(model: Model, tp: int, tmp_path: Path) -> None:
    """101 words become 205: on tp=2 and 4 the last ranks hold new rows and padding alone."""
    old = write_random_run(tmp_path / "run", model, tp=tp)
    larger = replace(model, vocab_size=205)
    fresh = {t.name: t.tensor for t in build_full_model(larger, 205, seed=5).tensors()}
    checkpoint = CheckpointReader(locate(tmp_path / "run").path)
    totals: dict[str, int] = {}
    for rank in range(tp):
        declared = declared_of(larger, tp=tp, tp_rank=rank)
        vocabulary = [p for p in declared if p.shard.full_shape[0] == 205]
        assert len(vocabulary) == (1 if model is GPT2 else 2)
        reader = ExtendedReader(checkpoint, vocabulary, seed=5, dtype=torch.float32)
        reader.check_parameters({p.name: p.shard.full_shape for p in declared}, whole_model=True)
        for p in vocabulary:
            expected = fresh[p.name].detach().clone()
            expected[:101] = old.values[p.name]
            local = reader.read_local(p.name, "weight", p.shard)
            assert torch.equal(local, p.shard.take(expected))
            width = local[0].numel()
            for start, stop in ((0, 1), (50 * width - 3, 52 * width), (local.numel() - 2 * width - 1, local.numel())):
                run = reader.read_flat(p.name, "weight", p.shard, start, stop - start)
                assert torch.equal(run, local.view(-1)[start:stop]), "a run is that of the whole"
            piece = reader.saved_part(StatePiece(ParameterRecord(p.name, p.shard), "weight", 0, local.view(-1)))
            share = fingerprint(p.name, p.shard, 0, piece.values)
            totals[p.name] = (totals.get(p.name, 0) + share) % (1 << 64)
    saved = checkpoint.manifest.fingerprints
    assert saved is not None
    assert totals == {name: saved[name] for name in totals}, "what was saved is proven, whatever was added"


def test_only_words_may_be_added(tmp_path: Path) -> None:
    write_random_run(tmp_path / "run", GPT2)
    longer = declared_of(replace(GPT2, vocab_size=205, sequence_length=64))
    vocabulary = [p for p in longer if p.name == "embedding.weight"]
    checkpoint = CheckpointReader(locate(tmp_path / "run").path)
    reader = ExtendedReader(checkpoint, vocabulary, seed=5, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"position\.weight: \[32, 24\] in the checkpoint, \[64, 24\]"):
        reader.check_parameters({p.name: p.shard.full_shape for p in longer})


def test_of_new_rows_those_are_made_that_a_rank_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_run(tmp_path / "run", GPT2)
    (words,) = [p for p in declared_of(replace(GPT2, vocab_size=205), tp=1, tp_rank=0) if p.shard.full_shape[0] == 205]
    reader = ExtendedReader(CheckpointReader(locate(tmp_path / "run").path), [words], seed=5, dtype=torch.float32)
    made: list[tuple[int, int]] = []
    initial_values = extension.initial_values

    def counted(name: str, shard: ShardSpec, *rest: object) -> torch.Tensor:
        made.append(shard.cuts[0].ranges[0])
        return initial_values(name, shard, *rest)

    monkeypatch.setattr(extension, "initial_values", counted)
    width = words.shard.full_shape[1]
    reader.read_flat(words.name, "weight", words.shard, 0, 101 * width)
    assert made == []
    reader.read_flat(words.name, "weight", words.shard, 100 * width, 3 * width + 1)
    reader.read_flat(words.name, "weight", words.shard, 150 * width, 55 * width)
    assert made == [(101, 104), (150, 205)]
