"""How many CPU threads a rank takes, from injected cores, quotas and environments."""

from __future__ import annotations

from pathlib import Path

import pytest

from clif.distributed.launch_env import ALONE, TORCHRUN, RankEnv
from clif.rank.threads import Machine, choose_threads, read_machine, read_quota

MPI = "mpirun (Open MPI)"
SIXTEEN = Machine(host=16, usable=16)


def ranks(local: int, launcher: str = TORCHRUN) -> RankEnv:
    return RankEnv(0, local, 0, local, launcher=launcher)


@pytest.mark.parametrize(
    ("local", "launcher", "machine", "threads", "why"),
    [
        (1, ALONE, SIXTEEN, 16, "16 cores"),
        (1, TORCHRUN, SIXTEEN, 16, "16 cores"),
        (2, TORCHRUN, SIXTEEN, 8, "16 cores for the 2 ranks of this host"),
        (3, TORCHRUN, SIXTEEN, 5, "16 cores for the 3 ranks of this host"),
        (32, TORCHRUN, SIXTEEN, 1, "16 cores for the 32 ranks of this host"),
        # A container's or taskset's CPUs are shared by all ranks that torchrun starts in it.
        (2, TORCHRUN, Machine(16, 4), 2, "4 cores for the 2 ranks of this host"),
        # mpirun binds each rank to cores of its own, or to none.
        (2, MPI, Machine(16, 4), 4, f"4 cores, to which {MPI} has bound it"),
        (2, MPI, SIXTEEN, 8, "16 cores for the 2 ranks of this host"),
        (4, "Slurm step 7.0", Machine(16, 4), 4, "16 cores for the 4 ranks of this host"),
        (1, ALONE, Machine(16, 16, quota=2.5), 2, "a quota of 2.5 CPUs"),
        (2, TORCHRUN, Machine(16, 16, quota=4.0), 2, "a quota of 4 CPUs for the 2 ranks of this host"),
        (2, MPI, Machine(16, 8, quota=0.5), 1, "a quota of 0.5 CPUs for the 2 ranks of this host"),
        (2, TORCHRUN, Machine(16, 2, quota=64.0), 1, "2 cores for the 2 ranks of this host"),
    ],
)
def test_ranks_share_the_cores_that_they_may_use(local, launcher, machine, threads, why):
    assert choose_threads(None, {}, ranks(local, launcher), machine) == (threads, why)


@pytest.mark.parametrize(
    ("local", "launcher", "value", "threads"),
    [
        (1, ALONE, "1", 1),
        (1, TORCHRUN, "1", 1),
        (1, ALONE, "3", 3),
        (2, TORCHRUN, "3", 3),
        (2, MPI, "3", 3),
        (1, ALONE, "6,2", 6),
        # torchrun's own, or that of a script in launch/.
        (2, TORCHRUN, "1", 8),
        (1, MPI, "1", 16),
        (1, ALONE, "", 16),
        (1, ALONE, "many", 16),
        (1, ALONE, "0", 16),
    ],
)
def test_a_number_that_the_user_set_counts_and_one_of_torchrun_does_not(local, launcher, value, threads):
    assert choose_threads(None, {"OMP_NUM_THREADS": value}, ranks(local, launcher), SIXTEEN)[0] == threads


def test_the_configuration_goes_first():
    assert choose_threads(5, {"OMP_NUM_THREADS": "3"}, ranks(2), SIXTEEN) == (5, "dist.threads_per_rank")


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ({"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/cpu.max": "max 100000"}, None),
        (
            {
                "/proc/self/cgroup": "0::/a/b",
                "/sys/fs/cgroup/a/cpu.max": "200000 100000",
                "/sys/fs/cgroup/a/b/cpu.max": "max 100000",
            },
            2.0,
        ),
        (
            {
                "/proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/pod\n0::/",
                "/sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "300000",
                "/sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
        (
            {
                "/proc/self/cgroup": "3:cpu:/",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        # A container that sees its own group as the root.
        ({"/proc/self/cgroup": "0::/docker/1", "/sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
    ],
)
def test_a_quota_is_the_least_of_a_control_group_and_those_around_it(files, quota):
    assert read_quota(lambda path: files.get(str(path))) == quota


def test_hyperthreads_of_a_core_count_once(monkeypatch):
    from clif.rank import threads

    def siblings(path: Path) -> str | None:
        cpu = int(path.parts[-3].removeprefix("cpu"))
        return f"{cpu % 4},{cpu % 4 + 4}" if cpu < 8 else None

    assert threads._cores(range(8), siblings) == 4
    assert threads._cores({0, 4, 1}, siblings) == 2
    assert threads._cores({8, 9}, siblings) == 2, "a CPU that says nothing is a core"
    machine = read_machine()
    assert 1 <= machine.usable <= machine.host
