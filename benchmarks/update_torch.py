"""The torch peer of benchmarks/update.py: a transformers model and its update, written in the usual way.

Micro-batches are rows in the order of the prompts, as many as --tokens-per-microbatch holds at the longest completion.
Completions are padded on the right to the longest of their micro-batch, with an attention mask, and the loss masks what
is padding. TRL pads on the same side, but to the longest completion of a step, which is never narrower. Rows of groups
without a gradient are run as all others are, as TRL runs them.
"""

import argparse
import os
from collections.abc import Iterator
from typing import NamedTuple

import models
import numpy as np
import update_rows
from update_rows import Rows


class MicroBatch(NamedTuple):
    """R rows of a prompt and a completion, padded on the right; torch tensors from `on`, NumPy's before."""

    tokens: np.ndarray  # [R, L + T] int64
    mask: np.ndarray  # [R, L + T] bool, where there is a token
    advantages: np.ndarray  # [R] float32
    weights: np.ndarray  # [R, T] float32 of completion tokens: 1 over the tokens of a row and the rows of the update

    def on(self, device: str) -> "MicroBatch":
        """Returns the arrays as tensors on `device`."""
        import torch

        return MicroBatch(*(torch.from_numpy(array).to(device) for array in self))


def micro_batches(rows: Rows, tokens_per_microbatch: int) -> Iterator[MicroBatch]:
    """Yields the rows in their order, as many at once as fit at the longest completion, and at least one."""
    prefix, lengths = rows.contexts.shape[1], rows.lengths.ravel()
    contexts = np.repeat(rows.contexts, rows.lengths.shape[1], axis=0)
    completions = [tokens for of_prompt in rows.completions for tokens in of_prompt]
    advantages = rows.advantages.ravel()
    at_once = max(1, tokens_per_microbatch // (prefix + int(lengths.max())))
    for start in range(0, len(completions), at_once):
        part = slice(start, start + at_once)
        mask = np.arange(lengths[part].max()) < lengths[part, None]
        own = np.zeros(mask.shape, np.int64)
        own[mask] = np.concatenate(completions[part])
        yield MicroBatch(
            np.concatenate([contexts[part], own], 1),
            np.concatenate([np.ones_like(contexts[part], bool), mask], 1),
            advantages[part],
            (mask / lengths[part, None] / len(completions)).astype(np.float32),
        )


def peer(args: argparse.Namespace) -> dict:
    """Measures `args.peer` on the rows that `args` ask for."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(os.cpu_count())
    narrow = device == "cuda" and args.dtype == "bfloat16"
    weights = argparse.Namespace(**vars(args) | {"dtype": "float32"}) if narrow else args
    model = models.torch_model(weights, attn_implementation="sdpa").to(device).train()
    model.config.use_cache = False
    if device == "cuda":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forward = torch.compile(model) if args.peer == "compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    rows = update_rows.make_rows(args, model.config.vocab_size)
    on_host = list(micro_batches(rows, args.tokens_per_microbatch))
    batches = [batch.on(device) for batch in on_host]
    is_padded = not all(batch.mask.all() for batch in on_host)
    measured = []

    def step():
        total = 0.0
        for batch in batches:
            with torch.autocast(device, torch.bfloat16, enabled=narrow):
                logits = _logits(forward, batch, is_padded)
            loss = _loss(logits, batch)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        measured.append({"loss": float(total), "grad_norm": float(norm)})  # waits for the device

    figures = models.step_figures(step, args.steps, 4 * sum(p.numel() for p in model.parameters()))
    if device == "cuda":
        figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    positions = sum(batch.mask.size for batch in on_host)
    padding = 1 - sum(batch.mask.sum() for batch in on_host) / positions
    figures |= rows.rates(figures["update_seconds"]) | measured[0]
    return figures | {"padding_fraction": round(float(padding), 4), "torch": torch.__version__}


def _logits(forward, batch: MicroBatch, is_padded: bool):
    """Returns the logits [R, T, V] of the completions; rows without padding need no mask, which makes SDPA slower."""
    kept = batch.weights.shape[1]
    mask = {"attention_mask": batch.mask.long()} if is_padded else {}
    return forward(input_ids=batch.tokens, logits_to_keep=kept + 1, use_cache=False, **mask).logits[:, :-1]


def _loss(logits, batch: MicroBatch):
    """Returns the part of a micro-batch in the loss of an update on policy: the mean of the rows' means over tokens."""
    import torch

    chosen = batch.tokens[:, -logits.shape[1] :, None]
    logprob = torch.log_softmax(logits.float(), -1).gather(-1, chosen)[..., 0]
    ratio = torch.exp(logprob - logprob.detach())
    return -(ratio * batch.advantages[:, None] * batch.weights).sum()
