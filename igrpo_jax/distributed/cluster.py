"""Several processes that run one program: how they meet, agree, exchange bytes, and end together.

    with cluster.joined(config.cluster, address):      # with one process nothing happens
        cluster.check_same({"config": settings})       # or an error that names process and field
        latest = cluster.from_first(newest)            # process 0 decides for all
        shares = cluster.gather(mine)                  # bytes of every process, on every process

They meet at process 0, by flags or by what Slurm, Open MPI or a TPU pod says of itself. While `joined` lasts, each
tells the others which phase it is in (`peers`), through the key-value store of jax.distributed, which process 0 keeps:

1. A process that fails says why. The others print its reason with its name, and end with 1.
2. A process that is not heard from for config.cluster.silence seconds, because it was killed or its machine is gone, is
   named with the phase it was in last, and the others end with peers.LOST. Without this they would wait for ever.
3. The end of process 0 is noticed at once: JAX itself then ends all others, and is delayed until they have said why.
4. A notice of preemption to one process is a notice to all (`preemption`).
5. No process leaves the block before all have come to its end and still live. After it they are parted.

An error that JAX raises may follow from the end of another process. The process that gets it waits until it is known
whether another one is missing.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

import igrpo_jax
from igrpo_jax.config import ClusterConfig
from igrpo_jax.distributed import abort, preemption
from igrpo_jax.distributed.peers import Peers, say
from igrpo_jax.errors import InputError

Value = TypeVar("Value")

_ROUND = 1 << 18  # bytes of each process that one collective of `gather` carries; its program has this one shape


# What they agree on.


def gather(data: bytes) -> list[bytes]:
    """Returns, on every process, the `data` of all processes, in order. All call it; sizes may differ."""
    if jax.process_count() == 1:
        return [data]
    # Each row begins with the index of its process and with the number of its bytes that count.
    framed = np.frombuffer(np.array([jax.process_index(), len(data)], np.int64).tobytes() + data, np.uint8)
    start = np.dtype(np.int64).itemsize * 2

    def round_at(at: int) -> np.ndarray:  # [processes, _ROUND] uint8
        part = framed[at : at + _ROUND]
        return multihost_utils.process_allgather(np.pad(part, (0, _ROUND - len(part))))

    parts = [round_at(0)]
    heads = [row[:start].copy().view(np.int64) for row in parts[0]]
    longest = start + max(int(size) for _, size in heads)
    parts += [round_at(at) for at in range(_ROUND, longest, _ROUND)]
    rows = np.concatenate(parts, axis=1)
    data_of = {
        int(process): row[start : start + int(size)].tobytes() for (process, size), row in zip(heads, rows, strict=True)
    }
    return [data_of[process] for process in range(len(data_of))]


def share(value: Any) -> list[Any]:
    """Returns, on every process, the `value` of all processes, in order. JSON must be able to hold it; all call it."""
    return [json.loads(part) for part in gather(json.dumps(value).encode())]


def from_first(decide: Callable[[], Value]) -> Value:
    """Runs `decide` only on process 0, and returns its result on every process; JSON must be able to hold it."""
    value = decide() if jax.process_index() == 0 else None
    return value if jax.process_count() == 1 else json.loads(gather(json.dumps(value).encode())[0])


def any_of(here: bool) -> bool:
    """Returns on every process whether `here` is True on any."""
    return any(gather(b"1" if here else b""))


def check_same(facts: Mapping[str, Any]) -> None:
    """Checks that all processes run the same code with the same facts (what JSON can hold, nested by name).

    Raises:
        InputError: on every process, with the first fact that differs between process 0 and another one.
    """
    if jax.process_count() == 1:
        return
    code = {"igrpo_jax": igrpo_jax.__version__, "source of igrpo_jax": _source(), "jax": jax.__version__}
    mine = {"host": socket.gethostname(), "facts": _flat(code | dict(facts))}
    first, *others = share(mine)
    for process, other in enumerate(others, 1):
        for name in first["facts"] | other["facts"]:
            ours, theirs = first["facts"].get(name), other["facts"].get(name)
            if ours != theirs:
                raise InputError(
                    f"{name}: process {process} ({other['host']}) has {theirs!r}, process 0 ({first['host']}) has "
                    f"{ours!r}; start every process with the same command, code and data"
                )


def _check_devices(owners: Sequence[int]) -> None:
    """Raises InputError, on every process, unless all have the same number of devices.

    Args:
        owners: the process of each device.
    """
    (first, expected), *others = sorted(Counter(owners).items())
    for process, count in others:
        if count != expected:
            raise InputError(
                f"process {process} sees {count} devices, process {first} sees {expected}; start every process with "
                "the same number, such as of GPUs in CUDA_VISIBLE_DEVICES"
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested facts under dotted names."""
    facts = {}
    for name, value in tree.items():
        facts |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return facts


def _source() -> str:
    """Returns a hash of the package's code as it is on disk."""
    root, digest = Path(igrpo_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# How they meet.


def _meet(settings: ClusterConfig, address: Mapping[str, Any]) -> bool:
    """Joins the other processes; returns False if there are none. Ends the process if not all of them come in time.

    Raises:
        InputError: the port of process 0 is in use.
        RunError: the version of JAX lacks what several processes need.
    """
    if not jax.distributed.is_initialized():
        given = _arguments(address)
        if given is None:
            return False
        abort.check_supported()
        _check_port(given)
        # JAX's own preemption service would take SIGTERM, and tells only those who ask it.
        jax.config.update("jax_enable_preemption_service", False)
        # After a time-out of its own, JAX aborts and does not say what to do.
        timer = threading.Timer(settings.start_timeout, _not_met, [settings.start_timeout, given])
        timer.daemon = True
        timer.start()
        try:
            jax.distributed.initialize(
                **given,
                initialization_timeout=math.ceil(2 * settings.start_timeout),
                heartbeat_timeout_seconds=math.ceil(3 * settings.silence),
            )
        finally:
            timer.cancel()
    return jax.process_count() > 1


def _check_port(given: Mapping[str, Any]) -> None:
    """Raises InputError if this is process 0 and the port at which it will listen is in use.

    JAX's own server shares a port with that of another run, and both fail later. Where it cannot have the port at all,
    some versions of JAX crash.
    """
    if given.get("process_id") != 0 or "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return
    port = int(given["coordinator_address"].rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise InputError(
            f"--coordinator {given['coordinator_address']}: process 0 cannot listen at port {port} "
            f"({os.strerror(error.errno or 0)}); give every process another port, or end what uses this one"
        ) from error


def _not_met(seconds: float, given: Mapping[str, Any]) -> NoReturn:
    who = f"process {given['process_id']} of {given['num_processes']}" if "process_id" in given else "this process"
    say(
        f"{who}: not all processes have reached {abort.coordinator_address()} within config.cluster.start_timeout = "
        f"{seconds:g} s; start all of them at about the same time, with an address of process 0 that every machine can "
        "reach"
    )
    os._exit(1)


def _arguments(address: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns arguments of jax.distributed.initialize, given or detected; None for a process that is alone.

    Raises:
        InputError: Open MPI runs several processes, but does not say where they can meet.
    """
    if address.get("num_processes") == 1 or not (address or _is_one_of_several()):
        return None
    devices = _gpus_of_the_process()
    return dict(address) | ({} if devices is None else {"local_device_ids": devices})


def _is_one_of_several() -> bool:
    """Returns whether Slurm, Open MPI or a TPU pod runs several processes, of which JAX can learn where they meet.

    Raises:
        InputError: Open MPI runs several, and JAX does not see it.
    """
    if abort.launcher() is not None:
        return True
    if (count := os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) != "1":
        raise InputError(
            f"--processes: mpirun has started {count} processes, which JAX {jax.__version__} does not see, as of "
            f"Open MPI 5 and later; give each --coordinator HOST:PORT --processes {count} --process "
            "$OMPI_COMM_WORLD_RANK"
        )
    return False


def _gpus_of_the_process() -> list[int] | None:
    """Returns the local GPUs of this process where JAX may choose wrongly, else None; [] is all that it is shown.

    JAX gives a process of a launcher that it sees the GPU of its local number. But a process that is alone on its
    machine takes all GPUs, and a process that is shown GPUs of its own takes these. JAX does not see Open MPI 5.
    """
    # First: inside a Slurm job, mpirun passes on Slurm's variables, and these describe its daemon.
    rank, is_task = os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK"), "SLURM_LOCALID" in os.environ
    if (rank is None and not is_task) or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if rank is not None:
        # Another number of GPUs than of processes is what a script before the command chose for this process alone.
        processes = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", len(visible)))
        return [int(rank)] if processes != 1 and len(visible) in (0, processes) else []
    if not re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        return [0] if len(visible) == 1 else None
    count = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return list(range(len(visible) or int(count))) if visible or count.isdecimal() else None


# How they end together.


@contextlib.contextmanager
def joined(settings: ClusterConfig, address: Mapping[str, Any]) -> Iterator[None]:
    """Runs the block as one of the processes that `address` names, or that were detected, with equally many devices.

    After an error the process has to end by os._exit, because JAX's exit handlers wait for the others.

    Args:
        address: coordinator_address, num_processes and process_id of jax.distributed.initialize; empty = detect them.
    """
    if not _meet(settings, address):
        yield
        return
    peers = Peers(settings.silence)
    try:
        try:
            _check_devices([device.process_index for device in jax.devices()])
            yield
        except preemption.Preempted:
            peers.wait_for_end()
            raise
        peers.wait_for_end()
    except preemption.Preempted:
        raise
    except BaseException as error:
        peers.fail(error)
        raise
    finally:
        peers.close()
