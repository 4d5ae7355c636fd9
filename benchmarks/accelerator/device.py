"""The part `device`: what the machine is, and the two limits that the other figures are compared with."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import TYPE_CHECKING

import models

if TYPE_CHECKING:
    from benchmarks.accelerator.part import Task

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu", "torch", "transformers")
PLUGINS = tuple(f"jax-cuda{version}-plugin" for version in (12, 13))


def run(task: "Task") -> None:
    """Measures the peak of matmuls in bfloat16 and float32, and the bandwidth of the memory, of one device."""
    if task.has("device"):
        return
    import jax

    from igrpo_jax.distributed.chips import CHIPS, known_bytes

    device = jax.devices()[0]
    flops, bandwidth = models.matmul_peak("bfloat16", task.sizes.matmul), models.bandwidth()
    figures = {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "memory_bytes": known_bytes(device),
        "driver": driver(),
        "runtime": device.client.platform_version.replace("\n", " "),
        "bf16_tflops": round(flops / 1e12, 3),
        "fp32_tflops": round(models.matmul_peak("float32", task.sizes.matmul) / 1e12, 3),
        "bandwidth_gb": round(bandwidth / 1e9, 2),
        "host_cpus": os.cpu_count(),
        "disk_free_bytes": shutil.disk_usage(task.results.folder).free,
        "versions": versions(),
    }
    if chip := CHIPS.get(device.device_kind):
        figures |= {"of_published_flops": round(flops / chip.flops, 3)}
        figures |= {"of_published_bandwidth": round(bandwidth / chip.bandwidth, 3)}
    task.add("device", figures)


def driver() -> str | None:
    """Returns name, driver and memory of the first NVIDIA card by nvidia-smi; None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip().partition("\n")[0] or None


def versions() -> dict[str, str]:
    """Returns the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *PLUGINS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
