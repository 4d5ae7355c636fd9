"""The update alone: gradient and AdamW step of one rollout, beside plain torch on the same rows.

    python benchmarks/update.py --shape smollm2-135m --groups 2 --group 8 --prefix 64 --completion 64 --torch eager

Rows are random tokens of fixed or lognormal lengths with random advantages, on policy, one optimizer step, beta 0. The
torch peer is a transformers model with SDPA: forward, backward, a norm clip and fused AdamW over the same rows, its
head on the positions before completion tokens only. On a GPU it recomputes layers as ours does, and bfloat16 means
float32 weights under autocast. Each runs in a process of its own, one after the other. The last line is one JSON
object:

    update_seconds        median over --steps updates after one that does not count (which compiles)
    tokens_per_second     completion tokens over update_seconds
    mfu                   FLOPs of the model (perf/update_flops: matmuls and attention, forward and backward, without
                          recomputation; what the group shares is counted once where it is run once) per second and
                          device, over those of a large matmul measured in the same run
    predicted_memory_bytes   of the largest program with the training state, by the compiler's count, on each device
    peak_memory_bytes     the most that the allocator of a GPU or TPU held; elsewhere the prediction
    extra_memory_bytes    resident memory of the process at its peak, beyond that before a step and the gradients: what
                          activations and temporaries need (CPU only)
    padding_fraction      share of the positions run that are padding
    torch_...             the same of the torch peers, and `ratio`: update_seconds over the best torch peer's
"""

import argparse
import json
import os
import subprocess
import sys

import models


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_model(parser)
    parser.add_argument("--groups", type=int, default=2, help="prompts")
    parser.add_argument("--group", type=int, default=8, help="completions of each")
    parser.add_argument("--prefix", type=int, default=64, help="tokens of each prompt, with its draft")
    parser.add_argument("--completion", type=int, default=64, help="tokens of each completion, or of the longest")
    parser.add_argument("--lengths", choices=("fixed", "lognormal"), default="fixed", help="of ours; torch: fixed")
    parser.add_argument("--mean-length", type=int, default=64, help="with --lengths lognormal")
    parser.add_argument("--shared-prefix", choices=("on", "off"), default="on")
    parser.add_argument("--remat", choices=("full", "dots", "none"), default="full")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--tokens-per-microbatch", type=int, default=1 << 20)
    parser.add_argument("--logprob-chunk", type=int, default=None, help="positions of a row; default: the package's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--torch", nargs="*", choices=("eager", "compile"), default=[], help="peers to run beside it")
    parser.add_argument("--peer", choices=("eager", "compile"), help=argparse.SUPPRESS)
    return parser.parse_args()


def settings(args: argparse.Namespace):
    """Returns the configuration of a run that makes such an update."""
    from igrpo_jax import config

    tree = config.default()
    tree.prompts_per_step = args.groups
    tree.algorithm.num_generations = args.group
    tree.algorithm.num_drafts = 0
    tree.rollout.max_completion_length = args.completion
    tree.rollout.temperature = 1.0
    tree.model.dtype = args.dtype
    tree.learner.remat = args.remat
    tree.learner.attention = args.attention
    tree.learner.tokens_per_microbatch = args.tokens_per_microbatch
    tree.learner.shared_prefix = args.shared_prefix == "on"
    if args.logprob_chunk:
        tree.learner.logprob_chunk = args.logprob_chunk
    return config.freeze(tree)


def row_lengths(args: argparse.Namespace):
    """Returns the tokens of each completion, [groups, group]."""
    import numpy as np

    shape = (args.groups, args.group)
    if args.lengths == "fixed":
        return np.full(shape, args.completion)
    return models.lognormal(np.random.default_rng(0), shape, args.mean_length, args.completion)


def random_groups(args: argparse.Namespace, vocab_size: int, rng) -> list:
    """Returns groups of random tokens, of the lengths that `args` ask for."""
    import numpy as np

    from igrpo_jax.records import Completion, Group, Prompt, Score

    def completion(i, length):
        tokens = rng.integers(17, vocab_size, length, np.int32)
        return Completion("refine", i, tokens, np.zeros(length, np.float32), True, score=Score(0, {}, None, "ok"))

    groups = []
    for index, lengths in enumerate(row_lengths(args)):
        context = rng.integers(17, vocab_size, args.prefix, np.int32)
        prompt = Prompt(str(index), index, "", "", context)
        groups.append(Group(prompt, (), None, context, tuple(map(completion, range(args.group), lengths))))
    return groups


class Bench:
    """A learner with its training state, and groups to train on."""

    def __init__(self, args: argparse.Namespace):
        import jax
        import numpy as np

        from igrpo_jax.learning.learner import Learner
        from igrpo_jax.models.config import from_hf

        model = from_hf(models.raw_config(args), args.model or args.shape)
        self.mesh = models.make_mesh()
        self.model = models.with_attention(model, args, self.mesh, args.attention)
        rng = np.random.default_rng(0)
        self.groups = random_groups(args, model.vocab_size, rng)
        self.advantages = rng.standard_normal((args.groups, args.group)).astype(np.float32)
        with jax.set_mesh(self.mesh):
            self.learner = Learner(settings(args), self.model, self.mesh, max_context=args.prefix, total_steps=100)
            self.state = self.learner.init(self._load(args))

    def _load(self, args: argparse.Namespace):
        if not args.model:
            return models.random_params(self.model, self.mesh)
        from igrpo_jax.models import hf_read

        return hf_read.load_params(args.model, self.model, self.mesh)

    def step(self) -> dict:
        """Makes one update and returns its metrics."""
        import jax

        with jax.set_mesh(self.mesh):
            self.state, metrics = self.learner.update(self.state, self.groups, self.advantages, 1)
            jax.block_until_ready(self.state.params)
        return metrics


def ours(args: argparse.Namespace) -> dict:
    import jax

    bench, metrics = Bench(args), []
    figures = _measure(lambda: metrics.append(bench.step()), args, 4 * bench.model.num_params)
    predicted, measured = bench.learner.predicted_bytes(), models.peak_bytes()
    per_second = metrics[-1]["perf/update_flops"] / figures["update_seconds"] / bench.mesh.size
    return figures | {
        "peak_memory_bytes": measured or predicted,
        "predicted_memory_bytes": predicted,
        "mfu": round(per_second / models.matmul_peak(args.dtype), 3),
        "padding_fraction": round(metrics[-1]["perf/padding_frac"], 4),
        "loss": metrics[0]["loss"],
        "device": jax.devices()[0].device_kind,
        "devices": bench.mesh.size,
        "attention": bench.model.attention,
        **models.machine("optax"),
    }


def _measure(step, args: argparse.Namespace, gradient_bytes: int) -> dict:
    memory = models.PeakMemory()
    step()
    memory.reset()
    before = memory.now()
    seconds = models.timed(step, args.steps)
    return {
        "update_seconds": models.median(seconds),
        "update_seconds_best": round(min(seconds), 4),
        "tokens_per_second": round(int(row_lengths(args).sum()) / models.median(seconds)),
        "extra_memory_bytes": memory.peak() - before - gradient_bytes,
    }


def peer(args: argparse.Namespace) -> dict:
    """Runs the same rows through a transformers model, written in the usual way."""
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
    rows = args.groups * args.group
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randint(17, model.config.vocab_size, (args.groups, args.prefix), generator=generator)
    own = torch.randint(17, model.config.vocab_size, (rows, args.completion), generator=generator)
    tokens = torch.cat([contexts.repeat_interleave(args.group, 0), own], 1).to(device)
    advantages = torch.randn(rows, generator=generator).to(device)
    at_once = max(1, args.tokens_per_microbatch // (args.prefix + args.completion))

    def step():
        for i in range(0, rows, at_once):
            x = tokens[i : i + at_once]
            with torch.autocast(device, torch.bfloat16, enabled=narrow):
                out = forward(input_ids=x, logits_to_keep=args.completion + 1, use_cache=False)
            logits = out.logits[:, :-1].float()
            logprob = torch.log_softmax(logits, -1).gather(-1, x[:, args.prefix :, None])[..., 0]
            ratio = torch.exp(logprob - logprob.detach())
            (-(ratio * advantages[i : i + at_once, None]).mean(1).sum() / rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    figures = _measure(step, args, 4 * sum(p.numel() for p in model.parameters()))
    if device == "cuda":
        figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return figures | {"torch": torch.__version__}


def main() -> None:
    args = parse()
    if args.peer:
        models.finish(peer(args))
        return
    figures = ours(args)
    print(f"ours: {figures['update_seconds']} s, {figures['extra_memory_bytes'] / 2**20:.0f} MiB extra")
    peers = {}
    for name in args.torch:
        command = [sys.executable, __file__, *sys.argv[1:], "--peer", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        peers[name] = json.loads(done.stdout.splitlines()[-1])
        extra = peers[name]["extra_memory_bytes"] / 2**20
        print(f"torch {name}: {peers[name]['update_seconds']} s, {extra:.0f} MiB extra")
        figures |= {f"torch_{name}_{key}": value for key, value in peers[name].items()}
    if peers:
        best = min(peers.values(), key=lambda figures: figures["update_seconds"])
        figures["ratio"] = round(figures["update_seconds"] / best["update_seconds"], 3)
        figures["memory_ratio"] = round(figures["extra_memory_bytes"] / best["extra_memory_bytes"], 3)
    models.finish(vars(args) | figures)


if __name__ == "__main__":
    main()
