"""One part in a process of its own: `python -m benchmarks.accelerator.part NAME DIR SCALE SHAPE`.

It ends with its parent: the parent holds the other end of its standard input, which closes when the parent dies.
"""

import dataclasses
import importlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accelerator import plan, sizes
from benchmarks.accelerator.results import Results
from benchmarks.accelerator.sizes import Sizes
from igrpo_jax.errors import InputError


@dataclass
class Task:
    """What a part is to measure, and where its results go."""

    part: str
    scale: str
    sizes: Sizes
    results: Results

    @property
    def device(self) -> dict[str, Any]:
        """The figures of the part `device`."""
        return self.results.device() or {}

    @property
    def memory(self) -> int | None:
        """Bytes of each device; None where it does not say."""
        return self.device.get("memory_bytes")

    def has(self, case: str) -> bool:
        """Returns whether the figures of `case` are there, from a run before this one."""
        return case in self.results.cases(self.part)

    def add(self, case: str, figures: dict[str, Any]) -> None:
        """Writes the figures of `case`."""
        self.results.add({"part": self.part, "case": case, "figures": figures})
        print(f"{time.strftime('%H:%M:%S')} {case}", flush=True)


def end_with_parent() -> None:
    """Kills this process and those that it started as soon as its standard input is closed."""

    def wait() -> None:
        # Not sys.stdin, whose lock a thread must not hold when Python ends.
        while os.read(0, 1):
            pass
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def print_compilations() -> None:
    """Prints each program that takes XLA a second or more, so that the log shows where the time went."""
    import jax

    def listen(event: str, seconds: float, **details: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and seconds >= 1:
            print(f"{time.strftime('%H:%M:%S')} compiled {details.get('fun_name')} in {seconds:.1f} s", flush=True)

    jax.monitoring.register_event_duration_secs_listener(listen)


def check_device(task: Task) -> None:
    """Raises InputError where the results in the folder are those of another kind of device."""
    import jax

    known, here = task.device.get("device_kind"), jax.devices()[0].device_kind
    if known is not None and (known, task.device["devices"]) != (here, jax.device_count()):
        raise InputError(
            f"--out {task.results.folder}: holds results of {task.device['devices']} x {known}, and this machine has "
            f"{jax.device_count()} x {here}; give another folder"
        )


def main(name: str, folder: str, scale: str, shape: str) -> None:
    if sys.stdin is not None and not sys.stdin.isatty():
        end_with_parent()
    chosen = sizes.BY_SCALE[scale]
    if shape:
        chosen = dataclasses.replace(chosen, shape=shape)
    task = Task(name, scale, chosen, Results(Path(folder)))
    part = next(part for part in plan.PARTS if part.name == name)
    if name != "peers":  # JAX would take the memory that other libraries need
        from igrpo_jax import config
        from igrpo_jax.distributed.disk_cache import use_disk_cache

        use_disk_cache(config.Config().compilation_cache)
        check_device(task)
        print_compilations()
    importlib.import_module(f"benchmarks.accelerator.{part.module}").run(task)


if __name__ == "__main__":
    main(*sys.argv[1:])
