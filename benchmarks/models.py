"""Models and figures that the benchmarks share: shapes by name, random or real weights, memory, the machine."""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from igrpo_jax.models.shapes import SHAPES as PUBLIC
from igrpo_jax.models.shapes import dense

_QWEN2 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "max_position_embeddings": 131_072}

# config.json of each shape.
SHAPES = {
    "qwen2-tiny": dense(_QWEN2, 64, 2, 4, 2, 128, 512, True),
    "qwen2-small": dense(_QWEN2, 256, 4, 4, 2, 688, 49_152, True),
    "qwen2-small-150k": dense(_QWEN2, 256, 4, 4, 2, 688, 151_936, True),
    "qwen2-3b": dense(_QWEN2, 2048, 36, 16, 2, 11_008, 151_936, True),
    "smollm2-135m": PUBLIC["HuggingFaceTB/SmolLM2-135M-Instruct"],
    "qwen2-0.5b": PUBLIC["Qwen/Qwen2.5-0.5B-Instruct"],
    "qwen2-1.5b": PUBLIC["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"],
    "qwen2-7b": PUBLIC["deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"],
}


def add_model(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    group = parser.add_mutually_exclusive_group(required=default is None)
    group.add_argument("--model", metavar="DIR", help="Hugging Face directory with weights")
    group.add_argument("--shape", choices=SHAPES, default=default, help="random weights of this shape")


def raw_config(args: argparse.Namespace) -> dict:
    """Returns the config.json of the model that `args` name."""
    return json.loads((Path(args.model) / "config.json").read_text()) if args.model else SHAPES[args.shape]


def torch_model(args: argparse.Namespace, **options):
    """Returns the same model in transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    if args.model:
        return transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, **options)
    raw = dict(SHAPES[args.shape])
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def make_mesh():
    """Returns the mesh over all devices of this machine, with the weights split over them."""
    from igrpo_jax import config
    from igrpo_jax.distributed import sharding

    return sharding.make_mesh(config.MeshConfig())


def peak_bytes() -> int | None:
    """Returns the most bytes that the allocator of a device has held in this process; None where it does not say."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def random_params(cfg, mesh, dtype: str = "float32"):
    """Returns random parameters in their shardings; every sublayer takes part.

    Arrays of one shape share a small program. XLA's compiler for GPUs needs over eight minutes for one program that
    draws the 338 arrays of the 1.5B shape.
    """
    import jax

    from igrpo_jax.distributed import sharding
    from igrpo_jax.models import decoder

    @functools.cache
    def program(shape, placed):
        return jax.jit(lambda key: 0.02 * jax.random.normal(key, shape, dtype), out_shardings=placed)

    shapes = decoder.shapes(cfg)
    params = {}
    for number, (path, shape) in enumerate(shapes.items()):
        placed = sharding.param_sharding(mesh, path)
        if path.endswith("scale"):
            params[path] = jax.device_put(np.ones(shape, jax.numpy.dtype(dtype)), placed)
        else:
            params[path] = program(shape, placed)(jax.random.key(number))
    return params


def with_attention(cfg, args: argparse.Namespace, mesh, requested: str = "auto"):
    """Returns `cfg` (a DecoderConfig) with the attention that a run would choose."""
    from igrpo_jax.models import attention

    return dataclasses.replace(cfg, attention=attention.choose(requested, mesh, args.dtype, cfg.head_dim))


def lognormal(rng, shape: tuple[int, ...], mean: float, longest: int):
    """Returns completion lengths of that mean (before they are cut) and sigma 1, from 1 to `longest`."""
    return rng.lognormal(math.log(mean) - 0.5, 1.0, shape).round().clip(1, longest).astype(int)


def bandwidth() -> float:
    """Returns the bytes per second, read and written, of adding 1 to a large array in place; best of several."""
    import jax
    import jax.numpy as jnp

    calls = _calls()
    box = [jnp.zeros((1 << 28,), jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run():
        for _ in range(calls):
            box[0] = add(box[0])
        box[0].block_until_ready()

    return calls * 2 * 4 * (1 << 28) / min(timed(run, 8))


def _calls() -> int:
    """Returns how many calls are timed together; an accelerator's take less than a millisecond, and a launch counts."""
    import jax

    return 1 if jax.default_backend() == "cpu" else 20


def timed(run: Callable[[], object], steps: int) -> list[float]:
    """Returns the seconds of each of `steps` calls, after one that does not count."""
    run()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return seconds


def step_figures(step: Callable[[], object], steps: int, gradient_bytes: int) -> dict:
    """Returns time and memory of `steps` calls that make an update, after two that do not count."""
    memory = PeakMemory()
    step()
    memory.reset()
    before = memory.now()
    seconds = timed(step, steps)
    return {
        "update_seconds": median(seconds),
        "update_seconds_best": round(min(seconds), 4),
        "extra_memory_bytes": memory.peak() - before - gradient_bytes,
    }


@functools.cache
def matmul_peak(dtype: str, size: int = 2048) -> float:
    """Returns the FLOP/s of a large square matmul on one device, best of several; measured once in a process."""
    import jax

    calls, size = _calls(), size if jax.default_backend() == "cpu" else 8192
    # Random numbers, because a GPU multiplies constants faster: they take less power.
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(lambda a, b: a @ b)

    def run():
        for _ in range(calls):
            product = multiply(x, x)
        product.block_until_ready()

    return calls * 2 * size**3 / min(timed(run, 8))


class PeakMemory:
    """Resident memory of this process, in bytes: `now`, and the most since `reset` (Linux)."""

    @staticmethod
    def reset() -> None:
        Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def _field(name: str) -> int:
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    def now(self) -> int:
        return self._field("VmRSS")

    def peak(self) -> int:
        return self._field("VmHWM")


def machine(*packages: str) -> dict:
    """Returns what a figure depends on besides the code."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    names = ("jax", "jaxlib", "flax", *packages)
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),  # huge pages make CPUs faster
    }


def median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def finish(figures: dict) -> None:
    """Prints the one JSON object that every benchmark ends with."""
    print(json.dumps(figures))
