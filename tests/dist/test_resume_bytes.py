"""A resume reads each byte of a checkpoint once over all ranks, and whatever any rank then holds is proven.

What is counted is what the readers read. Ranks that resume have parameters without values, so what is not loaded is
zero.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
from expert_layer import task_of
from harness import run_ranks, run_ranks_on_each
from parity import MODEL, Layout
from test_parameter_records import freeze_parts, save_state

from megalm.checkpoint.pieces import BYTES_PER_ELEMENT
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.reads import bytes_to_read
from megalm.checkpoint.store import locate
from megalm.config.compose import load_run_config
from megalm.config.schema import Config
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.engine.resume import runs_of_rank
from megalm.errors import CheckpointError
from megalm.launch import RankInfo
from megalm.launch.signals import StopRequest
from megalm.mesh.groups import ParallelContext
from megalm.models import transformer
from megalm.models.transformer import build_transformer
from megalm.runs.start import resolve_start, run_folder
from megalm.training.proof import prove_loaded
from megalm.training.restoring import shared_manifest
from megalm.training.setup import build_trainer
from megalm.verify.parity import DTYPES, Task, build_engine, train

pytestmark = pytest.mark.timeout(600)  # the first test runs all cases, beside another test

SAVED_AT = 3
"""As ``save_state`` says."""
WIDE = replace(MODEL, hidden_size=64)
STEPS = 2
"""After the checkpoint."""


@dataclass(frozen=True)
class Case:
    """A checkpoint of one layout that another one resumes from.

    Attributes:
        saved: layout of the run.
        resumed: layout of the run that goes on; None: the same.
        frozen: whether parts of the model are not trained.
        experts: whether there are experts split over two ranks, and a buffer.
    """

    saved: Layout
    resumed: Layout | None = None
    frozen: bool = False
    experts: bool = False

    @property
    def target(self) -> Layout:
        return self.resumed or self.saved

    def __str__(self) -> str:
        special = "frozen " * self.frozen + "experts " * self.experts
        return f"{special}{self.saved}" + (f" to {self.resumed}" if self.resumed else "")


SAME = [Case(Layout(dp=4, zero_stage=stage, model=WIDE)) for stage in (0, 1, 2, 3)]
SAME += [
    Case(Layout(dp=4, zero_stage=2, dtype="bf16", model=WIDE)),
    Case(Layout(dp=4, zero_stage=1, offload=True, dtype="fp16", model=WIDE)),
    Case(Layout(pp=2, dp=2, zero_stage=1, model=WIDE)),  # tied embeddings, on two stages
    Case(Layout(pp=2, dp=2, zero_stage=0, model=WIDE)),
    Case(Layout(tp=2, dp=2, zero_stage=1, model=WIDE)),
    Case(Layout(tp=2, pp=2, model=WIDE)),
    Case(Layout(cp=2, dp=2, zero_stage=1, model=WIDE)),
    *(Case(Layout(dp=4, zero_stage=stage, model=WIDE), frozen=True) for stage in (0, 3)),
    Case(Layout(pp=2, dp=2, dtype="bf16", model=WIDE), frozen=True),
    Case(Layout(tp=2, dp=2, model=WIDE), experts=True),
    Case(Layout(dp=4, zero_stage=2, model=WIDE), experts=True),
]
RESHARDED = [
    Case(Layout(dp=4, zero_stage=1, model=WIDE), Layout(dp=4, zero_stage=3, model=WIDE)),
    Case(Layout(dp=4, zero_stage=3, model=WIDE), Layout(pp=2, dp=2, model=WIDE)),
    Case(Layout(tp=4, model=WIDE), Layout(dp=4, zero_stage=2, model=WIDE)),
    Case(Layout(tp=2, dp=2, model=WIDE), Layout(dp=4, zero_stage=0, model=WIDE)),
    Case(Layout(tp=4, model=WIDE), Layout(tp=2, pp=2, model=WIDE)),
]
"""To as many tensor-parallel ranks as the checkpoint has slices, or to fewer."""
SPLIT_FURTHER = [
    Case(Layout(dp=4, zero_stage=1, model=WIDE), Layout(tp=4, model=WIDE)),
    Case(Layout(tp=2, pp=2, model=WIDE), Layout(tp=4, model=WIDE)),
    Case(Layout(dp=4, zero_stage=3, model=WIDE), Layout(tp=2, dp=2, model=WIDE)),
]
"""To more of them: matrices that are cut by columns have rows that lie apart in a piece."""
CASES = [*SAME, *RESHARDED, *SPLIT_FURTHER]


@dataclass(frozen=True)
class Result:
    """What one rank found in one case.

    Attributes:
        read: bytes that it read.
        planned: bytes that the engine's runs need, by the checkpoint's records.
        computed: the same without an engine, by the records of the parameters.
        size: bytes of the checkpoint; where slices are cut otherwise, without the rows that only pad the vocabulary.
        copied: bytes of what every tensor-parallel rank of a stage holds a copy of; on one rank of the stage, else 0.
        columns: bytes of what the stage has that is cut by columns; likewise.
        straight: losses of the run that was not interrupted.
        resumed: losses of the run that went on.
        hash: of all weights that were loaded.
    """

    read: int
    planned: int
    computed: int
    size: int
    copied: int
    columns: int
    straight: list[float]
    resumed: list[float]
    hash: str


def _config(layout: Layout) -> Config:
    """With one micro-batch for each of four replicas: there are many cases."""
    config = layout.config()
    return replace(config, train=replace(config.train, global_batch_size=4 * config.train.micro_batch_size))


def _task(case: Case, layout: Layout, context: ParallelContext) -> Task:
    if case.experts:
        return task_of(context)
    task = Task.of(_config(layout))
    return replace(task, prepare=freeze_parts) if case.frozen else task


def _context(case: Case, layout: Layout) -> ParallelContext:
    topology = replace(layout.topology, inner_axes=(("ep", 2),)) if case.experts else layout.topology
    return ParallelContext.create(topology)


def resume(item: tuple[Path, Case]) -> Result:
    folder, case = item
    context = _context(case, case.saved)
    config, task = _config(case.saved), _task(case, case.saved, context)
    engine = build_engine(config, context, task)
    train(engine, config, task, steps=SAVED_AT)
    save_state(engine, folder)
    straight = train(engine, config, task, first=SAVED_AT, steps=STEPS)
    context = _context(case, case.target)
    config, task = _config(case.target), _task(case, case.target, context)
    engine = engine_without_values(case, context)
    assert all(not bool(t.tensor.any()) for t in engine.tensors)
    reader = open_reader(folder, context)
    engine.load_state(reader, scalars=reader.manifest.training["engine"])
    found = prove_loaded(reader, engine, context, moments=True)
    read = reader.count.nbytes
    tensors = reader.manifest.tensors
    records = [t.record for t in engine.tensors]
    engine_config = config.engine
    runs = runs_of_rank(
        records,
        context.topology,
        context.rank,
        zero_stage=engine_config.zero_stage,
        bucket_mib=engine_config.bucket_mib,
    )
    by_kind = {name: {piece.kind for piece in record.pieces} for name, record in tensors.items()}
    nbytes = {name: BYTES_PER_ELEMENT * len(by_kind[name]) * prod(tensors[name].shape) for name in tensors}
    stored = sum(BYTES_PER_ELEMENT * piece.length for record in tensors.values() for piece in record.pieces)
    at = context.coordinates
    copied = sum(nbytes[r.name] for r in records if "tp" not in r.split_over and not r.copies)
    columns = sum(nbytes[r.name] for r in records if any(cut.dim for cut in r.shard.cuts))
    return Result(
        read=read,
        planned=bytes_to_read(tensors, engine.runs_to_read(moments=True)),
        computed=bytes_to_read(tensors, runs),
        size=sum(nbytes.values()) if case.saved.tp != case.target.tp else stored,
        copied=copied if (at.dp, at.cp, at.tp) == (0, 0, 0) else 0,
        columns=columns if (at.dp, at.cp, at.tp) == (0, 0, 0) else 0,
        straight=straight.losses,
        resumed=train(engine, config, task, first=SAVED_AT, steps=STEPS).losses,
        hash=found,
    )


def engine_without_values(case: Case, context: ParallelContext) -> DeepSpeedEngine:
    """As a run that resumes builds it."""
    config, task = _config(case.target), _task(case, case.target, context)
    model = build_transformer(
        config,
        config.model.vocab_size,
        context=context,
        dtype=DTYPES[config.engine.dtype],
        objective=task.objective,
        with_values=False,
    )
    task.prepare(model)
    return DeepSpeedEngine(model, context, config)


def open_reader(folder: Path, context: ParallelContext) -> CheckpointReader:
    """As ``restore`` opens it."""
    path = locate(folder).path
    return CheckpointReader(path, manifest=shared_manifest(path, context), is_proven=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list[Result]]:
    """By case, then by rank."""
    folder = tmp_path_factory.mktemp("resumed")
    return run_ranks_on_each(4, resume, [(folder / str(i), case) for i, case in enumerate(CASES)], timeout_seconds=500)


def copies_beyond_one(case: Case, ranks: list[Result]) -> int:
    """Bytes of norms and other such tensors that each further tensor-parallel rank reads again."""
    return (case.target.tp - 1) * sum(rank.copied for rank in ranks)


@pytest.mark.parametrize("index", range(len(SAME) + len(RESHARDED)), ids=map(str, [*SAME, *RESHARDED]))
def test_every_byte_is_read_once_but_for_tensor_parallel_copies(results: list[list[Result]], index: int) -> None:
    case, ranks = CASES[index], results[index]
    assert sum(rank.read for rank in ranks) == ranks[0].size + copies_beyond_one(case, ranks)
    assert (copies_beyond_one(case, ranks) > 0) == (case.target.tp > 1)


@pytest.mark.parametrize("case", SPLIT_FURTHER, ids=map(str, SPLIT_FURTHER))
def test_columns_that_are_split_further_are_read_with_what_is_between_them(
    results: list[list[Result]], case: Case
) -> None:
    """Each rank then reads nearly the whole rows that it keeps a part of."""
    ranks = results[CASES.index(case)]
    beyond = sum(rank.read for rank in ranks) - ranks[0].size - copies_beyond_one(case, ranks)
    columns = (case.target.tp // case.saved.tp - 1) * sum(rank.columns for rank in ranks)
    assert 0.9 * columns < beyond < columns


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_what_is_read_is_known_from_records_alone(results: list[list[Result]], index: int) -> None:
    for rank in results[index]:
        assert rank.read == rank.planned == rank.computed > 0


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_a_model_without_values_goes_on_as_if_it_had_not_stopped(results: list[list[Result]], index: int) -> None:
    """To the last bit on the same layout."""
    case = CASES[index]
    for rank in results[index]:
        exact = case.resumed is None
        assert rank.resumed == (rank.straight if exact else pytest.approx(rank.straight, abs=1e-5))
        assert rank.hash == results[index][0].hash


def _spoil_one_element(values: torch.Tensor) -> None:
    with torch.no_grad():
        values.view(-1)[0] += 1.0


def spoil_all(folder: Path) -> list[str]:
    """On every rank: what the proof says of each thing that went wrong on some rank."""
    return [_spoil(folder / str(number), name) for number, name in enumerate(WRONGS)]


def _spoil(folder: Path, name: str) -> str:
    layout, _ = WRONGS[name]
    case = Case(layout)
    context = ParallelContext.create(layout.topology)
    config, task = _config(layout), Task.of(_config(layout))
    engine = build_engine(config, context, task)
    train(engine, config, task, steps=SAVED_AT)
    save_state(engine, folder)
    engine = engine_without_values(case, context)
    reader = open_reader(folder, context)
    engine.load_state(reader, scalars=reader.manifest.training["engine"])
    # The second half of the embedding's rows, which the last rank has of a tied copy, only pads the vocabulary.
    if context.rank == (2 if name == "a tied copy's master" else 3):
        _go_wrong(name, engine)
    try:
        prove_loaded(reader, engine, context, moments=True)
    except CheckpointError as error:
        return str(error)
    return ""


WRONGS: dict[str, tuple[Layout, str]] = {
    "a master": (Layout(dp=4, model=WIDE), "mlp.down.weight: what was loaded is not what was saved"),
    "a moment": (Layout(dp=4, model=WIDE), "mlp.down.weight: what was loaded as exp_avg_sq is not what was saved"),
    "a moment of ZeRO-3": (
        Layout(dp=4, zero_stage=3, model=WIDE),
        "mlp.down.weight: what was loaded as exp_avg_sq is not what was saved",
    ),
    "a copy's moment": (
        Layout(tp=2, dp=2, model=WIDE),
        "mlp_norm.weight: what was loaded as exp_avg_sq is not what was saved",
    ),
    "a tied copy's master": (
        Layout(pp=2, dp=2, model=WIDE),
        "embedding.weight: what was loaded is not what was saved",
    ),
    "a replica's weight": (
        Layout(dp=4, dtype="bf16", model=WIDE),
        "mlp.down.weight: what the model computes with is not what was loaded",
    ),
    "a replica of ZeRO-0": (
        Layout(dp=4, zero_stage=0, model=WIDE),
        "mlp.down.weight: what was loaded is not what was saved",
    ),
    "weights that were not made of masters": (
        Layout(dp=4, zero_stage=3, dtype="bf16", model=WIDE),
        "mlp.down.weight: what the model computes with is not what was loaded",
    ),
    "nothing": (Layout(dp=4, model=WIDE), ""),
}


def _go_wrong(name: str, engine: DeepSpeedEngine) -> None:
    if name == "nothing":
        return None
    if name in ("a replica's weight", "weights that were not made of masters"):
        pieces = [piece for piece in engine.model_pieces() if piece.name.endswith("mlp.down.weight")]
        return pieces[-1].values.zero_() if name.startswith("weights") else _spoil_one_element(pieces[-1].values)
    kind = "exp_avg_sq" if "moment" in name else "weight"
    tensor = {"a copy's moment": "mlp_norm.weight", "a tied copy's master": "embedding.weight"}.get(
        name, "mlp.down.weight"
    )
    pieces = [piece for piece in engine.held_pieces() if piece.kind == kind and piece.name.endswith(tensor)]
    return _spoil_one_element(pieces[-1].values)


@cache
def proofs(folder: Path) -> list[tuple[str, ...]]:
    return list(zip(*run_ranks(4, spoil_all, folder), strict=True))


@pytest.fixture(scope="module")
def proofs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proofs")


@pytest.mark.parametrize("name", WRONGS)
def test_what_is_wrong_on_one_rank_is_named_on_all(proofs_folder: Path, name: str) -> None:
    (said,) = set(proofs(proofs_folder)[[*WRONGS].index(name)])
    expected = WRONGS[name][1]
    if not expected:
        assert said == ""
        return
    assert said.count(expected.partition(":")[2]) >= 1, said
    assert expected.partition(":")[0] in said
    wrong = {line.split(": ")[1] for line in said.splitlines()}
    assert len(wrong) == 1, "no other tensor is accused"


def count_initialised(configs: list[Config]) -> list[list[str]]:
    """On one rank: the tensors that are filled with random values as each run begins."""
    found: list[list[str]] = []
    initialise = transformer.initialise
    transformer.initialise = lambda tensors, seed: (
        found[-1].extend(t.name for t in tensors) or initialise(tensors, seed)
    )
    try:
        for config in configs:
            found.append([])
            rank = RankInfo(
                rank=0,
                world_size=1,
                local_rank=0,
                local_world_size=1,
                launcher="local",
                master_addr="",
                master_port=0,
            )
            _, callbacks = build_trainer(config, rank, StopRequest(), resolve_start(config, run_folder(config)))
            callbacks.close()
    finally:
        transformer.initialise = initialise
    return found


@pytest.mark.slow
def test_weights_that_are_loaded_are_not_made_first(short_runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = shutil.copytree(short_runs[0], tmp_path / "slow")
    resumed = load_run_config(run, [f"run.dir={tmp_path}", "train.steps=9"])
    named = replace(resumed, run=replace(resumed.run, name="other"))
    begun = replace(named, checkpoint=replace(named.checkpoint, init_from=str(run)))
    (fresh, of_resumed, of_begun), *_ = run_ranks(1, count_initialised, [named, resumed, begun])
    assert "embedding.weight" in fresh
    assert of_resumed == of_begun == []
