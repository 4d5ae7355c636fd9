"""XLA's flags for the tests: how many virtual devices there are, and code that compiles in a short time."""

import importlib.metadata


def flags(count: int) -> str:
    """Returns a value of XLA_FLAGS for `count` virtual CPU devices.

    Most of a test's time is spent in LLVM, for programs that run once or twice. XLA's older emitters give it less than
    half as much to do as the newer ones, and one part of a module compiles sooner than many.
    """
    chosen = [f"--xla_force_host_platform_device_count={count}", "--xla_cpu_parallel_codegen_split_count=1"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA ends a process that gives it an unknown flag
        chosen.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(chosen)
