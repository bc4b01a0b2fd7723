"""A run folder with a model that has learnt one sentence by heart, asked in every way that a run can be."""

import io
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch

from megalm.checkpoint.save import save_checkpoint
from megalm.checkpoint.writer import Header, PieceToWrite
from megalm.config.compose import save_config
from megalm.config.parse import config_to_dict
from megalm.config.schema import Config, Data, Engine, Launch, Model, Optim, Report, Run, Train
from megalm.core.parameters import StatePiece
from megalm.data.document import Document
from megalm.data.shards.write import ShardWriter
from megalm.data.tokenization.document_tokens import encode_documents
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.data.tokenization.training import train_byte_level_bpe
from megalm.errors import CheckpointError, ConfigError, DataError
from megalm.evaluate.perplexity import run_evaluate
from megalm.generate.run import run_generate
from megalm.mesh.parameter import ParameterRecord
from megalm.models.transformer import build_full_model
from megalm.runs.load import load_full_model
from megalm.training.callbacks.base import Outcome, RunContext, StepMetrics, ValidationMetrics
from megalm.training.callbacks.closing_report import ClosingReport
from megalm.training.callbacks.metrics_jsonl import MetricsJsonl

SENTENCE = "one two three four five six seven eight nine ten, "
ROWS = 400
"""Vocabulary of the model: more than the tokenizer has words."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def config(root):
    return Config(
        run=Run(name="counting", dir=str(root / "runs")),
        model=Model(num_layers=2, hidden_size=32, num_heads=2, vocab_size=ROWS, sequence_length=32),
        data=Data(path=(str(root / "data"),)),
        optim=Optim(lr=1e-2),
        train=Train(steps=60, micro_batch_size=3, global_batch_size=8),
        engine=Engine(dtype="fp32", zero_stage=0),
        launch=Launch(device="cpu"),
        report=Report(prompt="one two three", max_new_tokens=30, temperature=0.0),
    )


@pytest.fixture(scope="module")
def tokenizer(root):
    tokenizer = train_byte_level_bpe([SENTENCE], 300)
    write_split(root / "data" / "val", tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def model(config, tokenizer):
    model = build_full_model(config.model, config.model.vocab_size, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr)
    stream = torch.tensor(tokenizer.encode(SENTENCE * 20))
    for step in range(config.train.steps):
        rows = torch.stack([stream[start : start + 33] for start in range(step % 8, step % 8 + 32, 4)])
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def run_dir(root, config, tokenizer, model):
    folder = root / "runs" / "counting"
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    (folder / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
    save(folder, config, model, step=60)
    return folder


def write_split(folder, tokenizer):
    writer = ShardWriter(
        folder,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        chunk_tokens=64,
        chunks_per_shard=2,
    )
    tokens, lengths, _ = encode_documents(tokenizer, [Document.plain("a", SENTENCE * 7)])
    writer.add(tokens, lengths.tolist(), ["a"])
    writer.close()


def save(folder, config, model, step):
    """As two ranks of a ZeRO optimizer would, each parameter cut in the middle of a row."""
    pieces = ([], [])
    for parameter in model.tensors():
        flat = parameter.parameter.detach().flatten()
        cut = min(7, flat.numel() - 1)
        pieces[0].append(StatePiece(ParameterRecord(parameter.name, parameter.shard), "weight", 0, flat[:cut]))
        pieces[1].append(StatePiece(ParameterRecord(parameter.name, parameter.shard), "weight", cut, flat[cut:]))
    header = Header(step=step, config=config_to_dict(config), topology={}, data={}, training={})
    both_are_here = Barrier(2)

    def agree(error):
        both_are_here.wait()
        return error

    def save_rank(rank):
        mine = [PieceToWrite.of(piece) for piece in pieces[rank]]
        return save_checkpoint(folder / "checkpoints", header, mine, rank=rank, world_size=2, agree=agree)

    with ThreadPoolExecutor(2) as ranks:
        list(ranks.map(save_rank, range(2)))


def generate(run_dir, prompt, **changes):
    values = {"max_new_tokens": 30, "temperature": 0.0, "top_k": 0, "seed": 0}
    return run_generate(run_dir, prompt, **(values | changes))


def test_the_weights_are_those_that_were_saved(run_dir, model):
    trained = load_full_model(run_dir)
    saved = {p.name: p.parameter for p in model.tensors()}
    # Without the rows that pad the vocabulary, which the model of a run has on any device.
    loaded = {t.name: t.parameter[: t.shard.saved.local_shape[0]] for t in trained.model.tensors()}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert trained.checkpoint == run_dir / "checkpoints" / "step-00000060"


def test_a_learnt_sentence_is_continued(run_dir):
    text = generate(run_dir, "one two three")
    assert text.startswith("one two three four five six seven eight nine ten, one two")
    assert SENTENCE * 3 in generate(run_dir, "one two three", max_new_tokens=150)


def test_a_sample_is_decided_by_its_seed(run_dir):
    first = generate(run_dir, "ten", temperature=2.0, seed=1)
    assert generate(run_dir, "ten", temperature=2.0, seed=1) == first
    assert generate(run_dir, "ten", temperature=2.0, seed=2) != first


def test_prompts_survive_whatever_they_are(run_dir):
    for prompt in ("", "π ≈ 3", "<|endoftext|>", "x" * 500):
        text = generate(run_dir, prompt, max_new_tokens=3)
        assert text.startswith(prompt)


def test_rows_without_words_are_never_sampled(run_dir, monkeypatch):
    decoded = []
    monkeypatch.setattr(Tokenizer, "decode", lambda _, ids: decoded.extend(ids) or "")
    generate(run_dir, "one", temperature=1000.0, max_new_tokens=200)
    words = Tokenizer.load(run_dir / "tokenizer.json").vocab_size
    assert len(decoded) > 50  # until an end-of-text
    assert max(decoded) < words < ROWS


def test_perplexity_over_the_whole_split(run_dir, root, model, tokenizer):
    result = run_evaluate(run_dir)
    tokens = [*tokenizer.encode(SENTENCE * 7), tokenizer.eos_id]
    loss_sum = 0.0
    for start in range(0, len(tokens) - 1, 32):
        row = torch.tensor([tokens[start : start + 33]])
        with torch.no_grad():
            logits = model(row[:, :-1])
        loss_sum += float(torch.nn.functional.cross_entropy(logits[0], row[0, 1:], reduction="sum"))
    assert result["tokens"] == len(tokens) - 1
    assert result["val_loss"] == pytest.approx(loss_sum / (len(tokens) - 1), rel=1e-5)
    assert result["val_perplexity"] == pytest.approx(math.exp(result["val_loss"]))
    assert result["val_perplexity"] < 3
    assert result["checkpoint"].endswith("step-00000060")


def test_perplexity_does_not_depend_on_the_batch(run_dir):
    whole = run_evaluate(run_dir)
    single = run_evaluate(run_dir, ["train.micro_batch_size=1"])
    assert single["tokens"] == whole["tokens"]
    assert single["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)


def test_bf16_weights_are_accepted(run_dir):
    fp32, bf16 = run_evaluate(run_dir), run_evaluate(run_dir, ["engine.dtype=bf16"])
    assert bf16["val_loss"] == pytest.approx(fp32["val_loss"], abs=0.1)
    assert bf16["val_loss"] != fp32["val_loss"]


def test_data_of_another_tokenizer_is_refused(run_dir, tmp_path):
    write_split(tmp_path / "val", train_byte_level_bpe(["something else"], 270))
    with pytest.raises(DataError, match="made by another tokenizer"):
        run_evaluate(run_dir, [f"data.path='{tmp_path}'"])


def test_what_is_no_run_is_said(run_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        generate(tmp_path, "x")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        generate(run_dir, "x", overrides=["checkpoint.resume=/nowhere"])
    with pytest.raises(CheckpointError, match="in the checkpoint"):
        generate(run_dir, "x", overrides=["model.num_layers=1"])
    with pytest.raises(ConfigError, match=r"temperature=-1"):
        generate(run_dir, "x", temperature=-1)


def report_of(context, outcome, with_record=True, validated=60):
    if with_record:
        record = MetricsJsonl()
        record.on_start(context)
        for step in (1, 2):
            record.on_step(step_metrics(step))
        record.on_validation(
            ValidationMetrics(
                step=validated,
                samples=validated,
                tokens=validated,
                scores={
                    "val_loss": 0.5,
                    "val_perplexity": 1.6487,
                    "val_accuracy": 0.871,
                    "val_commonest": 0.1,
                    "val_tokens": 1,
                },
            )
        )
        record.close()
    stream = io.StringIO()
    report = ClosingReport(stream=stream)
    report.on_start(context)
    report.on_end(outcome)
    return stream.getvalue()


def step_metrics(step):
    return StepMetrics(
        step=step,
        samples=step,
        tokens=step,
        loss=1.0,
        loss_units=1,
        grad_norm=1.0,
        lr=0.1,
        loss_scale=None,
        step_seconds=1.0,
        tokens_per_second=1.0,
        mfu=None,
        data_seconds=0.0,
        bubble_fraction=0.0,
        memory_gib=0.1,
    )


@pytest.fixture
def context(config, run_dir):
    return RunContext(
        config=config,
        run_dir=run_dir,
        start_step=0,
        total_steps=60,
        topology="one rank",
        device="CPU",
        parameters=30_000,
    )


def test_a_validation_before_the_last_step_is_no_result_of_the_run(context):
    """As where a new phase of data, which has no validation documents, follows one that was validated."""
    text = report_of(context, Outcome.DONE, validated=48)
    assert "result" not in text
    assert "    one two three four five six" in text


def test_the_closing_report_shows_curve_quality_and_sample(context, run_dir, capfd):
    text = report_of(context, Outcome.DONE)
    assert (run_dir / "loss.png").stat().st_size > 10_000
    assert f"curve    {run_dir}/loss.png" in text
    assert "validation perplexity 1.6 (untrained: about 400, the size of the vocabulary)" in text
    assert "result   87.1% of tokens predicted (always guessing the commonest token: 10.0%)" in text
    assert "    one two three four five six" in text
    assert capfd.readouterr().err == ""


def test_only_a_run_that_is_done_is_reported(context):
    assert report_of(context, Outcome.INTERRUPTED) == ""


def test_a_sample_that_fails_leaves_the_rest_of_the_report(context, tmp_path, run_dir, capfd):
    elsewhere = replace(context, run_dir=tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((run_dir / "tokenizer.json").read_bytes())
    text = report_of(elsewhere, Outcome.DONE)
    assert "validation perplexity 1.6" in text
    assert "sample   " not in text
    assert capfd.readouterr().err.startswith("warning: report without its sample: ConfigError: run=")


def test_a_model_too_large_for_one_process_is_not_loaded(context):
    text = report_of(replace(context, parameters=10**12), Outcome.DONE)
    assert "too large a model to sample here" in text
    assert "one two" not in text
