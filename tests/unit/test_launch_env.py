"""Every launcher's environment, as the launchers really set it: who this process is, or what to change."""

from __future__ import annotations

import sys
import types

import pytest

from clif.distributed import mpi
from clif.distributed.launch_env import SLURM_PORTS, LaunchError, RankEnv, discover
from clif.distributed.slurm import SlurmError, first_host, tasks_per_node
from clif.errors import ConfigError


def variables(text: str) -> dict[str, str]:
    return dict(line.strip().split("=", 1) for line in text.strip().splitlines())


# torchrun --nnodes 2 --nproc-per-node 2, second rank of the second host.
TORCHRUN = variables("""
    LOCAL_RANK=1
    RANK=3
    GROUP_RANK=1
    ROLE_RANK=3
    ROLE_NAME=default
    LOCAL_WORLD_SIZE=2
    WORLD_SIZE=4
    GROUP_WORLD_SIZE=2
    ROLE_WORLD_SIZE=4
    MASTER_ADDR=node01
    MASTER_PORT=44119
    TORCHELASTIC_RESTART_COUNT=0
    TORCHELASTIC_MAX_RESTARTS=0
    TORCHELASTIC_RUN_ID=clif
    TORCHELASTIC_USE_AGENT_STORE=True
    OMP_NUM_THREADS=1
""")
# deepspeed --hostfile with two hosts of one slot each, second host.
DEEPSPEED = variables("""
    RANK=1
    LOCAL_RANK=0
    WORLD_SIZE=2
    LOCAL_SIZE=1
    CROSS_RANK=1
    CROSS_SIZE=2
    MASTER_ADDR=10.0.0.1
    MASTER_PORT=29500
    CUDA_VISIBLE_DEVICES=0
""")
# sbatch --nodes=2 --ntasks=3: what Slurm 22.05 gives to the batch script itself.
BATCH = variables("""
    SLURMD_NODENAME=node01
    SLURM_CLUSTER_NAME=main
    SLURM_CPUS_ON_NODE=2
    SLURM_GTIDS=0
    SLURM_JOBID=4711
    SLURM_JOB_CPUS_PER_NODE=2,1
    SLURM_JOB_GID=0
    SLURM_JOB_ID=4711
    SLURM_JOB_NAME=clif
    SLURM_JOB_NODELIST=node[01-02]
    SLURM_JOB_NUM_NODES=2
    SLURM_JOB_PARTITION=main
    SLURM_JOB_UID=0
    SLURM_LOCALID=0
    SLURM_NNODES=2
    SLURM_NODEID=0
    SLURM_NODELIST=node[01-02]
    SLURM_NPROCS=3
    SLURM_NTASKS=3
    SLURM_PRIO_PROCESS=0
    SLURM_PROCID=0
    SLURM_SUBMIT_HOST=login
    SLURM_TASKS_PER_NODE=2,1
    SLURM_TASK_PID=23040
    SLURM_TOPOLOGY_ADDR=node01
    SLURM_TOPOLOGY_ADDR_PATTERN=node
""")
# The third of three tasks that srun starts in that job.
SRUN = BATCH | variables("""
    SLURMD_NODENAME=node02
    SLURM_CPUS_ON_NODE=1
    SLURM_DISTRIBUTION=block
    SLURM_GTIDS=2
    SLURM_LAUNCH_NODE_IPADDR=10.0.0.1
    SLURM_LOCALID=0
    SLURM_NODEID=1
    SLURM_PROCID=2
    SLURM_SRUN_COMM_HOST=10.0.0.1
    SLURM_SRUN_COMM_PORT=35027
    SLURM_STEPID=0
    SLURM_STEP_ID=0
    SLURM_STEP_LAUNCHER_PORT=35027
    SLURM_STEP_NODELIST=node[01-02]
    SLURM_STEP_NUM_NODES=2
    SLURM_STEP_NUM_TASKS=3
    SLURM_STEP_TASKS_PER_NODE=2,1
    SLURM_TASK_PID=23068
    SLURM_TOPOLOGY_ADDR=node02
    SLURM_UMASK=0022
""")
# mpirun -n 3 in that job: Open MPI 4.1 starts a daemon on each host by srun, and the ranks inherit its variables.
MPIRUN = variables("""
    OMPI_COMMAND=python
    OMPI_COMM_WORLD_LOCAL_RANK=1
    OMPI_COMM_WORLD_LOCAL_SIZE=2
    OMPI_COMM_WORLD_NODE_RANK=1
    OMPI_COMM_WORLD_RANK=1
    OMPI_COMM_WORLD_SIZE=3
    PMIX_HOSTNAME=node01
    PMIX_NAMESPACE=913833985
    PMIX_RANK=1
    PMIX_VERSION=4.2.2
""")
DAEMON = SRUN | variables("""
    SLURM_LOCALID=0
    SLURM_NODEID=0
    SLURM_NPROCS=2
    SLURM_NTASKS=2
    SLURM_NTASKS_PER_NODE=1
    SLURM_PROCID=0
    SLURM_STEP_NUM_TASKS=2
    SLURM_STEP_TASKS_PER_NODE=1(x2)
""")
HYDRA = variables("""
    PMI_RANK=3
    PMI_SIZE=4
    PMI_FD=9
    MPI_LOCALNRANKS=2
    MPI_LOCALRANKID=1
""")
MASTER = {"MASTER_ADDR": "node01", "MASTER_PORT": "29400"}


def never() -> RankEnv:
    raise AssertionError("MPI must not be asked")


def numbers(env: RankEnv) -> tuple[int, int, int, int]:
    return env.rank, env.world_size, env.local_rank, env.local_world_size


@pytest.mark.parametrize(
    ("environ", "expected", "master", "launcher"),
    [
        (TORCHRUN, (3, 4, 1, 2), ("node01", 44119), "torchrun"),
        (DEEPSPEED, (1, 2, 0, 1), ("10.0.0.1", 29500), "torch's environment"),
        (SRUN, (2, 3, 0, 1), ("node01", 15000 + 4711), "Slurm step 4711.0"),
        (SRUN | MASTER, (2, 3, 0, 1), ("node01", 29400), "Slurm step 4711.0"),
        (MPIRUN | MASTER, (1, 3, 1, 2), ("node01", 29400), "mpirun (Open MPI)"),
        (MPIRUN | {"MASTER_ADDR": "node01"}, (1, 3, 1, 2), ("node01", 29500), "mpirun (Open MPI)"),
        (HYDRA | MASTER, (3, 4, 1, 2), ("node01", 29400), "mpirun (MPICH, Intel MPI)"),
        ({"PATH": "/bin", "MASTER_ADDR": "node01"}, (0, 1, 0, 1), None, "single process"),
    ],
    ids=["torchrun", "deepspeed", "srun", "srun_master", "mpirun", "mpirun_port", "hydra", "none"],
)
def test_every_launcher_is_understood(environ, expected, master, launcher):
    env = discover(environ, ask_mpi=never)
    assert numbers(env) == expected
    assert (env.master, env.launcher) == (master, launcher)


@pytest.mark.parametrize("outer", [SRUN, MPIRUN, SRUN | MPIRUN], ids=["srun", "mpirun", "both"])
def test_torchrun_wins_over_whoever_started_it(outer):
    assert numbers(discover(outer | TORCHRUN, ask_mpi=never)) == (3, 4, 1, 2)


def test_mpirun_wins_over_the_slurm_step_of_its_daemons():
    assert numbers(discover(DAEMON | MPIRUN | MASTER, ask_mpi=never)) == (1, 3, 1, 2)


def test_srun_wins_over_the_pmi_that_slurm_offers():
    pmi = {"PMI_RANK": "2", "PMI_SIZE": "3", "PMI_JOBID": "4711.0", "PMI_FD": "11"}
    assert discover(SRUN | pmi, ask_mpi=never).launcher == "Slurm step 4711.0"


def test_a_process_in_a_batch_script_waits_for_nobody():
    """Slurm gives the script a SLURM_PROCID and all of its job's tasks: only a step has ranks."""
    assert discover(BATCH, ask_mpi=never) == RankEnv(0, 1, 0, 1)


def test_an_interactive_step_is_one_process_whatever_its_job_asked_for():
    step = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    env = discover(BATCH | step, ask_mpi=never)
    assert numbers(env) == (0, 1, 0, 1) and env.master is None


def test_all_ranks_of_a_step_meet_at_the_same_place_and_steps_at_different_ones():
    first = SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    other = SRUN | {"SLURM_STEP_ID": "1"}
    assert discover(first).master == discover(SRUN).master != discover(other).master
    assert discover(SRUN | {"SLURM_JOB_ID": "123456789"}).master[1] in SLURM_PORTS


def test_older_slurm_says_only_what_its_job_has():
    old = {k: v for k, v in SRUN.items() if not k.startswith("SLURM_STEP_")}
    assert numbers(discover(old, ask_mpi=never)) == (2, 3, 0, 1)
    counted = {k: v for k, v in old.items() if k != "SLURM_TASKS_PER_NODE"} | {"SLURM_NTASKS_PER_NODE": "2"}
    assert discover(counted, ask_mpi=never).local_world_size == 2


def test_ranks_of_one_host_are_told_from_ranks_of_several():
    assert not discover(DEEPSPEED).one_host, "loopback would be unreachable for the other host"
    assert discover(DEEPSPEED | {"LOCAL_SIZE": "2"}).one_host


@pytest.mark.parametrize("written", ["fd00::1", "[fd00::1]"])
def test_a_master_may_be_an_ipv6_number(written):
    env = discover(TORCHRUN | {"MASTER_ADDR": written})
    assert env.master == ("fd00::1", 44119)
    assert "rank 0 at [fd00::1]:44119" in str(env)


def test_a_master_on_one_cable_is_refused():
    with pytest.raises(ConfigError, match="MASTER_ADDR=fe80::1%eth0"):
        discover(TORCHRUN | {"MASTER_ADDR": "fe80::1%eth0"})


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK, WORLD_SIZE set without LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE set without RANK"),
        ({**TORCHRUN, "RANK": "4"}, "the rank 4 is not among 4"),
        ({**TORCHRUN, "RANK": "three"}, "RANK='three' is not a whole number"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "5"}, "ranks on this host"),
        ({k: v for k, v in DEEPSPEED.items() if k != "LOCAL_SIZE"}, "set it to the ranks of this host"),
        ({**SRUN, "WORLD_SIZE": "8"}, "WORLD_SIZE=8, but by Slurm step 4711.0 it is 3: unset WORLD_SIZE"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, "says 2(x2) tasks per node"),
        ({**SRUN, "SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID='batch' is not a whole number"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "two"}, "is not like 2(x3),1"),
        ({**MPIRUN, **MASTER, "MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({k: v for k, v in SRUN.items() if not k.endswith("NODELIST")}, "pass MASTER_ADDR"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, "the environment lacks SLURM_LOCALID"),
    ],
)
def test_what_is_torn_or_contradicts_itself_is_refused_with_what_to_change(environ, sentence):
    with pytest.raises((LaunchError, SlurmError)) as error:
        discover(environ)
    assert sentence in str(error.value)


def test_a_part_of_torchs_environment_that_agrees_is_left_to_the_launcher():
    """Job scripts often export the world size and the master, and leave the rank to srun."""
    env = discover(SRUN | MASTER | {"WORLD_SIZE": "3"})
    assert numbers(env) == (2, 3, 0, 1) and env.master == ("node01", 29400)


def test_the_argument_local_rank_stands_for_the_variable_and_must_not_contradict_it():
    without = {k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"}
    assert discover(without, local_rank=1).local_rank == 1
    for environ in (TORCHRUN, {}):
        with pytest.raises(LaunchError, match="--local_rank is 7"):
            discover(environ, local_rank=7)


def test_mpi_is_asked_only_for_what_mpirun_left_out():
    answer = RankEnv(1, 3, 1, 2, ("10.0.0.1", 4000), "mpi4py")
    env = discover(MPIRUN, ask_mpi=lambda: answer)
    assert (env.master, env.launcher) == (answer.master, "mpirun (Open MPI)")
    assert discover({"PMIX_RANK": "1"}, ask_mpi=lambda: answer) == answer
    alone = {**MPIRUN, **dict.fromkeys(("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"), "0")}
    alone |= dict.fromkeys(("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"), "1")
    assert numbers(discover(alone, ask_mpi=never)) == (0, 1, 0, 1)


def test_an_mpi4py_of_another_mpi_is_found_out():
    """Under a foreign mpirun each process is rank 0 of a world of its own: all would serve alone."""
    with pytest.raises(LaunchError, match="rank 1 of 3, mpi4py rank 0 of 1: install mpi4py for the MPI"):
        discover(MPIRUN, ask_mpi=lambda: RankEnv(0, 1, 0, 1, ("127.0.0.1", 4000), "mpi4py"))


def test_no_mpi_where_one_is_needed_says_what_to_pass(monkeypatch):
    """mpi4py's import raises RuntimeError where it is installed without an MPI."""

    class Broken(types.ModuleType):
        rc = types.SimpleNamespace()

        def __getattr__(self, name: str) -> None:
            raise RuntimeError("cannot load MPI library\nlibmpi.so: no such file")

    monkeypatch.setitem(sys.modules, "mpi4py", Broken("mpi4py"))
    with pytest.raises(LaunchError, match=r"pass MASTER_ADDR and MASTER_PORT .*cannot load MPI library\)$"):
        discover(MPIRUN, ask_mpi=mpi.ask_mpi)


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node01", "node01"),
        ("node[01-03,7]", "node01"),
        ("node[7,01-03]", "node7"),
        ("gpu-a[1-2],login", "gpu-a1"),
        ("alone,node[01-02]", "alone"),
        ("rack[2-3]n[01-03,7]", "rack2n01"),
        ("n[08-11].cluster.org,x", "n08.cluster.org"),
    ],
)
def test_the_first_host_of_a_node_list_is_found(nodelist, first):
    assert first_host(nodelist) == first


@pytest.mark.parametrize("nodelist", ["", "node[", "node[]", "node[01-02", ",node1"])
def test_a_torn_node_list_is_refused(nodelist):
    with pytest.raises(SlurmError, match="pass MASTER_ADDR"):
        first_host(nodelist)


def test_tasks_per_node_are_counted_out():
    assert tasks_per_node("2(x3),1") == (2, 2, 2, 1)
    assert tasks_per_node("4") == (4,)
