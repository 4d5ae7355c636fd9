"""Several processes that run one program: how they meet, agree, exchange bytes, and end together.

    with cluster.joined(config.cluster, address):      # with one process nothing happens
        cluster.check_same({"config": settings})       # or an error that names process and field
        latest = cluster.from_first(newest)            # process 0 decides for all
        shares = cluster.gather(mine)                  # bytes of every process, on every process

They meet at process 0, by flags or by what Slurm, Open MPI or a TPU pod says of itself. While `joined` lasts each tells
the others in which phase it is, through the key-value store of jax.distributed, which process 0 keeps:

1. A process that fails says why. The others print that with its name, and end.
2. One that is not heard of for config.cluster.silence seconds, since it was killed or its machine is gone, is named
   with the phase it was in last, and the others end. Without this they would wait for it for ever.
3. The end of process 0 is noticed at once: JAX itself ends all others then, and is held up until they have said why.
4. A notice of preemption on one is one on all (`preemption`).
5. None leaves the block before all have come to its end.

What JAX raises may follow from another process's end: such an error waits until it is known whether one is missing.
"""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from absl import logging
from jax._src import clusters, distributed  # there is no public way to ask what would be detected, nor to the client
from jax.experimental import multihost_utils

import igrpo_jax
from igrpo_jax.config import ClusterConfig
from igrpo_jax.distributed import preemption, watchdog
from igrpo_jax.errors import InputError, one_line

Value = TypeVar("Value")

_ROUND = 1 << 18  # bytes of each process that one collective of `gather` carries; its program has this one shape
_ALIVE, _TOLD, _OVER = "igrpo_jax/alive/", "igrpo_jax/told/", "igrpo_jax/over"  # keys; the first two by process
_LOOK = 1.0  # seconds between two looks at the others
_NOTICE = 10.0  # seconds in which the others have taken notice of the end, or never will
_FOREVER = 1 << 30  # ms


# What they agree on.


def gather(data: bytes) -> list[bytes]:
    """`data` of every process in their order, on every process. All call it; sizes may differ."""
    if jax.process_count() == 1:
        return [data]
    # Of which process a row is, and how long, is in the row itself.
    framed = np.frombuffer(np.array([jax.process_index(), len(data)], np.int64).tobytes() + data, np.uint8)
    start = np.dtype(np.int64).itemsize * 2

    def carried(at: int) -> np.ndarray:  # [processes, _ROUND] uint8
        part = framed[at : at + _ROUND]
        return multihost_utils.process_allgather(np.pad(part, (0, _ROUND - len(part))))

    parts = [carried(0)]
    heads = [row[:start].copy().view(np.int64) for row in parts[0]]
    longest = start + max(int(size) for _, size in heads)
    parts += [carried(at) for at in range(_ROUND, longest, _ROUND)]
    rows = np.concatenate(parts, axis=1)
    found = {int(own): row[start : start + int(size)].tobytes() for (own, size), row in zip(heads, rows, strict=True)}
    return [found[process] for process in range(len(found))]


def from_first(decide: Callable[[], Value]) -> Value:
    """What `decide`, run on process 0 alone, gives, on every process; something that JSON can hold."""
    value = decide() if jax.process_index() == 0 else None
    return value if jax.process_count() == 1 else json.loads(gather(json.dumps(value).encode())[0])


def any_of(here: bool) -> bool:
    """Whether `here` is True on any process."""
    return any(gather(b"1" if here else b""))


def check_same(facts: Mapping[str, Any]) -> None:
    """Checks that all processes run the same code with the same facts (what JSON can hold, nested by name).

    Raises:
        InputError: on every process, with the first fact that one of them has otherwise than process 0.
    """
    if jax.process_count() == 1:
        return
    code = {"igrpo_jax": igrpo_jax.__version__, "source of igrpo_jax": _source(), "jax": jax.__version__}
    mine = {"host": socket.gethostname(), "facts": _flat(code | dict(facts))}
    first, *others = [json.loads(record) for record in gather(json.dumps(mine).encode())]
    for process, other in enumerate(others, 1):
        for name in first["facts"] | other["facts"]:
            ours, theirs = (one["facts"].get(name) for one in (first, other))
            if ours != theirs:
                raise InputError(
                    f"{name}: process {process} ({other['host']}) has {theirs!r}, process 0 ({first['host']}) has "
                    f"{ours!r}; start every process with the same command, code and data"
                )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested facts under dotted names."""
    found = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _source() -> str:
    """A hash of the package's code as it is on disk."""
    root, digest = Path(igrpo_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# How they meet.


def _meet(settings: ClusterConfig, address: Mapping[str, Any]) -> bool:
    """Joins the other processes; False where there are none. Ends the process where they don't all come."""
    if not jax.distributed.is_initialized():
        given = dict(address) if address else _detected()
        if given is None or given.get("num_processes") == 1:
            return False
        # JAX's own notice of preemption takes SIGTERM and tells nobody but those who ask it.
        jax.config.update("jax_enable_preemption_service", False)
        # After its own time-out JAX aborts without a word on what to do.
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


def _not_met(seconds: float, given: Mapping[str, Any]) -> NoReturn:
    who = f"process {given['process_id']} of {given['num_processes']}" if "process_id" in given else "this process"
    where = distributed.global_state.coordinator_address
    _say(
        f"{who}: not all processes have come to {where} within config.cluster.start_timeout = {seconds:g} s; start all "
        "of them at about the same time, with an address of process 0 that every machine can reach"
    )
    os._exit(1)


def _detected() -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize where Slurm, Open MPI or a TPU pod runs several processes, else None."""
    kinds = (clusters.OmpiCluster, clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster)
    try:
        here = next((kind for kind in kinds if kind.is_env_present()), None)
        if here is None or here.get_process_count() == 1:
            return None
    except Exception as error:  # of the metadata server of a TPU machine: requests' errors, and others
        logging.warning("runs alone: it could not be asked whether this machine is part of a pod: %s", error)
        return None
    devices = _whole_node() if here is clusters.SlurmCluster else None
    return {"local_device_ids": devices} if devices else {}


def _whole_node() -> list[int] | None:
    """All GPUs of the node where Slurm runs one task on it; JAX would give that task one GPU."""
    if not re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        return None
    visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("SLURM_GPUS_ON_NODE", "")
    if visible:
        return list(range(len(visible.split(","))))
    return list(range(int(count))) if count.isdecimal() else None


# How they end together.


@contextlib.contextmanager
def joined(settings: ClusterConfig, address: Mapping[str, Any]) -> Iterator[None]:
    """Runs the block as one of the processes that `address` names, or that were detected.

    After an error the process has to end by os._exit, since JAX's exit handlers wait for the others.

    Args:
        address: coordinator_address, num_processes and process_id of jax.distributed.initialize; empty = detect them.
    """
    if not _meet(settings, address):
        yield
        return
    watch = _Watch(settings.silence)
    try:
        yield
        watch.wait_for_end()
    except preemption.Preempted:
        watch.wait_for_end()
        raise
    except BaseException as error:
        watch.fail(error)
        raise
    finally:
        watch.close()


class _Watch:
    """Tells the others that this process lives, and ends it when another one has failed or is missing."""

    def __init__(self, silence: float):
        self._silence, self._client = silence, distributed.global_state.client
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._clock = 0.0  # seconds that `_look` has seen pass; while this process stands still it hears nobody
        self._heard = {i: (f"process {i}", "", 0.0) for i in range(self._processes)}  # name, phase, when last
        self._numbers = dict.fromkeys(self._heard, -1)  # of the last signs of life
        self._done, self._failing, self._over = (threading.Event() for _ in range(3))
        self._ending = threading.Lock()
        self._before = _on_abort(_SLEEP)
        what = (self._beat, self._look, self._listen)
        self._threads = [threading.Thread(target=f, name=f.__name__, daemon=True) for f in what]
        for thread in self._threads:
            thread.start()

    def wait_for_end(self) -> None:
        """Returns when all processes have come here, and none takes the end of another for a failure any more."""
        self._client.wait_at_barrier("igrpo_jax/end", _FOREVER)
        self._done.set()
        self._client.wait_at_barrier("igrpo_jax/done", _FOREVER)

    def close(self) -> None:
        self._done.set()
        if self._process == 0:
            self._publish(0, "")  # unless there is something to say already: nobody listens any more
        for thread in self._threads:
            thread.join(2 * _LOOK)  # of a process 0 that is gone nothing comes back
        _on_abort(self._before)

    def fail(self, error: BaseException) -> None:
        """Tells the others why this process ends. Does not return where another process is the reason."""
        said = f"{type(error).__name__}: {one_line(error)[:500]}".removesuffix(": ")
        if _may_follow(error):
            _say(f"{said}; looking whether another process has ended")
            if self._over.wait(1.5 * self._silence):
                self._threads[-1].join()  # which ends this process
        self._failing.set()
        where = watchdog.current() and f" in {watchdog.current()}"
        self._publish(self._process, f"process {self._process} ({socket.gethostname()}) failed{where}: {said}")
        self._notice(culprit=self._process)

    def _publish(self, culprit: int, text: str) -> None:
        """Tells all how it ended, and through which process."""
        with contextlib.suppress(RuntimeError):  # another was first, or process 0 is gone
            self._client.key_value_set(_OVER, json.dumps({"culprit": culprit, "text": text}))

    def _notice(self, culprit: int) -> None:
        """Says that this process knows; process 0, which keeps what all read, waits until the others have ended."""
        with contextlib.suppress(RuntimeError):
            if self._process:
                self._client.key_value_set(f"{_TOLD}{self._process}", "", allow_overwrite=True)
                return
            others, deadline = self._processes - 1 - (culprit != 0), time.monotonic() + _NOTICE
            while len(self._client.key_value_dir_get(_TOLD)) < others and time.monotonic() < deadline:
                time.sleep(_LOOK / 10)
            time.sleep(3 * _LOOK)

    def _beat(self) -> None:
        """Writes that this process lives, and reads what the others wrote."""
        number = 0
        while not self._done.is_set():
            mine = {"host": socket.gethostname(), "phase": watchdog.current(), "preempted": preemption.noted()}
            mine["number"] = number = number + 1
            with contextlib.suppress(RuntimeError):
                self._client.key_value_set(f"{_ALIVE}{self._process}", json.dumps(mine), allow_overwrite=True)
                for key, text in self._client.key_value_dir_get(_ALIVE):
                    process, record = int(key.rpartition("/")[2]), json.loads(text)
                    if record["number"] != self._numbers[process]:
                        self._numbers[process] = record["number"]
                        name = f"process {process} ({record['host']})"
                        self._heard[process] = (name, record["phase"], self._clock)
                        if record["preempted"]:
                            preemption.notice(f"SIGTERM of {name}")
            self._done.wait(_LOOK)

    def _look(self) -> None:
        """Ends this process, or all, when another has been silent for too long."""
        last = time.monotonic()
        while not self._done.wait(_LOOK):
            now = time.monotonic()
            self._clock, last = self._clock + min(now - last, 2 * _LOOK), now
            for process, (name, _, heard) in self._heard.items():
                silent = self._clock - heard
                if process != self._process and silent > self._silence:
                    text = f"{name} has not been heard of for {silent:.0f} s; {self._was_in(process)}"
                    if process == 0:  # nothing reaches the others without it
                        self._end(text)
                    self._publish(process, text)

    def _listen(self) -> None:
        """Ends this process when another has failed, or process 0 is gone.

        It always has a request at process 0, since only one that is there already fails at once: a new one waits.
        """
        over = None
        while over is None:
            try:
                over = json.loads(self._client.blocking_key_value_get(_OVER, _FOREVER))
            except RuntimeError as error:
                if self._done.is_set():
                    return
                if "DEADLINE_EXCEEDED" not in str(error):
                    self._end(f"{self._heard[0][0]} has ended or cannot be reached; {self._was_in(0)}")
        if not self._done.is_set():
            self._follow(over)

    def _follow(self, over: Mapping[str, Any]) -> None:
        """Ends this process too, unless it is about to end by itself: an error of all is told by each."""
        self._over.set()
        self._notice(over["culprit"])
        if not self._failing.wait(2 * _LOOK):
            self._end(over["text"])

    def _was_in(self, process: int) -> str:
        return f"it was in {self._heard[process][1] or 'no phase of a run'}"

    def _end(self, text: str) -> NoReturn:
        self._ending.acquire()  # for good: the first text is the one
        _say(f"{text}. This process ends too; the same command on all goes on from what was saved")
        os._exit(1)


# JAX aborts in a thread of its own, within milliseconds after process 0 has ended, and runs nothing of Python's before
# it. With C's sleep as its handler SIGABRT, number 6, waits for six seconds: `_look` has these to say who has ended.
_LIBC = ctypes.CDLL(None)
_LIBC.signal.argtypes, _LIBC.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
_SLEEP = ctypes.cast(_LIBC.sleep, ctypes.c_void_p)


def _on_abort(handler: ctypes.c_void_p | int | None) -> int | None:
    """Sets C's handler of SIGABRT; returns the one before."""
    return _LIBC.signal(signal.SIGABRT, handler)


def _say(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"igrpo_jax: error: {text}\n")
    sys.stderr.flush()


def _may_follow(error: BaseException | None) -> bool:
    """Whether `error`, or what it comes of, is one of JAX's that another process's end may bring about.

    Those of its collectives on the CPU are ValueErrors that begin with a status in capitals, as JAX's own do.
    """
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or re.match("[A-Z_]{5,}: ", str(error)):
            return "RESOURCE_EXHAUSTED" not in str(error)
        error = error.__cause__ or error.__context__
    return False
