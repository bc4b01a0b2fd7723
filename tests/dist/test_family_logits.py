"""Converted models, loaded by the ranks of every layout, compute what the library computes with the original."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from cli_runs import run
from family_logits import logits_on_ranks
from foreign_models import convert_quietly
from harness import run_ranks

from megalm.data.tokenization.tokenizer import Tokenizer
from tests.library_models import ONE_OF_EACH, make, save, tokens

pytest.importorskip("transformers")

LAYOUTS = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2)]
NAMES = (*ONE_OF_EACH, "llama-attention_bias", "qwen3-windows", "qwen3-biases")
"""Two key/value heads each where they are grouped: at tp 4 two ranks share one."""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory):
    """By name: the library's logits, and by layout those that the ranks of last stages computed."""
    folder = tmp_path_factory.mktemp("families")
    runs: dict[str, Path] = {}
    drawn, expected = {}, {}
    for name in NAMES:
        theirs = save(name, folder / name)
        convert_quietly("hf", "megalm", folder / name, folder / f"{name}-run", tp=2, pp=1)
        runs[name] = folder / f"{name}-run"
        drawn[name] = tokens(theirs.config.pad_token_id if "roberta" in name else None)
        with torch.no_grad():
            expected[name] = theirs(input_ids=drawn[name]).logits

    @cache
    def found() -> list[list[dict]]:
        return run_ranks(8, logits_on_ranks, runs, drawn, LAYOUTS, timeout_seconds=240)

    return expected, found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=[f"tp{tp}-pp{pp}" for tp, pp in LAYOUTS])
def test_every_layout_computes_the_librarys_logits(name: str, index: int, compared) -> None:
    expected, found = compared
    computed = [by_layout[index][name] for by_layout in found() if by_layout[index][name] is not None]
    assert len(computed) == 8 // LAYOUTS[index][1]
    for logits in computed:
        torch.testing.assert_close(logits, expected[name], rtol=0, atol=1e-4)


def test_a_model_of_the_library_is_tuned_and_exported_as_what_it_was(tiny_dataset: Path, tmp_path: Path) -> None:
    """Mistral-Nemo's architecture is Llama's too; what megalm has trained is still exported as Mistral."""
    import transformers

    tokenizer = Tokenizer.load(tiny_dataset / "tokenizer.json")
    theirs = make("mistral-nemo", vocab_size=tokenizer.vocab_size, hidden_size=32, initializer_range=0.02)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    convert_quietly("hf", "megalm", tmp_path / "theirs", tmp_path / "imported")
    for name, source in (("tuned", "imported"), ("again", "tuned")):
        code, output = run(
            [
                f"data.path=[{tiny_dataset}]",
                f"run.dir={tmp_path}",
                f"run.name={name}",
                f"checkpoint.init_from={tmp_path / source}",
                "train.steps=2",
                "parallel.tp=2",
                "parallel.pp=1",
            ]
        )
        assert code == 0, output
    convert_quietly("megalm", "hf", tmp_path / "again", tmp_path / "exported", verify=True)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert type(exported) is type(theirs)
    before, after = dict(theirs.named_parameters()), dict(exported.named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in before)
