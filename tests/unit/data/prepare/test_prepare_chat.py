"""Conversations are prepared by the tokenizer's own chat template, which goes with the dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.data.prepare.blocks import CONVERSATIONS
from megalm.data.prepare.corpora import CorpusOptions
from megalm.data.prepare.executors import local_workers
from megalm.data.prepare.recipe import Recipe
from megalm.data.prepare.run import prepare
from megalm.data.shards.dataset import tokenizer_of
from megalm.data.shards.store import open_store
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import DataError
from megalm.plan.preflight import make_plan
from tests.chat_models import MODELS


def rows(*, system: bool = False) -> list[dict]:
    chats = []
    for number in range(40):
        chat = [{"role": "user", "content": f"two and {number}"}, {"role": "assistant", "content": f"are {number + 2}"}]
        chats.append(
            {"messages": [{"role": "system", "content": "Add."}, *chat] if system and not number % 4 else chat}
        )
    return chats


def run(folder: Path, tokenizer: Path, chats: list[dict]):
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    options = CorpusOptions((str(folder / "chats.jsonl"),), prompt="prompt", completion="completion")
    recipe = Recipe(
        "sft", options, tokenizer=str(tokenizer), val_fraction=0.3, chunk_tokens=64, chunks_per_shard=5, pack=64
    )
    with local_workers(1) as pool:
        return prepare(recipe, folder / "out", workers=pool, overwrite=False, progress=lambda *_: None, command="test")


def test_the_template_of_the_tokenizer_is_used_and_kept(tmp_path: Path) -> None:
    model = MODELS["llama-3"].write(tmp_path / "model")
    summary = run(tmp_path, model, rows(system=True))
    assert summary.notes == {CONVERSATIONS: 40}
    assert summary.removed == {}
    kept = tokenizer_of([open_store(str(tmp_path / "out"))])
    assert kept.roles.chat_template == MODELS["llama-3"].template
    assert kept.chat is not None


def test_conversations_that_the_template_refuses_are_counted_by_its_reason(tmp_path: Path) -> None:
    summary = run(tmp_path, MODELS["gemma"].write(tmp_path / "model"), rows(system=True))
    assert summary.removed == {"the chat template refuses it: System role not supported": 10}
    assert (summary.read, summary.documents) == (40, 30)
    (named,) = summary.examples.values()
    assert named[0] == f"{tmp_path / 'chats.jsonl'}@0"


def test_without_a_template_chatml_is_used_and_stored_for_generation_and_export(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(MODELS["qwen"].definition, encoding="utf-8")
    assert Tokenizer.load(tmp_path / "tokenizer.json").chat is None
    summary = run(tmp_path, tmp_path / "tokenizer.json", rows())
    assert summary.documents == 40
    kept = tokenizer_of([open_store(str(tmp_path / "out"))])
    assert kept.chat is not None
    assert kept.chat.template.text([{"role": "user", "content": "x"}], add_generation_prompt=True) == (
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )
    kept.save(tmp_path)
    assert Tokenizer.load(tmp_path / "tokenizer.json").stop_ids == {kept.eos_id, kept.special_tokens["<|im_end|>"]}
    assert kept.roles.end == "<|endoftext|>"


def test_prompts_and_completions_need_no_template_and_leave_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(MODELS["qwen"].definition, encoding="utf-8")
    run(
        tmp_path,
        tmp_path / "tokenizer.json",
        [{"prompt": f"{n} and one ", "completion": f"{n + 1}"} for n in range(40)],
    )
    assert tokenizer_of([open_store(str(tmp_path / "out"))]).chat is None


def test_conversations_need_marks(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(MODELS["llama-2"].definition, encoding="utf-8")
    with pytest.raises(DataError, match=r"no chat template and no token <\|im_start\|>"):
        run(tmp_path, tmp_path / "tokenizer.json", rows())


@pytest.mark.parametrize(("model", "is_said"), [("llama-2", True), ("llama-3", False)])
def test_turns_that_end_like_documents_are_said_where_documents_are_kept_apart(
    model: str, is_said: bool, tmp_path: Path
) -> None:
    run(tmp_path, MODELS[model].write(tmp_path / "model"), rows())
    shape = ["model.sequence_length=64", "model.num_heads=2", "model.hidden_size=32", "optim.warmup_tokens=512"]
    settings = [f"data.path=[{tmp_path / 'out'}]", "data.reset_at_documents=true", f"run.dir={tmp_path}"]
    batch = ["train.steps=1", "train.global_batch_size=2", "train.micro_batch_size=2", "launch.ranks=1"]
    plan = make_plan(["experiment=quickstart", "parallel=single", "engine=fp32_zero1", *shape, *settings, *batch])
    said = [note for note in plan.notes if "ends each turn" in note]
    assert bool(said) is is_said
    assert not is_said or said[0].startswith("data.reset_at_documents=true: </s> ends each turn of a conversation")
