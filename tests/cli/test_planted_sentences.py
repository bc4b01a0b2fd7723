"""A run that reads sentences once, ten and a hundred times gives back those that it read often, and says where from."""

from __future__ import annotations

import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from megalm.cli.main import main
from tests.planted import plant, sentences

_MODULES = ("argparse", "datetime", "decimal", "doctest", "optparse", "pickletools", "smtplib", "typing")
TIMES, EACH = (1, 10, 100), 20
LENGTHS = ("4", "8", "12")


def megalm(*arguments: str, capsys: pytest.CaptureFixture) -> str:
    code = main(arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.out + captured.err
    return captured.out


@pytest.mark.slow
def test_what_was_read_often_is_continued_and_traced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """20 sentences for each count, between paragraphs of the standard library, in one epoch."""
    files = [Path(sysconfig.get_path("stdlib")) / f"{name}.py" for name in _MODULES]
    parts = [part for file in files for part in file.read_text(encoding="utf-8").split("\n\n")]
    ordinary = [part for part in dict.fromkeys(parts) if 300 < len(part) < 1500][::2][:200]
    counts = Counter(re.findall(r"\b[a-z]{3,9}\b", " ".join(ordinary)))
    words = sorted(word for word, count in counts.items() if count >= 2)
    assert len(words) > 400
    made = sentences(words, EACH * len(TIMES), length=26, seed=7)
    planted = {times: made[n * EACH : (n + 1) * EACH] for n, times in enumerate(TIMES)}
    plant(tmp_path / "train", ordinary[60:], planted, seed=3)
    plant(tmp_path / "val", ordinary[:60], {}, seed=3)
    data = str(tmp_path / "data")
    prepare = ["prepare", "--corpus", "text", "--input", str(tmp_path / "train"), "--val-input", str(tmp_path / "val")]
    told = megalm(*prepare, "--tokenizer-vocab", "2048", "--workers", "1", "--out", data, capsys=capsys)
    tokens = int(re.search(r"▶ ([\d,]+) training", told)[1].replace(",", ""))
    epoch = -(-(tokens - 1) // 128)
    train = [
        "experiment=quickstart", f"data.path={data}", f"run.dir={tmp_path}", "run.name=planted", "parallel=single",
        "engine=fp32_zero1", "model.num_layers=1", "model.hidden_size=256", "model.sequence_length=128",
        f"train.steps={-(-epoch // 2)}", "train.global_batch_size=2", "train.micro_batch_size=2", "optim.lr=3e-3",
        "optim.warmup_tokens=5_000", "train.validate_every=0", "report.prompt=null", "checkpoint.every=0",
        "logging.tensorboard=false", "logging.wandb=disabled", "report.plot=false",
    ]  # fmt: skip
    megalm("train", *train, capsys=capsys)

    task = tmp_path / "planted.yaml"
    task.write_text(
        "base: memorisation\nprompt_tokens: [4, 8, 12]\ncontinuation_tokens: 5\ndocuments: planted\nworst: 20\n"
    )
    run = str(tmp_path / "planted")
    found = json.loads(megalm("evaluate", run, "--task", str(task), "--json", capsys=capsys))
    (record,) = found["results"]
    rows = [json.loads(line) for line in Path(found["files"][0]).with_suffix(".jsonl").read_text().splitlines()]
    by_count = {times: [row for row in rows if _planted(row) == times] for times in TIMES}
    for times, members in by_count.items():
        assert len(members) == EACH
        assert all(row["copies"] == times and times <= row["times"] <= times + 4 for row in members)
        for row in members:
            assert len({source["document"] for source in row["sources"]}) == min(times, 100)
    verbatim = {times: [_mean(row["verbatim"][p] for row in rows) for p in LENGTHS] for times, rows in by_count.items()}
    matched = {times: _mean(row["matched"][LENGTHS[-1]] / 5 for row in rows) for times, rows in by_count.items()}
    assert max(verbatim[1]) <= 0.05 and min(verbatim[100]) >= 0.7, (verbatim, matched)
    assert matched[1] + 0.02 < matched[10] < matched[100] - 0.2, (verbatim, matched)
    assert verbatim[1][-1] <= verbatim[10][-1] < verbatim[100][-1], (verbatim, matched)

    assert len(record["worst"]) == 20 and all(_planted(case) in (10, 100) for case in record["worst"])
    case = record["worst"][0]
    name = case["sources"][0]["document"]
    assert any(case["prompt"].strip() in text and case["continuation"].strip() in text for text in made)
    seen = megalm("data", "show", run, "--document", name, "--json", capsys=capsys).splitlines()
    assert json.loads(seen[0])["step"] in case["steps"]
    shown = megalm("evaluate", run, "--task", str(task), capsys=capsys)
    assert f"trace         megalm data show {run} --document {name}" in shown


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _planted(row: dict) -> int:
    found = re.search(r"planted-(\d+)-", row["sources"][0]["document"])
    return 0 if found is None else int(found[1])
