"""What is measured at each scale: "full" on an accelerator, "small" on a CPU with --shape, "tiny" with --tiny.

Sizes come down where the memory of the device is too small, and the result then says so in `reduced`.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import models

# Bytes of a parameter that is trained: float32 weight, gradient and two moments, and a margin for temporaries.
TRAINED_BYTES = 18
USABLE = 0.85  # of the memory that the device reports; the rest is for temporaries and fragments
SMALLER_SHAPES = ("qwen2-1.5b", "qwen2-0.5b", "smollm2-135m", "qwen2-small", "qwen2-tiny")


@dataclass(frozen=True)
class Sizes:
    """The sizes of one scale. Lengths are in tokens."""

    shape: str  # of decode, update, step, peers and profile
    large_shape: str  # of decode7b
    checked_shape: str  # of correctness
    dtype: str
    rows: tuple[int, ...]  # decoded at once
    samples: int  # of a prompt
    prompt: int
    completion: int
    mean: int  # of lognormal completions
    # By case: groups of 8, prefix, (longest) completion, lengths, learner.remat.
    updates: dict[str, tuple[int, int, int, str, str]]
    microbatch: int  # tokens of a micro-batch
    matmul: int  # rows of the square matrices of the part `device` on a CPU; on an accelerator they have 8192
    step: tuple[int, int, int, int]  # prompts, tokens of a prompt, of the longest completion, mean
    repeats: int  # measured runs of a case, after one that does not count


FULL = Sizes(
    shape="qwen2-1.5b",
    large_shape="qwen2-7b",
    checked_shape="smollm2-135m",
    dtype="bfloat16",
    rows=(256, 64),
    samples=8,
    prompt=512,
    completion=1024,
    mean=512,
    updates={
        "rows of 1k": (9, 512, 512, "fixed", "full"),
        "rows of 1k, remat none": (9, 512, 512, "fixed", "none"),
        "rows of 4k": (2, 512, 3584, "fixed", "full"),
        "lognormal up to 4k": (8, 512, 3584, "lognormal", "full"),
    },
    microbatch=16_384,
    matmul=2048,
    step=(16, 256, 1024, 256),
    repeats=2,
)
SMALL = Sizes(
    shape="smollm2-135m",
    large_shape="qwen2-0.5b",
    checked_shape="smollm2-135m",
    dtype="float32",
    rows=(16, 8),
    samples=8,
    prompt=64,
    completion=64,
    mean=32,
    updates={
        "rows of 128": (1, 64, 64, "fixed", "full"),
        "lognormal up to 192": (1, 64, 128, "lognormal", "full"),
    },
    microbatch=2048,
    matmul=2048,
    step=(2, 64, 64, 32),
    repeats=1,
)
TINY = Sizes(
    shape="qwen2-tiny",
    large_shape="qwen2-tiny",
    checked_shape="qwen2-tiny",
    dtype="float32",
    rows=(8,),
    samples=8,
    prompt=16,
    completion=16,
    mean=8,
    updates={
        "rows of 32": (2, 16, 16, "fixed", "full"),
        "lognormal up to 32": (2, 16, 16, "lognormal", "none"),
    },
    microbatch=1024,
    matmul=512,
    step=(2, 16, 16, 8),
    repeats=1,
)
BY_SCALE = {"full": FULL, "small": SMALL, "tiny": TINY}


def num_params(shape: str) -> int:
    """Returns the number of parameters of a shape."""
    from igrpo_jax.models.config import from_hf

    return from_hf(models.SHAPES[shape], shape).num_params


def trainable(shape: str, memory: int | None, devices: int) -> tuple[str, str]:
    """Returns the largest shape, from `shape` down, whose training state fits, and why it is smaller ("" if not).

    Args:
        memory: bytes of each device; None where it does not say.
    """
    if memory is None or shape not in SMALLER_SHAPES:
        return shape, ""
    for name in SMALLER_SHAPES[SMALLER_SHAPES.index(shape) :]:
        if TRAINED_BYTES * num_params(name) / devices <= USABLE * memory:
            break
    return name, "" if name == shape else f"{shape} does not fit {memory / 1e9:.0f} GB on each of {devices} devices"


def halved(size: int, least: int, run: Callable[[int], Any]) -> Any:
    """Returns `run(size)`; where the memory does not suffice, that of half the size, and so on.

    Raises:
        Exception: the error of the device where `least` does not fit either, or any other error.
    """
    while True:
        try:
            return run(size)
        except Exception as error:  # JAX and torch have errors of their own for it
            if not is_out_of_memory(error) or size // 2 < least:
                raise
        size //= 2
        gc.collect()  # what the error's frames held


def smaller(asked: int, size: int, what: str) -> dict[str, str]:
    """Returns the note of a result that was measured at a smaller size than was asked for; {} where it was not."""
    return {"reduced": f"{asked} -> {size} {what}: the memory does not suffice"} if size < asked else {}


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error of JAX or torch is that the memory of the device does not suffice."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def decoded(sizes: Sizes, shape: str, rows: int, lengths: str) -> argparse.Namespace:
    """Returns the arguments of `rollout.Bench` and `rollout.measured`, or of `rollout.peer`."""
    return argparse.Namespace(
        model=None,
        shape=shape,
        prompts=max(1, rows // sizes.samples),
        samples=min(rows, sizes.samples),
        prompt_len=sizes.prompt,
        new_tokens=sizes.completion,
        lengths=lengths,
        mean_length=sizes.mean,
        seeds=1,
        slots=rows,
        pages=0,
        page_size=0,
        steps_per_dispatch=min(16, sizes.completion // 4),
        dtype=sizes.dtype,
        steps=sizes.repeats,
    )


def updates(sizes: Sizes, shape: str) -> Iterator[tuple[str, argparse.Namespace]]:
    """Yields each case of an update, with the arguments of `update.Bench`, `update.ours` and `update_torch.peer`."""
    for case, (groups, prefix, completion, lengths, remat) in sizes.updates.items():
        yield (
            case,
            argparse.Namespace(
                model=None,
                shape=shape,
                groups=groups,
                group=8,
                prefix=prefix,
                completion=completion,
                lengths=lengths,
                mean_length=completion // 3,
                idle=0.0,
                shared_prefix="on",
                remat=remat,
                attention="auto",
                tokens_per_microbatch=sizes.microbatch,
                microbatch_sizes=(1.0,) if lengths == "fixed" else (1.0, 0.125),  # each is a program to compile
                logprob_chunk=None,
                dtype=sizes.dtype,
                steps=sizes.repeats,
            ),
        )


def stepped(sizes: Sizes, shape: str) -> argparse.Namespace:
    """Returns the arguments of `two_stage.make_stages`: 4 drafts and 4 refinements, or 8 completions."""
    prompts, prompt, completion, mean = sizes.step
    return argparse.Namespace(
        model=None,
        shape=shape,
        prompts=prompts,
        drafts=4,
        generations=4,
        prompt_len=prompt,
        new_tokens=completion,
        mean_length=mean,
        right=0.0,
        seeds=1,
        slots=0,
        dtype=sizes.dtype,
        steps=sizes.repeats,
    )
