"""XLA's flags for the tests: how many virtual devices there are, and code that compiles in a short time."""

import importlib.metadata
import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def flags(count: int) -> str:
    """Returns a value of XLA_FLAGS for `count` virtual CPU devices.

    Most of a test's time is spent in LLVM, for programs that run once or twice. XLA's older emitters give it less than
    half as much to do as the newer ones, and one part of a module compiles sooner than many.
    """
    chosen = [f"--xla_force_host_platform_device_count={count}", "--xla_cpu_parallel_codegen_split_count=1"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA ends a process that gives it an unknown flag
        chosen.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(chosen)


def environment(count: int, **more: str) -> dict[str, str]:
    """Returns the environment of a process that has `count` devices, where these are CPUs, and can import the package.

    Args:
        more: further variables. A PYTHONPATH among them comes before that of this process.
    """
    folders = [str(ROOT), more.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, folders))
    return os.environ | {"XLA_FLAGS": flags(count), "PYTHONPATH": path} | more
