"""What each launcher puts into the environment, and which rank it makes of a process."""

from __future__ import annotations

import pytest

from megalm.errors import ConfigError
from megalm.launch import RankInfo, discover
from megalm.launch.discovery import first_node

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
BATCH_SCRIPT = {name: SRUN[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_NODEID")} | {"SLURM_PROCID": "0"}


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def rank_5(launcher: str, address: str, port: int) -> RankInfo:
    return RankInfo(
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        launcher=launcher,
        master_addr=address,
        master_port=port,
    )


def test_torchrun() -> None:
    assert discover(TORCHRUN) == rank_5("torchrun", "node0", 29500)


def test_torchruns_variables_set_by_an_operator_that_starts_one_rank_per_pod() -> None:
    info = discover(without(TORCHRUN, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"))
    assert info is not None
    assert (info.rank, info.local_rank, info.local_world_size) == (5, 0, 1)


def test_srun_meets_at_the_first_node_on_a_port_of_the_job() -> None:
    info = discover(SRUN)
    assert info is not None
    assert info == rank_5("srun", "gpu07", info.master_port)
    other_job = discover({**SRUN, "SLURM_JOB_ID": "4243"})
    other_step = discover({**SRUN, "SLURM_STEP_ID": "1"})
    assert other_job and other_step
    assert len({info.master_port, other_job.master_port, other_step.master_port}) == 3
    assert all(10_000 <= found.master_port < 30_000 for found in (info, other_job, other_step))


def test_srun_meets_where_the_user_says() -> None:
    assert discover({**SRUN, "MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "1234"}) == rank_5("srun", "10.1.1.1", 1234)


@pytest.mark.parametrize(("node", "tasks"), [("0", 3), ("1", 3), ("2", 2)])
def test_srun_with_nodes_of_different_size(node: str, tasks: int) -> None:
    info = discover({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3(x2),2", "SLURM_NODEID": node})
    assert info is not None
    assert info.local_world_size == tasks


def test_a_batch_script_is_no_rank() -> None:
    assert discover(BATCH_SCRIPT) is None


def test_a_shell_that_srun_has_started_is_no_rank() -> None:
    alone = {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert discover({**SRUN, **alone}) is None


def test_mpirun_leaves_open_where_ranks_meet() -> None:
    assert discover(MPIRUN) == rank_5("mpirun", "", 0)


@pytest.mark.parametrize(("inner", "name"), [(TORCHRUN, "torchrun"), (MPIRUN, "mpirun")])
def test_the_launcher_that_started_last_wins(inner: dict[str, str], name: str) -> None:
    info = discover({**SRUN, **inner})
    assert info is not None
    assert info.launcher == name


@pytest.mark.parametrize("environ", [{}, {"OMP_NUM_THREADS": "1"}, {"RANK": "0"}, {"MASTER_ADDR": "a", "RANK": "0"}])
def test_no_launcher(environ: dict[str, str]) -> None:
    assert discover(environ) is None


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE=many"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 of 8"),
        (without(MPIRUN, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE"),
        (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID"),
        ({**SRUN, "SLURM_NODEID": "2"}, "SLURM_NODEID=2"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4 x 2"}, "SLURM_STEP_TASKS_PER_NODE=4 x 2"),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_RANK": "-1"}, "local rank -1 of 4"),
    ],
)
def test_variables_that_make_no_sense_are_named(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        discover(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("rack[2-4]-ib", "rack2-ib"),
        ("a-b.example.org,c", "a-b.example.org"),
    ],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_an_empty_node_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        first_node("")
