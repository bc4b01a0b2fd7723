"""``import megalm``: its names, how light it is, and what they do on a run that it has trained."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import megalm

PUBLIC = [
    "CheckpointError",
    "Comparison",
    "Completion",
    "Config",
    "ConfigError",
    "DataError",
    "LoadedModel",
    "MegalmError",
    "Sampling",
    "Score",
    "Settings",
    "Trained",
    "TrainingError",
    "__version__",
    "compare",
    "compose",
    "load",
    "train",
]
"""Names that are kept: one that is taken away or renamed breaks someone's code."""


def test_the_public_names_stay() -> None:
    assert megalm.__all__ == PUBLIC
    assert all(getattr(megalm, name) is not None for name in PUBLIC)
    assert set(PUBLIC) <= set(dir(megalm))
    with pytest.raises(AttributeError, match="no attribute 'lod'; it has CheckpointError"):
        _ = megalm.lod


def test_importing_megalm_imports_nothing_heavy() -> None:
    code = "import megalm, sys; print([m for m in ('torch', 'numpy', 'hydra', 'yaml', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_compose_checks_everything_and_says_all_of_it() -> None:
    config = megalm.compose(["experiment=quickstart", "train.steps=7"])
    assert isinstance(config, megalm.Config)
    assert config.train.steps == 7
    with pytest.raises(megalm.ConfigError) as refused:
        megalm.compose(["experiment=quickstart", "train.steps=0", "optim.lr=-1"])
    assert len(refused.value.lines) == 2
    with pytest.raises(megalm.ConfigError, match=r"model\.num_heads"):
        megalm.compose(["experiment=quickstart", "model.num_heads=5"])


def test_a_run_is_loaded_and_asked(short_runs: tuple[Path, Path]) -> None:
    m = megalm.load(short_runs[0])
    text = "def forward(self, x):\n    return x\n"
    tokens = m.tokens(text)
    logits = m.logits(text)
    assert logits.shape == (len(tokens), m.tokenizer.vocab_size)
    assert torch.equal(logits, m.model(torch.tensor([tokens]))[0])
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]))
    assert m.loss(text) == pytest.approx(float(expected), rel=1e-6)
    assert m.perplexity(text) == pytest.approx(math.exp(m.loss(text)))
    assert m.config.run.name == "slow"
    assert m.checkpoint.name == "step-00000004"
    once = m.generate("def ", max_new_tokens=8, temperature=0.0)
    assert once and once == m.generate("def ", max_new_tokens=8, temperature=0.0)


def test_a_continuation_has_the_tokens_of_the_whole_text(short_runs: tuple[Path, Path]) -> None:
    """Not those that it would have alone: a space between the two is in its first token, wherever it is written."""
    m = megalm.load(short_runs[0])
    whole = m.tokens("return self")
    at = next(n for n in range(len(whole)) if m.tokenizer.decode(whole[:n]) == "return")
    rows = m.logits("return self").log_softmax(-1)
    expected = [float(rows[n - 1, whole[n]]) for n in range(at, len(whole))]
    for context, continuation in (("return", " self"), ("return ", "self")):
        assert m.score(context, continuation).log_probabilities == pytest.approx(expected, abs=1e-4)
    assert len(m.score("", "return").log_probabilities) == len(m.tokens("return")), "the first one is counted, too"
    with pytest.raises(megalm.ConfigError, match="continuation: an empty text"):
        m.score("return", "")


def test_what_is_no_text_no_list_of_them_and_no_conversation(short_runs: tuple[Path, Path]) -> None:
    m = megalm.load(short_runs[0])
    for wrong in (b"def", None, 5):
        with pytest.raises(megalm.DataError, match="where a text belongs"):
            m.generate(wrong)  # type: ignore[arg-type]
    with pytest.raises(megalm.DataError, match="half of one"):
        m.loss("def \ud800")
    with pytest.raises(megalm.ConfigError, match="prompts=def: one text; a list of texts"):
        m.complete("def")
    for messages in ([], "hello", [{"role": "user"}]):
        with pytest.raises(megalm.DataError, match=r'^chat: .*; a list of \{"role"'):
            m.chat(messages)  # type: ignore[arg-type]
    with pytest.raises(megalm.ConfigError, match="samples=2: a conversation goes on from one text"):
        m.chat([{"role": "user", "content": "def"}], megalm.Settings(samples=2))


def test_a_run_is_named_and_a_checkpoint_is_taken_as_it_is(
    short_runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two checkpoints the older one, in a folder with a name that Hydra's grammar would have its own reading of."""
    run = tmp_path / "runs" / "try, a=1 [b] {c}"
    shutil.copytree(short_runs[0], run)
    newer = run / "checkpoints" / "step-00000004"
    older = newer.rename(newer.with_name("step-00000002"))
    shutil.copytree(short_runs[1] / "checkpoints" / "step-00000004", newer)
    monkeypatch.chdir(tmp_path)
    assert megalm.load(run.name).checkpoint == Path("runs") / run.name / "checkpoints" / newer.name
    loaded = megalm.load(older.relative_to(tmp_path))
    assert loaded.checkpoint.name == older.name
    assert (
        loaded.loss("def f(x):") == megalm.load(short_runs[0]).loss("def f(x):") != megalm.load(run).loss("def f(x):")
    )
    shutil.copytree(short_runs[1], tmp_path / "runs" / "fast")
    assert megalm.compare([run.name, "fast"]).names() == ["slow", "fast"]


def test_a_long_text_is_read_in_pieces_and_every_token_but_the_first_counts_once(short_runs: tuple[Path, Path]) -> None:
    m = megalm.load(short_runs[0])
    length = m.config.model.sequence_length
    tokens = m.tokens("class Layer(nn.Module):\n    pass\n" * 12)
    assert len(tokens) > 2 * length + 2
    pieces = [tokens[start : start + length + 1] for start in range(0, len(tokens) - 1, length)]
    with torch.no_grad():
        sums = [
            torch.nn.functional.cross_entropy(
                m.model(torch.tensor([piece[:-1]]))[0], torch.tensor(piece[1:]), reduction="sum"
            )
            for piece in pieces
        ]
    assert m.loss("class Layer(nn.Module):\n    pass\n" * 12) == pytest.approx(float(sum(sums)) / (len(tokens) - 1))
    with pytest.raises(megalm.ConfigError, match=f"the model takes 1 to {length}"):
        m.logits("class Layer(nn.Module):\n    pass\n" * 12)


@pytest.mark.parametrize("text", ["", "x"])
def test_a_text_of_which_nothing_is_predicted_has_no_loss(short_runs: tuple[Path, Path], text: str) -> None:
    m = megalm.load(short_runs[0])
    assert len(m.tokens(text)) < 2
    with pytest.raises(megalm.ConfigError, match="at least 2 are needed"):
        m.loss(text)


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(megalm.ConfigError, match="no such folder"):
        megalm.load(tmp_path / "nothing")


def test_a_run_is_trained_and_its_record_is_at_hand(short_runs: tuple[Path, Path]) -> None:
    slow = megalm.Trained(short_runs[0])
    assert len(slow.losses) == 4
    assert all(math.isfinite(loss) for loss in slow.losses)
    assert len(slow.validation_losses) >= 1
    assert slow.metrics[0]["attempt"] == 1


def test_training_that_cannot_begin_or_does_not_end_is_an_error(short_runs: tuple[Path, Path], tmp_path: Path) -> None:
    config = megalm.load(short_runs[0]).config
    nowhere = replace(config, data=replace(config.data, path=(str(tmp_path / "none"),)))
    with pytest.raises(megalm.DataError, match="no such folder"):
        megalm.train(replace(nowhere, run=replace(config.run, dir=str(tmp_path))))
    error = megalm.TrainingError(4, tmp_path)
    assert error.exit_code == 4
    assert str(tmp_path / "logs") in str(error)


def test_runs_are_compared(short_runs: tuple[Path, Path], tmp_path: Path) -> None:
    found = megalm.compare(short_runs)
    assert ("steps", "4 of 4", "4 of 4") in found.table()
    found.save_picture(str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
