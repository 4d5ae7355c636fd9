"""The sampler alone, beside transformers' `generate` on the same work.

    python benchmarks/rollout.py --shape qwen2-small --prompts 8 --samples 8 --peers generate static
    python benchmarks/rollout.py --shape qwen2-small --lengths lognormal --new-tokens 512 --slots 16

Prompts are random tokens; completions have prescribed lengths (no EOS), drawn at temperature 1.0. Fixed: all of
--new-tokens. Lognormal: mean --mean-length, sigma 1, at most --new-tokens, one set for each of the seeds 0..--seeds-1.
Peers draw fixed lengths only, in processes of their own, one after the other. The last line is one JSON object:

    tokens_per_second     completion tokens over seconds of the whole rollout (prefill included), median over --steps
                          after one that does not count
    decode_step_seconds   those seconds over decode steps
    slot_utilization      share of slots x steps that drew a token; `queued_` while something waited for a slot
    cache_over_tokens     positions of the pages in use over those that hold a token, when most pages were in use
    preempted             samples that were given up because the pages ran out, and drawn again
    peak_memory_bytes     of the largest program with weights and cache, by the compiler's count; on a GPU or TPU what
                          the allocator saw
    roofline_fraction     (weights once a step + cache positions that had to be read) over bandwidth x seconds; the
                          bandwidth is that of adding 1 to a large array in place, measured in the same run
    compiles              programs compiled in the run that does not count; `recompiles` of those after that
    step_over_products    (--products) a decode step of all slots over its matrix products alone, both in loops on the
                          device, in turns; dense models on one device
    step_over_plain_products    the same over the products with weights as they are trained (on a CPU the sampler's lie
                          by outputs, which is faster)
    peers                 tokens_per_second of each; `speedup`: ours over the best
    ideal_fraction        (lognormal) time of ideal list scheduling over ours, geometric mean over the seeds: samples
                          take slots in order, no slot waits, nothing but decode steps of all slots is paid, at the
                          seconds that a step of this engine takes, interpolated between some positions of the rows
    static_speedup        (lognormal) seconds of the same engine on static batches over ours
"""

import argparse
import heapq
import json
import math
import subprocess
import sys
import time

import models
import rollout_products


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_model(parser)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--lengths", choices=("fixed", "lognormal"), default="fixed")
    parser.add_argument("--mean-length", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--slots", type=int, default=0, help="default: all samples at once")
    parser.add_argument("--pages", type=int, default=0, help="of each shard; default: as many as all slots can need")
    parser.add_argument("--page-size", type=int, default=0)
    parser.add_argument("--steps-per-dispatch", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--products", action="store_true", help="also time the products of a decode step alone")
    parser.add_argument("--peers", nargs="*", choices=("generate", "static"), default=[], help="to run beside it")
    parser.add_argument("--peer", choices=("generate", "static"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peers and args.lengths != "fixed":
        parser.error(f"--peers {' '.join(args.peers)}: draw equally many tokens of every sample; leave out --lengths")
    return args


class Bench:
    """One engine, and prompts to sample."""

    def __init__(self, args: argparse.Namespace):
        import jax
        import numpy as np

        from igrpo_jax.models.config import from_hf
        from igrpo_jax.sampling.configured import make_programs
        from igrpo_jax.sampling.engine import Engine
        from igrpo_jax.sampling.scheduler import Scheduler

        self.args, self.slots = args, args.slots or args.prompts * args.samples
        self.cfg = from_hf(models.raw_config(args), args.model or args.shape)
        self.mesh = models.make_mesh()
        self.cfg = models.with_attention(self.cfg, args, self.mesh)
        programs = make_programs(
            self.cfg,
            self.mesh,
            (self.cfg.vocab_size,),  # is never drawn
            slots=self.slots,
            longest_prompt=args.prompt_len,
            max_completion=args.new_tokens,
            dtype=args.dtype,
            steps_per_dispatch=args.steps_per_dispatch,
            pages=args.pages,
            page_size=args.page_size,
        )
        self.engine = Engine(self.cfg, self.mesh, programs)
        with jax.set_mesh(self.mesh):
            # As a run whose master weights are elsewhere: only the rollout copy is held here.
            self.params = self.engine.weights(self._load())
        self.fullest = (0, 0)  # most pages in use at the end of a dispatch, and the tokens that they held
        self.scheduler = self._watched(Scheduler)(self.engine)
        rng = np.random.default_rng(0)
        self.prompts = rng.integers(17, self.cfg.vocab_size, (args.prompts, args.prompt_len), np.int32)

    def _watched(self, scheduler: type) -> type:
        """Returns a class of schedulers that keeps `fullest`."""
        import jax

        bench = self

        class Watched(scheduler):
            def _fetch(self, dispatch):
                counts = jax.device_get(dispatch.status.count).reshape(len(self.shards), -1)
                pages, tokens = sum(shard.pool.used for shard in self.shards), 0
                for shard, count in zip(self.shards, counts, strict=True):
                    filled = {}
                    for slot, sample in shard.running.items():
                        end = len(sample.request.tokens) + int(count[slot]) - 1
                        size = shard.sizes.page_size
                        filled |= {page: min(size, end - i * size) for i, page in enumerate(sample.pages)}
                    tokens += sum(max(0, n) for n in filled.values())
                bench.fullest = max(bench.fullest, (pages * shard.sizes.page_size, tokens))
                return super()._fetch(dispatch)

        return Watched

    def _load(self):
        if not self.args.model:
            return models.random_params(self.cfg, self.mesh, self.args.dtype)
        from igrpo_jax.models import hf_read

        return hf_read.load_params(self.args.model, self.cfg, self.mesh)

    def run(self, lengths, static: bool = False):
        """Returns the seconds and the Usage of sampling completions of `lengths` [prompts, samples]."""
        import numpy as np

        from igrpo_jax.sampling.requests import Request
        from igrpo_jax.sampling.state import Sampling

        key = np.array([0, 1], np.uint32)
        requests = [Request(tokens, i, len(lengths[i]), key, lengths[i]) for i, tokens in enumerate(self.prompts)]
        groups = [requests]
        if static:
            at_once = max(1, self.slots // self.args.samples)
            groups = [requests[i : i + at_once] for i in range(0, len(requests), at_once)]
        began, drawn = time.perf_counter(), 0
        self.scheduler.start(self.params, Sampling(1.0))
        for group in groups:
            for request in group:
                self.scheduler.submit(request)
            drawn += sum(len(sample.tokens) for sample in self.scheduler.drain())
        seconds = time.perf_counter() - began
        self.scheduler.finish()
        assert drawn == lengths.sum()
        return seconds, self.scheduler.usage

    def step_seconds(self) -> dict[int, float]:
        """Returns the seconds of a decode step of all slots by the positions that each has, the best of three
        dispatches each."""
        filled = Filled(self.engine, self.params, self.prompts[0], self.engine.shard_slots)
        last = self.args.prompt_len + max(0, self.args.new_tokens - self.engine.sizes.steps_per_dispatch)
        positions = sorted({self.args.prompt_len + (last - self.args.prompt_len) * part // 4 for part in range(5)})
        return {position: min(filled.step_seconds(position) for _ in range(3)) for position in positions}


class Filled:
    """Rows of every shard of an engine that have just begun to complete one prompt [L], each on pages of its own."""

    def __init__(self, engine, weights, prompt, rows: int):
        from collections import deque

        import numpy as np

        from igrpo_jax.sampling.requests import Request
        from igrpo_jax.sampling.shard import QueuedSamples, Shard
        from igrpo_jax.sampling.state import Sampling

        self.engine, self.weights, self.sampling, self.prompt_len = engine, weights, Sampling(1.0), len(prompt)
        self.shards = [Shard(engine.sizes) for _ in range(engine.shards)]
        self.state = engine.empty()
        request = Request(prompt, 0, rows, np.array([0, 1], np.uint32), engine.sizes.max_completion)
        for shard in self.shards:
            shard.begin(QueuedSamples(request, deque(range(rows))))
        while self.shards[0].to_prefill:
            size = engine.chunk_size(self.shards[0].to_prefill)
            pieces = [shard.pieces(size) for shard in self.shards]
            self.state = engine.prefill(weights, self.state, size, pieces)
        self.state = engine.fork(self.state, [shard.assign_slots(0) for shard in self.shards], self.sampling)
        for shard in self.shards:
            assert not list(shard.make_room(engine.sizes.steps_per_dispatch)), "the pages hold fewer rows"

    def dispatch(self, position: int | None = None) -> int:
        """Runs one dispatch of the same rows; returns its steps, summed over the shards.

        Args:
            position: positions that each row has; None: the prompt. All positions past the pages of the prompt and of
                the first dispatch are read in one page, which a kernel that reads pages has in a cache of the device.
        """
        import jax

        engine, state = self.engine, self.state
        position = position or self.prompt_len
        self.state = state._replace(
            active=state.active | True, count=state.count * 0 + 1, length=state.length * 0 + position
        )
        jax.block_until_ready(self.state)
        slots, tables = [sorted(shard.running) for shard in self.shards], [shard.table for shard in self.shards]
        min_active, furthest = [1] * len(self.shards), position + engine.sizes.steps_per_dispatch
        self.state, status = engine.decode(self.weights, self.state, slots, tables, furthest, min_active, self.sampling)
        return int(jax.device_get(status.steps).sum())

    def step_seconds(self, position: int | None = None) -> float:
        """Returns the seconds of a decode step in one `dispatch`."""
        began = time.perf_counter()
        steps = self.dispatch(position)
        return (time.perf_counter() - began) * self.engine.shards / steps


def length_sets(args: argparse.Namespace) -> list:
    """Returns the lengths of all completions [prompts, samples], for each seed where they are drawn."""
    import numpy as np

    shape = (args.prompts, args.samples)
    if args.lengths == "fixed":
        return [np.full(shape, args.new_tokens)]
    rngs = map(np.random.default_rng, range(args.seeds))
    return [models.lognormal(rng, shape, args.mean_length, args.new_tokens) for rng in rngs]


def measured(bench: Bench, args: argparse.Namespace, lengths: list, bandwidth: float) -> dict:
    """Returns the figures of sampling each of `lengths`, after one run of the first that does not count.

    Args:
        bandwidth: bytes per second between one device and its memory.
    """
    import jax

    from igrpo_jax.distributed.programs import compilations
    from igrpo_jax.sampling.requests import Usage

    with compilations() as before:
        bench.run(lengths[0])
    memory = bench.engine.programs.predicted_bytes
    with compilations() as after:
        runs = [[bench.run(row) for _ in range(args.steps)] for row in lengths]
    medians = [models.median([seconds for seconds, _ in each]) for each in runs]
    usage = sum((each[0][1] for each in runs), Usage())
    tokens = sum(int(row.sum()) for row in lengths)
    steps = usage.slot_steps / bench.engine.shard_slots  # of all shards
    costs = bench.engine.programs.costs
    weights = costs.item_bytes * (costs.linear_weights + costs.head_weights)
    read = steps * weights + sum(_cache_positions(args, row) for row in lengths) * costs.token_bytes * costs.tensor
    return {
        "tokens_per_second": round(tokens / sum(medians)),
        "rollout_seconds": medians,
        "decode_step_seconds": round(sum(medians) * bench.engine.shards / steps, 6),
        "slot_utilization": round(usage.slot_utilization, 4),
        "queued_slot_utilization": round(usage.queued_slot_utilization, 4) if usage.queued_slot_steps else None,
        "cache_over_tokens": round(bench.fullest[0] / bench.fullest[1], 3),
        "preempted": usage.preempted,
        "peak_memory_bytes": models.peak_bytes() or memory,
        "roofline_fraction": round(read / bandwidth / bench.mesh.size / sum(medians), 4),
        "bandwidth": round(bandwidth),
        "compiles": len(before),
        "recompiles": len(after),
        "device": jax.devices()[0].device_kind,
        "devices": bench.mesh.size,
        "slots": bench.slots,
    }


def ours(args: argparse.Namespace) -> dict:
    import jax

    bench, lengths = Bench(args), length_sets(args)
    with jax.set_mesh(bench.mesh):
        bench.engine.compile()
    figures = measured(bench, args, lengths, models.bandwidth()) | models.machine("numpy")
    medians = figures["rollout_seconds"]
    if args.products:
        figures |= rollout_products.ratios(bench)
    if args.lengths == "lognormal":
        cost = bench.step_seconds()
        ideal = [_ideal(bench, args, row, cost) for row in lengths]
        fractions = [best / seconds for best, seconds in zip(ideal, medians, strict=True)]
        static = [models.median([bench.run(row, static=True)[0] for _ in range(args.steps)]) for row in lengths]
        figures |= {
            "ideal_seconds": [round(best, 4) for best in ideal],
            "ideal_fraction": round(math.exp(sum(map(math.log, fractions)) / len(fractions)), 3),
            "ideal_fractions": [round(fraction, 3) for fraction in fractions],
            "static_seconds": static,
            "static_speedup": round(sum(static) / sum(medians), 2),
            "step_seconds_by_position": {position: round(seconds, 5) for position, seconds in cost.items()},
        }
    return figures


def _cache_positions(args: argparse.Namespace, lengths) -> int:
    """Returns how many positions of the cache decoding reads: token n of a completion reads prompt_len + n of them."""
    return int(sum((n - 1) * args.prompt_len + n * (n - 1) // 2 for n in lengths.ravel().tolist()))


def _ideal(bench: Bench, args: argparse.Namespace, lengths, cost: dict[int, float]) -> float:
    """Returns the seconds of decode steps under list scheduling: samples in order, each on the first free slot."""
    import numpy as np

    free = [0] * bench.slots
    spans = []
    for n in lengths.ravel().tolist():
        start = heapq.heappop(free)
        spans.append((start, start + n - 1))
        heapq.heappush(free, start + n - 1)
    seconds, end = 0.0, max(free)
    for step in range(end):
        furthest = max(args.prompt_len + step - start + 1 for start, stop in spans if start <= step < stop)
        seconds += float(np.interp(furthest, list(cost), list(cost.values())))
    return seconds


def peer(args: argparse.Namespace) -> dict:
    """Runs `generate` on the same prompts, each repeated for its samples, in one batch; fixed lengths."""
    import os

    import torch

    torch.set_num_threads(os.cpu_count())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = models.torch_model(args).to(device).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(17, model.config.vocab_size, (args.prompts, args.prompt_len), generator=generator)
    prompts = prompts.repeat_interleave(args.samples, 0).to(device)
    options = {"cache_implementation": "static"} if args.peer == "static" else {}
    model.generation_config.eos_token_id = None

    @torch.no_grad()
    def run():
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=args.new_tokens, pad_token_id=0, **options,
        )  # fmt: skip
        assert out.shape[1] == args.prompt_len + args.new_tokens
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = models.median(models.timed(run, args.steps))
    return {"tokens_per_second": round(args.prompts * args.samples * args.new_tokens / seconds)}


def main() -> None:
    args = parse()
    if args.peer:
        models.finish(peer(args))
        return
    figures = ours(args)
    print(f"ours: {figures['tokens_per_second']} tokens/s")
    peers = {}
    for name in args.peers:
        command = [sys.executable, __file__, *sys.argv[1:], "--peer", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        peers[name] = json.loads(done.stdout.splitlines()[-1])["tokens_per_second"]
        print(f"{name}: {peers[name]} tokens/s")
    if peers:
        figures |= {"peers": peers, "speedup": round(figures["tokens_per_second"] / max(peers.values()), 2)}
    models.finish(vars(args) | figures)


if __name__ == "__main__":
    main()
