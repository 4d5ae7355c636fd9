"""How processes are found, and which errors may follow from another's end; `test_multiprocess` really starts some."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from igrpo_jax.cli import parsing
from igrpo_jax.config import ClusterConfig
from igrpo_jax.distributed import abort, cluster, peers
from igrpo_jax.errors import InputError, RunError

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def slurm(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_TASKS_PER_NODE", "SLURM_GPUS_ON_NODE", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)

    def job(**more):
        for name, value in (SLURM | more).items():
            monkeypatch.setenv(name, value)
        return cluster._arguments({})

    return job


def test_a_process_alone_meets_nobody(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)
    alone = {"coordinator_address": "localhost:1", "num_processes": 1, "process_id": 0}
    for address in ({}, alone):
        with cluster.joined(ClusterConfig(), address):
            assert cluster.gather(b"x") == [b"x"] and cluster.from_first(lambda: (1,)) == (1,)
            cluster.check_same({"x": 1})


def test_slurm_is_found_and_a_task_alone_on_its_node_takes_all_gpus(slurm):
    assert slurm(SLURM_NTASKS="1") is None
    assert slurm() == {}
    assert slurm(SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_GPUS_ON_NODE="8") == {"local_device_ids": list(range(8))}
    assert slurm(CUDA_VISIBLE_DEVICES="4,5") == {"local_device_ids": [0, 1]}
    assert slurm(SLURM_STEP_TASKS_PER_NODE="8(x2)") == {}  # each sees all GPUs, and JAX takes that of its number
    assert slurm(CUDA_VISIBLE_DEVICES="0", SLURM_LOCALID="3") == {"local_device_ids": [0]}


def test_the_gpus_of_a_process_are_the_same_where_its_address_is_given(slurm, monkeypatch):
    given = {"coordinator_address": "h:1", "num_processes": 2, "process_id": 0}

    def devices():
        return cluster._arguments(given).get("local_device_ids")

    assert devices() is None
    slurm(SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_GPUS_ON_NODE="8")
    assert devices() == list(range(8))
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")  # of mpirun inside the job
    assert devices() == [3]
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "2,3")  # JAX reads it itself
    assert devices() is None


@pytest.mark.parametrize(
    ("rank", "processes", "visible", "expected"),
    [
        (0, 1, "", []),  # [] = all that it is shown, however many
        (0, 1, "4,5,6,7", []),
        (3, 4, "", [3]),
        (3, 4, "4,5,6,7", [3]),
        (1, 2, "4,5,6,7", []),  # a script before the command chose them for this process
        (3, 4, "2,3", []),
        (3, 4, "5", []),
    ],
)
def test_processes_of_mpirun_take_one_gpu_each_unless_alone_or_shown_their_own(
    slurm, monkeypatch, rank, processes, visible, expected
):
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", str(rank))
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", str(processes))
    # Also inside a Slurm job, whose variables describe mpirun's daemon: JAX would take the first GPU from them.
    assert slurm(CUDA_VISIBLE_DEVICES=visible) == {"local_device_ids": expected}
    detect = abort.clusters.ClusterEnv.auto_detect_unset_distributed_params
    assert detect("h:1", 2, 0, expected, None, 1)[3] == expected


@pytest.mark.parametrize("host", ["localhost", ""])
def test_a_port_that_is_in_use_is_refused_before_jax_crashes_at_it(monkeypatch, host):
    monkeypatch.setattr(jax.distributed, "initialize", None)
    with socket.create_server((host, 0)) as server:
        port = server.getsockname()[1]
        address = {"coordinator_address": f"node1:{port}", "num_processes": 2, "process_id": 0}
        with pytest.raises(InputError, match=rf"--coordinator node1:{port}: .* {port} \(Address already in use\);"):
            cluster._meet(ClusterConfig(), address)
        cluster._check_port(address | {"process_id": 1})  # it listens at no port
    cluster._check_port(address)


@pytest.mark.parametrize("more", [(-17, 0), (-16, -20), (-15, -30), (0, 1), (1, 3 << 18)])
def test_bytes_of_any_size_are_gathered_in_the_order_of_processes(monkeypatch, more):
    """By threads in place of processes, whose rows JAX returns in another order; at the edges of what a round holds."""
    own, meeting, rows = threading.local(), threading.Barrier(2), {}
    sizes = [cluster._ROUND + size for size in more]

    def allgather(row):
        rows[own.process] = row
        meeting.wait(10)
        both = np.stack([rows[1], rows[0]])
        meeting.wait(10)
        return both

    def gather(process):
        own.process = process
        return cluster.gather(bytes([65 + process]) * sizes[process])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: getattr(own, "process", 0))
    monkeypatch.setattr(cluster.multihost_utils, "process_allgather", allgather)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(gather, range(2))) == [[b"A" * sizes[0], b"B" * sizes[1]]] * 2


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"config.steps": 3}, None),
        ({"config.steps": 4}, "config.steps: process 2 (far) has 4, process 0 ("),
        ({"config.steps": 3, "data": "x"}, "data: process 2 (far) has 'x', process 0 ("),  # a fact that 0 does not have
    ],
)
def test_a_fact_that_differs_is_named(monkeypatch, theirs, said):
    def share(mine):
        return [mine, mine, {"host": "far", "facts": {**mine["facts"], **theirs}}]

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(cluster, "share", share)
    if said is None:
        cluster.check_same({"config": {"steps": 3}})
        return
    with pytest.raises(InputError) as caught:
        cluster.check_same({"config": {"steps": 3}})
    assert str(caught.value).startswith(said)


def test_processes_need_equally_many_devices():
    cluster._check_devices([0, 0, 1, 1, 2, 2])
    with pytest.raises(InputError, match="process 2 sees 1 devices, process 0 sees 2; start every process with"):
        cluster._check_devices([0, 0, 1, 1, 2])


def test_processes_of_mpirun_that_jax_does_not_see_do_not_run_alone(monkeypatch):
    assert cluster._arguments({}) is None
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"mpirun has started 2 processes, .* --processes 2 --process"):
        cluster._arguments({})


def test_a_metadata_server_that_does_not_answer_is_no_pod(monkeypatch, caplog):
    def fails():
        raise OSError("no route")

    monkeypatch.setattr(abort.clusters.GceTpuCluster, "is_env_present", fails)
    assert cluster._arguments({}) is None
    assert "cannot find out whether this machine is part of a pod: no route" in caplog.text


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--coordinator h:1 --process 0", "--processes: missing"),
        ("--process=0", "--coordinator: missing"),
        ("--coordinator h --processes 2 --process 0", "--coordinator h: must be HOST:PORT"),
        ("--coordinator h:65536 --processes 2 --process 0", "--coordinator h:65536: must be HOST:PORT"),
        ("--coordinator h:0 --processes 2 --process 0", "--coordinator h:0: must be HOST:PORT"),
        ("--coordinator h:1 --processes 2 --process 2", "--process 2: must be below --processes = 2"),
        ("--coordinator h:1 --processes two --process 0", "--processes two: must be a whole number"),
    ],
)
def test_flags_that_make_no_sense(flags, expected):
    with pytest.raises(InputError, match=expected):
        parsing.cluster_arguments(["main", *flags.split()])


def test_flags_are_jaxs_arguments():
    flags = ["--coordinator", "h:1", "--processes=2", "--process", "1"]
    assert parsing.cluster_arguments(["main", *flags]) == {
        "coordinator_address": "h:1",
        "num_processes": 2,
        "process_id": 1,
    }
    assert parsing.cluster_arguments(["main", "--config", "x"]) == {}
    parsing.parse(["main", "--config", "configs/tiny_cpu.py", *flags])
    parsing.parse_model(["main", "--model", "x", *flags], "", {})


def wrapped(cause):
    try:
        try:
            raise cause
        except Exception as error:
            raise RunError("step 3 could not be written") from error
    except RunError as error:
        return error


def test_which_errors_may_follow_from_anothers_end():
    """One that does not is told at once; one that does would blame the wrong process."""
    gloo = "UNKNOWN: Gloo AllGather failed: Connection closed by peer"
    for error in (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), ValueError(gloo)):
        assert peers.may_follow(error) and peers.may_follow(wrapped(error))
    full, memory = (
        OSError(28, "No space left on device"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    )
    for error in (InputError("--model: missing"), full, wrapped(full), memory, wrapped(memory), ValueError("x: y")):
        assert not peers.may_follow(error)


@pytest.mark.parametrize(
    ("passes", "is_named"),
    [([1.0] * 9, False), ([1.0] * 11, True), ([1.0, 600.0, 1.0], False)],  # in the last case it was stopped itself
)
def test_who_is_silent_for_too_long_is_named_unless_nobody_listened(monkeypatch, passes, is_named):
    """By seconds that pass between two looks of process 0."""
    clock, passes, named = [1000.0], list(passes), []

    def wait(seconds):
        if passes:
            clock[0] += passes.pop(0)
            return False
        return True

    own = SimpleNamespace(_silence=10.0, _process=0, _clock=0.0, _done=SimpleNamespace(wait=wait), _was_in=str)
    own._heard = {process: (f"process {process}", "", 0.0) for process in range(2)}
    own._publish = lambda process, text, code: named.append((process, text, code))
    monkeypatch.setattr(peers, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    peers.Peers._look(own)
    assert named == [(1, "process 1 has not been heard from for 11 s; 1", peers.LOST)] * is_named


def test_a_port_at_which_nothing_listens_any_more():
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        assert not peers._is_refused(address)
    assert peers._is_refused(address)
    assert not any(peers._is_refused(unknown) for unknown in (None, "", "localhost", "localhost:no", "no.invalid:1"))
