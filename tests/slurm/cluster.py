"""A real SLURM of several nodes on one machine, for tests: munged, slurmctld and one slurmd per node.

Each node has its own network, host name, mount and pid namespace, on a bridge that exists only in the namespace of the
head; nothing appears in the machine's own network. All nodes see the same file system, as on a cluster. Needs root.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "unshare", "nsenter", "ip")

_NETWORK = "10.203.0"
_HEAD = f"{_NETWORK}.254"
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

_SETTINGS = """\
ClusterName=test
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/munge.sock
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldTimeout=10
SlurmdTimeout=5
KillWait=5
MessageTimeout=5
InactiveLimit=0
MinJobAge=300
JobRequeue=1
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_requirement() -> str | None:
    """Why a cluster cannot be started here; None when it can."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    missing = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm munge iproute2)"
    probe = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True, check=False
    )
    return None if probe.returncode == 0 else "this machine does not allow namespaces"


class SlurmCluster:
    """A running cluster; :meth:`stop` ends every process of it.

    Args:
        root: an absolute, empty folder that everybody may enter (munged insists).
        nodes: number of nodes, of 4 CPUs each.
    """

    def __init__(self, root: Path, nodes: int) -> None:
        self._root = root
        self._nodes = [f"node{i}" for i in range(nodes)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(root / "etc/slurm.conf")}
        # A test that itself runs inside a SLURM job must not pass that job's variables on.
        for name in [name for name in self._environment if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del self._environment[name]
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def run(self, *command: str, cwd: Path | None = None, check: bool = True, **environment: str) -> str:
        """Run a command on the head; its standard output."""
        result = subprocess.run(
            [*self._on_head, *([f"--wd={cwd}"] if cwd else []), *command],
            env={**self._environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check and result.returncode != 0:
            raise AssertionError(f"{' '.join(command)} exited {result.returncode}:\n{result.stdout}{result.stderr}")
        return result.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What SLURM says of a job: ``JobState``, ``Restarts``, ``ExitCode``..."""
        words = self.run("scontrol", "-o", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(
        self, job_id: str, done: Callable[[dict[str, str]], bool], timeout_seconds: float
    ) -> dict[str, str]:
        """Poll a job until ``done``, without the two minutes that SLURM lets a requeued job wait."""
        deadline = time.monotonic() + timeout_seconds
        hurried = -1
        while time.monotonic() < deadline:
            job = self.job(job_id)
            if done(job):
                return job
            if job["JobState"] == "PENDING" and int(job["Restarts"]) > hurried:
                hurried = int(job["Restarts"])
                time.sleep(2)  # while the old attempt is being cleared up, SLURM would set the start time again
                self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now", check=False)
            time.sleep(0.3)
        raise AssertionError(f"job {job_id} after {timeout_seconds} s: {self.job(job_id)}\n{self.logs()}")

    def logs(self) -> str:
        """The last lines of every daemon, for a failed test."""
        files = sorted((self._root / "log").glob("*"))
        return "\n".join(
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]) for path in files
        )

    def stop(self) -> None:
        """End all processes: killing the first process of a pid namespace ends all in it."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGKILL)
            process.wait()

    @property
    def _on_head(self) -> list[str]:
        return ["nsenter", "--target", str(self._head.pid), "--net", "--uts", "--mount"]

    def _start(self) -> None:
        for name in ("etc", "munge", "state", "log", "run", "spool"):
            (self._root / name).mkdir(parents=True)
        (self._root / "munge/munge.key").write_bytes(os.urandom(128))
        (self._root / "munge/munge.key").chmod(0o400)
        (self._root / "state").chmod(0o700)
        self._write_configuration()
        self._start_head()
        for number, name in enumerate(self._nodes):
            self._start_node(number, name)
        self._wait_until(
            lambda: self.run("sinfo", "-h", "-o", "%D %t", check=False).split() == [str(len(self._nodes)), "idle"]
        )

    def _write_configuration(self) -> None:
        addresses = {name: f"{_NETWORK}.{number + 1}" for number, name in enumerate(self._nodes)}
        hosts = ["127.0.0.1 localhost", f"{_HEAD} head", *(f"{address} {name}" for name, address in addresses.items())]
        (self._root / "etc/hosts").write_text("\n".join(hosts) + "\n")
        nodes = [f"NodeName={name} NodeAddr={ip} CPUs=4 RealMemory=1000" for name, ip in addresses.items()]
        settings = _SETTINGS.format(head=_HEAD, root=self._root)
        (self._root / "etc/slurm.conf").write_text("\n".join([*nodes, settings]))
        (self._root / "etc/cgroup.conf").write_text("CgroupPlugin=autodetect\n")

    def _start_head(self) -> None:
        script = (
            f"hostname head; mount --bind {self._root}/etc/hosts /etc/hosts; ip link set lo up; "
            f"ip link add br0 type bridge; ip addr add {_HEAD}/24 dev br0; ip link set br0 up; exec sleep infinity"
        )
        self._head = self._spawn("head", "unshare", "--net", "--uts", "--mount", "bash", "-ec", script)
        self._wait_until(lambda: Path(f"/proc/{self._head.pid}/comm").read_text().strip() == "sleep")
        munge = self._root / "munge"
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        self._spawn("munged", *self._on_head, "munged", "--foreground", *options)
        self._wait_until((munge / "munge.sock").exists)
        self._spawn("slurmctld", *self._on_head, "slurmctld", "-D", "-c")

    def _start_node(self, number: int, name: str) -> None:
        script = (
            f"hostname {name}; mount --bind {self._root}/etc/hosts /etc/hosts; mount -t tmpfs tmpfs /dev/shm; "
            "until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done; "
            f"ip link set lo up; ip addr add {_NETWORK}.{number + 1}/24 dev eth0; ip link set eth0 up; "
            f"cd /; slurmd -D -N {name} & wait"
        )
        namespaces = ("--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        node = self._spawn(name, "unshare", *namespaces, "bash", "-ec", script)
        own = Path("/proc/self/ns/net").readlink()
        self._wait_until(lambda: Path(f"/proc/{node.pid}/ns/net").readlink() != own)
        cable = f"port{number}"
        peer = ("type", "veth", "peer", "name", "eth0", "netns", str(node.pid))
        self.run("ip", "link", "add", cable, *peer)
        self.run("ip", "link", "set", cable, "master", "br0", "up")

    def _spawn(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self._root / "log" / f"{name}.out").open("wb") as log:
            process = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._processes.append(process)
        return process

    def _wait_until(self, ready: Callable[[], bool], timeout_seconds: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not ready():
            if time.monotonic() > deadline:
                raise AssertionError(f"the cluster did not come up\n{self.logs()}")
            time.sleep(0.05)
