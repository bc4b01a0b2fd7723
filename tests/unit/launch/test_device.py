"""Which device ranks take, under each launcher and each way of binding GPUs to ranks; the GPUs are made up."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from megalm.errors import ConfigError
from megalm.launch import RankInfo, device, discover
from megalm.launch.gpus import Gpus, visible_gpus
from megalm.launch.rendezvous import Meeting
from megalm.launch.waiting import Patience

Seen = tuple[dict[str, str], Gpus]
"""What one rank has: its environment, and the GPUs that it sees."""

Bind = Callable[[int, int], Seen]
"""(node, local rank) ▶ what it has."""

PER_NODE = 4


def info_of(rank: int, nodes: int, launcher: str) -> RankInfo:
    node, local = divmod(rank, PER_NODE)
    world = nodes * PER_NODE
    environ = {
        "torchrun": {
            "RANK": f"{rank}",
            "WORLD_SIZE": f"{world}",
            "LOCAL_RANK": f"{local}",
            "LOCAL_WORLD_SIZE": f"{PER_NODE}",
            "MASTER_ADDR": "node0",
            "MASTER_PORT": "29500",
        },
        "mpirun": {
            "OMPI_COMM_WORLD_RANK": f"{rank}",
            "OMPI_COMM_WORLD_SIZE": f"{world}",
            "OMPI_COMM_WORLD_LOCAL_RANK": f"{local}",
            "OMPI_COMM_WORLD_LOCAL_SIZE": f"{PER_NODE}",
        },
        "srun": {
            "SLURM_STEP_ID": "0",
            "SLURM_JOB_ID": "7",
            "SLURM_PROCID": f"{rank}",
            "SLURM_LOCALID": f"{local}",
            "SLURM_NODEID": f"{node}",
            "SLURM_STEP_NUM_TASKS": f"{world}",
            "SLURM_STEP_NODELIST": f"node[0-{nodes - 1}]",
            "SLURM_STEP_TASKS_PER_NODE": f"{PER_NODE}(x{nodes})",
        },
    }
    if launcher == "local":
        return RankInfo(
            rank=rank,
            world_size=world,
            local_rank=local,
            local_world_size=PER_NODE,
            launcher="local",
            master_addr="127.0.0.1",
            master_port=1,
        )
    info = discover(environ[launcher])
    assert info is not None
    return info


def gpus(node: int, *numbers: int) -> Gpus:
    return Gpus(f"node{node}", tuple(f"GPU-{node}-{number}" for number in numbers))


def choose(bind: Bind, wanted: str = "auto", *, launcher: str = "srun", nodes: int = 1) -> list[str]:
    """What each rank chooses, or is told instead."""
    store = HashStore()

    def run(rank: int) -> str:
        info = info_of(rank, nodes, launcher)
        environ, seen = bind(rank // PER_NODE, info.local_rank)
        try:
            return device.choose_device(wanted, Meeting(store, info, Patience(info)), environ, lambda: seen)
        except ConfigError as error:
            return f"refused: {error}"

    with ThreadPoolExecutor(nodes * PER_NODE) as pool:
        return list(pool.map(run, range(nodes * PER_NODE)))


def all_of_node(node: int, local: int) -> Seen:
    """Every rank sees all of a machine: torchrun, mpirun, megalm's own, ``--gpus-per-node``."""
    return {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, gpus(node, 0, 1, 2, 3)


def by_control_group(node: int, local: int) -> Seen:
    """``--gpus-per-task=1`` where SLURM constrains devices: each rank's only GPU is number 0 to it."""
    environ = {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_PER_TASK": "1", "SLURM_STEP_GPUS": f"{local}"}
    return environ, gpus(node, local)


def by_variable(node: int, local: int) -> Seen:
    """``CUDA_VISIBLE_DEVICES`` set per rank: by a wrapper script, or SLURM without control groups."""
    return {"CUDA_VISIBLE_DEVICES": f"{local}", "SLURM_GPU_BIND": "single:1"}, gpus(node, local)


def by_tres(node: int, local: int) -> Seen:
    """``--tres-per-task=gres/gpu:1``, with UUIDs, in another order than ranks."""
    number = 3 - local
    environ = {"CUDA_VISIBLE_DEVICES": f"GPU-{node}-{number}", "SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=1"}
    return environ, gpus(node, number)


def two_per_task(node: int, local: int) -> Seen:
    """``--gpus-per-task=2``: as many as ranks were 2 of them, which must not mislead."""
    return {"SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, gpus(node, 2 * local, 2 * local + 1)


def four_per_task(node: int, local: int) -> Seen:
    """A rank that sees as many of its own as there are ranks: cuda:0 nevertheless."""
    return {"SLURM_GPUS_PER_TASK": "4"}, gpus(node, *range(4 * local, 4 * local + 4))


def closest(node: int, local: int) -> Seen:
    """``--gpu-bind=closest``: ranks of a socket see the GPUs of that socket."""
    first = 2 * (local // 2)
    return {"SLURM_GPU_BIND": "closest", "CUDA_VISIBLE_DEVICES": f"{first},{first + 1}"}, gpus(node, first, first + 1)


OWN_NUMBER, FIRST = [f"cuda:{local}" for local in range(PER_NODE)], ["cuda:0"] * PER_NODE


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(
    ("bind", "launcher", "expected"),
    [
        (all_of_node, "local", OWN_NUMBER),
        (all_of_node, "torchrun", OWN_NUMBER),
        (all_of_node, "mpirun", OWN_NUMBER),
        (all_of_node, "srun", OWN_NUMBER),
        (by_control_group, "srun", FIRST),
        (by_variable, "srun", FIRST),
        (by_variable, "torchrun", FIRST),
        (by_variable, "mpirun", FIRST),
        (by_tres, "srun", FIRST),
        (two_per_task, "srun", FIRST),
        (four_per_task, "srun", FIRST),
        (closest, "srun", ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),
    ],
)
def test_each_rank_has_a_gpu_of_its_own(bind: Bind, launcher: str, expected: list[str], nodes: int) -> None:
    for wanted in ("auto", "cuda"):
        assert choose(bind, wanted, launcher=launcher, nodes=nodes) == expected * nodes
    taken = [bind(node, local)[1].ids[int(expected[local][-1])] for node in range(nodes) for local in range(PER_NODE)]
    assert len(set(taken)) == nodes * PER_NODE, "no physical GPU twice"


def one_for_all(node: int, local: int) -> Seen:
    return {"CUDA_VISIBLE_DEVICES": "0"}, gpus(node, 0)


def two_for_four(node: int, local: int) -> Seen:
    return {}, gpus(node, 0, 1)


def one_twice(node: int, local: int) -> Seen:
    """A wrapper script that counts wrongly."""
    number = min(local, 2)
    return {"CUDA_VISIBLE_DEVICES": f"{number}"}, gpus(node, number, *([] if local < 3 else [3]))


def second_node_has_two(node: int, local: int) -> Seen:
    return all_of_node(node, local) if node == 0 else two_for_four(node, local)


def second_node_has_none(node: int, local: int) -> Seen:
    return all_of_node(node, local) if node == 0 else ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, Gpus("node1"))


def torch_without_cuda(node: int, local: int) -> Seen:
    return {}, Gpus(f"node{node}", unused=8, reason="torch 2.13.0+cpu is built without CUDA")


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("bind", "launcher", "nodes", "problem", "remedy"),
    [
        (one_for_all, "srun", 1, r"sees the same 1 GPU as 4 ranks.*CUDA_VISIBLE_DEVICES=0\)", "--gpus-per-node"),
        (two_for_four, "torchrun", 1, "sees the same 2 GPUs as 4 ranks of its machine do", "--nproc-per-node"),
        (two_for_four, "mpirun", 1, "sees the same 2 GPUs as 4 ranks", "--map-by ppr"),
        (two_for_four, "local", 1, "sees the same 2 GPUs as 4 ranks", "launch.ranks"),
        (one_twice, "torchrun", 1, r"has cuda:0 \(GPU-0-2\), which is another rank's, too", "one rank per GPU"),
        (second_node_has_two, "srun", 2, "rank [4567] sees the same 2 GPUs as 4", "--gpus-per-node"),
        (second_node_has_none, "srun", 2, "rank [4567] sees no GPU, while others do", "--gpus-per-node"),
        (
            torch_without_cuda,
            "local",
            1,
            r"could use 8 GPUs of its machine, but torch 2.13.0\+cpu",
            "launch.device=cpu",
        ),
    ],
)
def test_gpus_that_do_not_suit_the_ranks_are_refused_on_all_of_them(
    bind: Bind, launcher: str, nodes: int, problem: str, remedy: str, wanted: str
) -> None:
    """Whatever is wrong with one rank, none trains on the CPU; all say the same."""
    told = choose(bind, wanted, launcher=launcher, nodes=nodes)
    for text in told:
        assert text.startswith(f"refused: launch.device={wanted}: rank "), text
        assert remedy in text and text.endswith("or launch.device=cpu")
        assert "\n" not in text
    assert len(set(told)) == 1
    assert re.search(problem, told[0]), told[0]


def test_a_binding_per_task_is_named_in_the_remedy() -> None:
    def both_first(node: int, local: int) -> Seen:
        return {"SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0"}, gpus(node, 0)

    (told,) = set(choose(both_first))
    assert "(CUDA_VISIBLE_DEVICES=0 and SLURM_GPUS_PER_TASK=1)" in told
    assert "--gpus-per-task=1" in told


def test_machines_without_gpus_compute_on_the_cpu() -> None:
    def none(node: int, local: int) -> Seen:
        return {}, Gpus(f"node{node}")

    assert choose(none, nodes=2) == ["cpu"] * 8
    assert set(choose(none, "cuda")) == {"refused: launch.device=cuda: no GPU on any machine; launch.device=cpu"}


def test_cpu_asks_nobody() -> None:
    info = info_of(0, 1, "local")
    meeting = Meeting(HashStore(), info, Patience(info))
    assert device.choose_device("cpu", meeting, {}, lambda: pytest.fail("looked")) == "cpu"


def machine_with(folder: Path, files: list[str]) -> Path:
    for name in files:
        (folder / name).touch()
    return folder


NVIDIA = ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"]


@pytest.mark.parametrize(
    ("files", "environ", "unused"),
    [
        (["null", "nvidiactl"], {}, 0),
        (NVIDIA, {}, 2),
        (NVIDIA, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 2),
        (NVIDIA, {"CUDA_VISIBLE_DEVICES": "0"}, 2),
        (NVIDIA, {"CUDA_VISIBLE_DEVICES": ""}, 0),
        (NVIDIA, {"CUDA_VISIBLE_DEVICES": "-1"}, 0),
    ],
)
def test_gpus_that_torch_cannot_use_are_noticed_unless_they_are_hidden(
    files: list[str], environ: dict[str, str], unused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen = visible_gpus(environ, machine_with(tmp_path, files))
    assert (seen.ids, seen.unused) == ((), unused)
    if unused:
        assert "built without CUDA" in seen.reason or "CUDA_VISIBLE_DEVICES=" in seen.reason
    assert seen.machine == visible_gpus({}, tmp_path).machine


def test_the_same_gpu_has_the_same_id_whatever_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        def __init__(self, uuid: str) -> None:
            self.uuid = uuid

    def seen(*uuids: str) -> tuple[str, ...]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Properties(uuids[number]))
        return visible_gpus({}).ids

    assert seen("a", "b", "c")[2] == seen("c")[0] == "GPU-c"


@pytest.mark.parametrize(
    ("where", "dtype", "capability", "is_slow"),
    [
        ("cpu", "bf16", "AVX2", True),
        ("cpu", "fp16", "NO AVX", True),
        ("cpu", "fp32", "AVX2", False),
        ("cpu", "bf16", "AVX512", False),
        ("cpu", "bf16", "SVE256", False),
        ("cuda:0", "bf16", "AVX2", False),
    ],
)
def test_a_processor_that_emulates_the_format_is_told_of(monkeypatch, where, dtype, capability, is_slow):
    monkeypatch.setattr(device, "_cpu_capability", lambda: capability)
    line = device.slow_format(where, dtype)
    assert (line is not None) == is_slow
    assert line is None or (f"engine.dtype={dtype}: " in line and "engine=fp32_zero1" in line)
