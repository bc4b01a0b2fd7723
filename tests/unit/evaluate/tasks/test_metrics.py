"""Metrics against the command lines of the libraries that the field cites, and against values computed by hand."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalm.evaluate.tasks.metrics.base import ChoiceScore, Chosen, Completed, Generated
from megalm.evaluate.tasks.metrics.registry import METRICS, make_metrics
from megalm.evaluate.tasks.metrics.words import exact, f1, normalised
from megalm.evaluate.tasks.task import CLOZE, GENERATION, MULTIPLE_CHOICE, MetricChoice

OUTPUTS = [
    "A man is riding a brown horse on the beach.",
    "Two children play with the red ball in the garden",
    "The dog jumps over a fence!",
    "",
    "Several people are waiting for the bus, in the rain.",
]
REFERENCES = [
    "A man rides a brown horse along the beach.",
    "Two kids are playing with a red ball in a garden.",
    "A dog is jumping over the fence.",
    "A woman reads.",
    "Some people wait for a bus in the rain.",
]
OTHERS = [
    "A man is riding his horse on the beach.",
    "Two children play ball in the garden.",
    "The dog jumps over a fence.",
    "Woman reading a book.",
    "Several people are waiting at a bus stop.",
]


def value(name: str, answers: list, kind: str = GENERATION, **options: object) -> tuple[float, str]:
    (metric,) = make_metrics([MetricChoice(name, options)], kind)
    found = metric.value(metric.statistics(answers))
    return found, metric.signature


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", *command], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("streams", [[REFERENCES], [REFERENCES, OTHERS]])
@pytest.mark.parametrize(
    ("name", "options", "arguments"),
    [
        ("bleu", {}, ["-m", "bleu"]),
        ("bleu", {"tokenize": "char", "lowercase": True}, ["-m", "bleu", "-tok", "char", "-lc"]),
        ("chrf", {}, ["-m", "chrf"]),
        ("chrf", {"word_order": 2}, ["-m", "chrf", "--chrf-word-order", "2"]),
    ],
)
def test_bleu_and_chrf_are_those_of_sacrebleus_command(
    name: str, options: dict, arguments: list[str], streams: list[list[str]], tmp_path: Path
) -> None:
    files = []
    for number, lines in enumerate([OUTPUTS, *streams]):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text("".join(f"{line}\n" for line in lines))
    said = json.loads(run("sacrebleu", *map(str, files[1:]), "-i", str(files[0]), *arguments, "-w", "10"))
    answers = [Generated(text, tuple(right)) for text, right in zip(OUTPUTS, zip(*streams, strict=True), strict=True)]
    found, signature = value(name, answers, **options)
    assert found == pytest.approx(said["score"], abs=1e-9)
    assert signature == said["signature"]


def test_items_may_have_different_numbers_of_references() -> None:
    answers = [Generated(OUTPUTS[0], (REFERENCES[0], OTHERS[0])), Generated(OUTPUTS[1], (REFERENCES[1],))]
    found, signature = value("bleu", answers)
    assert 0 < found < 100
    assert signature.startswith("nrefs:var|")


@pytest.mark.parametrize("stemmer", [True, False])
def test_rouge_is_that_of_its_command(stemmer: bool, tmp_path: Path) -> None:
    (tmp_path / "a.targets").write_text("".join(f"{line}|" for line in [*REFERENCES, "one two.\nthree four."]))
    outputs = [*OUTPUTS, "three four five.\none two."]
    (tmp_path / "a.decodes").write_text("".join(f"{line}|" for line in outputs))
    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    run(
        "rouge_score.rouge",
        f"--target_filepattern={tmp_path}/*.targets",
        f"--prediction_filepattern={tmp_path}/*.decodes",
        f"--output_filename={tmp_path}/scores.csv",
        f"--use_stemmer={str(stemmer).lower()}",
        f"--rouge_types={','.join(names)}",
        "--delimiter=|",
        "--noaggregate",
    )
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    references = [*REFERENCES, "one two.\nthree four."]
    answers = [Generated(text, (right,)) for text, right in zip(outputs, references, strict=True)]
    for name in names:
        (metric,) = make_metrics([MetricChoice(name, {"stemmer": stemmer})], GENERATION)
        found = metric.values(metric.statistics(answers))
        assert found == pytest.approx([float(row[f"{name}-F"]) for row in rows], abs=1e-6), name
    lines, whole = (make_metrics([MetricChoice(name)], GENERATION)[0] for name in ("rougeLsum", "rougeL"))
    assert lines.values(lines.statistics(answers[-1:])) > whole.values(whole.statistics(answers[-1:]))


def test_squad_normalisation_by_hand() -> None:
    assert normalised("The  Cat's hat, an  owl.") == "cats hat owl"
    assert normalised("Theatre and another") == "theatre and another", "articles are words of their own"
    assert exact("the Cat.", "cat") == 1.0
    # 2 of 3 words said, 2 of 4 words right: 2·(2/3)(1/2) / (2/3 + 1/2) = 4/7
    assert f1("the big cat sat", "cat sat on mats") == pytest.approx(4 / 7)
    # bags: "cat cat" shares one cat with "cat": precision 1/2, recall 1
    assert f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert f1("dog", "cat") == 0.0
    assert (f1("", ""), f1("a", "the"), f1("cat", "")) == (1.0, 1.0, 0.0)


def test_f1_and_exact_match_take_the_best_reference_and_no_answer() -> None:
    answers = [
        Generated("Paris", ("the city of Paris", "Paris")),  # 1, 1
        Generated("in London", ("London",)),  # 2/3, 0
        Generated("unanswerable", ()),  # 1, 1
        Generated("Rome", ()),  # 0, 0
        Generated("Unanswerable.", ("Oslo",)),  # 0, 0
        Generated("", ("", "the")),  # 1, 1
    ]
    assert value("f1", answers, no_answer="unanswerable")[0] == pytest.approx((1 + 2 / 3 + 1 + 0 + 0 + 1) / 6)
    assert value("exact_match", answers, no_answer="unanswerable")[0] == pytest.approx(3 / 6)
    assert value("exact_match", [Generated("-5", ("5",))])[0] == 1.0, "SQuAD's normalisation has no signs"
    assert value("exact_match", [Generated("-5", ("5",))], normalise="none")[0] == 0.0


def test_choices_are_ranked_by_each_normalisation() -> None:
    scores = (
        ChoiceScore(-4.0, 1, "ab", unconditional=-3.0),  # per byte −2, per token −4, ratio −1
        ChoiceScore(-5.0, 2, "ééé", unconditional=-6.5),  # per byte −5/6, per character −5/3, per token −2.5, ratio 1.5
        ChoiceScore(-6.0, 4, "abcd", unconditional=-3.0),  # per byte −1.5, per character −1.5, per token −1.5
    )
    expected = {
        "accuracy": 0,
        "accuracy_per_byte": 1,
        "accuracy_per_character": 2,
        "accuracy_per_token": 2,
        "accuracy_unconditional": 1,
    }
    for name, best in expected.items():
        for right in range(3):
            assert value(name, [Chosen(scores, right)], MULTIPLE_CHOICE)[0] == float(right == best), name


def test_cloze_metrics_by_hand() -> None:
    answers = [Completed(-1.0, 1, "mat", True), Completed(-3.0, 3, "élan", False)]
    assert value("accuracy", answers, CLOZE)[0] == 0.5
    assert value("perplexity", answers, CLOZE)[0] == pytest.approx(math.exp(2))
    assert value("perplexity_per_token", answers, CLOZE)[0] == pytest.approx(math.e)
    assert value("bits_per_byte", answers, CLOZE)[0] == pytest.approx(4 / math.log(2) / 8)
    assert value("perplexity", [Completed(-math.inf, 1, "x", False)], CLOZE)[0] == math.inf


def test_every_metric_gives_one_number_per_item_and_adds_up() -> None:
    given = {
        GENERATION: [Generated(text, (right,)) for text, right in zip(OUTPUTS, REFERENCES, strict=True)],
        MULTIPLE_CHOICE: [Chosen((ChoiceScore(-1, 1, "a", -2.0), ChoiceScore(-2, 1, "b", -1.0)), n) for n in (0, 1)],
        CLOZE: [Completed(-1.0, 1, "mat", True), Completed(-3.0, 3, "élan", False)],
    }
    for name, kinds in METRICS.items():
        for kind in kinds:
            metric = kind.make({})
            statistics = metric.statistics(given[kind.kind])
            assert statistics.shape[0] == len(given[kind.kind]), name
            assert metric.name == name
            assert metric.signature, name
            sums = statistics.sum(axis=0)
            assert metric.values(np.stack([sums, 2 * sums])) == pytest.approx([metric.value(statistics)] * 2), name
