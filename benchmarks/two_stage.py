"""What the draft stage costs: GRPO with N + G samples against iGRPO with N drafts and G refinements, rollout only.

    python benchmarks/two_stage.py
    python benchmarks/two_stage.py --right 0.5      # half of the answers are right

Both draw completions of the same prescribed lengths: lognormal, mean 64, sigma 1, at most 256, one set for each of the
seeds. iGRPO's first N are the drafts', and refinements see the prompt with the best draft in it. The verifier is the
real one, on the decimal text of the ids; as many answers are right as --right says, whatever their length. GRPO and
iGRPO take turns. The last line is one JSON object; seconds are sums over the seeds of the median over --steps:

    grpo_seconds            GRPO, --slots slots (default prompts x (N + G) / 2)
    igrpo_seconds           iGRPO, streamed, the same slots
    igrpo_barrier_seconds   iGRPO that waits for all drafts, the same slots
    ratio                   igrpo_seconds / grpo_seconds; `barrier_ratio` of the barrier's
    full_...                the same at prompts x (N + G) slots, where iGRPO has half of them idle
    ratio_to_best_grpo      igrpo_seconds over GRPO's at the better of the two slot counts
    stage_overlap_frac, slot_utilization, verify_wait_seconds   of streamed iGRPO, means over the seeds
    makespan_ratio          decode steps of iGRPO over GRPO's under perfect scheduling, by the lengths alone (each
                            refinement waits for the longest of its prompt's drafts up to the first right one, and for
                            nothing else), mean over the seeds
    ideal_ratio             the same in seconds, where a step of so many completions costs what it costs this engine
                            (measured, interpolated between its numbers of rows; no prefill, no dispatch): what no
                            schedule can beat
"""

import argparse
import contextlib
import dataclasses
import zlib

import models
import rollout


def parser(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_model(parser, default="qwen2-small")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--drafts", type=int, default=4, help="N")
    parser.add_argument("--generations", type=int, default=4, help="G")
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256, help="longest completion")
    parser.add_argument("--mean-length", type=int, default=64)
    parser.add_argument("--right", type=float, default=0.0, help="fraction of the answers that are right")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=3)
    return parser


class TokenRenderer:
    """Stands in for a tokenizer: q' is the prompt followed by the whole draft."""

    opening = ""
    answer = "7"  # the reference answer of every prompt

    def __init__(self, args: argparse.Namespace, prompts):
        self._right = args.right
        self._prompts = prompts

    def with_draft(self, question: str, draft, is_right=None):
        import numpy as np

        return np.concatenate([self._prompts[int(question)].tokens, draft])

    def text(self, tokens) -> str:
        """Returns the ids, with the right answer after them or not; it follows from the ids alone."""
        is_right = zlib.crc32(tokens.tobytes()) < self._right * 2**32
        ids = " ".join(map(str, tokens.tolist()))
        return f"{ids} <answer>{self.answer}</answer>" if is_right else f"<answer>{ids}</answer>"


def settings(args: argparse.Namespace, drafts: int, generations: int, slots: int, streamed: bool):
    """Returns the configuration of a run with such a rollout."""
    from igrpo_jax import config

    tree = config.default()
    tree.prompts_per_step = args.prompts
    tree.algorithm.num_drafts = drafts
    tree.algorithm.num_generations = generations
    tree.model.dtype = args.dtype
    tree.rollout.max_completion_length = args.new_tokens
    tree.rollout.temperature = 1.0
    tree.rollout.slots = slots
    tree.rollout.streamed = streamed
    # No grading is late on a busy machine: other rewards would keep another draft.
    tree.rewards.format, tree.rewards.timeout = 0.0, 60.0
    return config.freeze(tree)


def make_engine(args: argparse.Namespace, cfg, mesh, slots: int, longest_prompt: int, steps_per_dispatch: int):
    """Returns an engine that never ends a completion early."""
    from igrpo_jax.sampling.configured import make_programs
    from igrpo_jax.sampling.engine import Engine

    programs = make_programs(
        cfg,
        mesh,
        (cfg.vocab_size,),  # an EOS that is never drawn
        slots=slots,
        longest_prompt=longest_prompt,
        max_completion=args.new_tokens,
        dtype=args.dtype,
        steps_per_dispatch=steps_per_dispatch,
    )
    return Engine(cfg, mesh, programs)


def make_stages(
    args: argparse.Namespace,
    drafts: int,
    generations: int,
    slots: int,
    streamed: bool = True,
    engine=None,
    renderer=TokenRenderer,
):
    """Returns a Rollout of so many drafts and trained completions a prompt; an `engine` of the same sizes is shared.

    `renderer` is TokenRenderer or a class derived from it. Programs are compiled when they are first needed, or all of
    them by `engine.compile()`.
    """
    import jax
    import numpy as np

    from igrpo_jax.learning.rollout import Rollout
    from igrpo_jax.models.config import from_hf
    from igrpo_jax.records import Prompt
    from igrpo_jax.rewards.verifier import Verifier
    from igrpo_jax.sampling.scheduler import Scheduler

    class Prescribed(Scheduler):
        """Completions have the lengths of a table [prompts, N + G], drafts before refinements."""

        table: np.ndarray

        def submit(self, request):
            first = drafts if request.stage == "refine" else 0
            limit = self.table[request.index, first : first + request.samples]
            super().submit(dataclasses.replace(request, limit=limit))

    class Stages:
        def __init__(self):
            self.config = settings(args, drafts, generations, slots, streamed)
            self.mesh = models.make_mesh()
            cfg = from_hf(models.raw_config(args), args.model or args.shape)
            self.longest_prompt = args.prompt_len + (args.new_tokens if drafts else 0)
            self.cfg = models.with_attention(cfg, args, self.mesh)
            steps_per_dispatch = self.config.rollout.steps_per_dispatch
            self.engine = engine or make_engine(
                args, self.cfg, self.mesh, slots, self.longest_prompt, steps_per_dispatch
            )
            self.scheduler = Prescribed(self.engine, jax.default_backend() != "cpu")
            rng = np.random.default_rng(0)
            tokens = rng.integers(17, cfg.vocab_size, (args.prompts, args.prompt_len), np.int32)
            self.prompts = [Prompt(str(i), i, str(i), renderer.answer, row) for i, row in enumerate(tokens)]
            self._verifier = Verifier(self.config.rewards)
            self._rollout = Rollout(self.config, renderer(args, self.prompts), self.scheduler, self._verifier)
            self.close = self._verifier.close

        def collect(self, params, lengths):
            """Returns the groups and metrics of one rollout with completions of `lengths` [prompts, N + G]."""
            self.scheduler.table = lengths
            with jax.set_mesh(self.mesh):
                return self._rollout.collect(params, 1, lambda redraw: self.prompts)

    return contextlib.closing(Stages())


def length_sets(args: argparse.Namespace) -> list:
    import numpy as np

    shape = (args.prompts, args.drafts + args.generations)
    rngs = map(np.random.default_rng, range(args.seeds))
    return [models.lognormal(rng, shape, args.mean_length, args.new_tokens) for rng in rngs]


def step_costs(stages, params, prompt) -> tuple[list[int], list[float]]:
    """Returns numbers of rows, and the seconds of a decode step of each: the best of three dispatches, 0 for none."""
    engine, costs = stages.engine, {0: 0.0}
    weights = engine.weights(params)
    for rows in engine.programs.window_lengths:
        filled = rollout.Filled(engine, weights, prompt, rows)
        costs[rows] = min(filled.step_seconds() for _ in range(3))
    return list(costs), list(costs.values())


def awaited(groups) -> list[int]:
    """Returns how many of each prompt's drafts Stage 2 waits for: those up to the first right one, or all."""
    return [1 + group.kept if group.drafts[group.kept].score.is_right else len(group.drafts) for group in groups]


def ideal(args: argparse.Namespace, sets: list, needed: list, slots: int, costs) -> tuple[float, float]:
    """Returns steps and seconds of iGRPO over GRPO's under perfect scheduling, means over the seeds.

    Args:
        needed: of each seed, what `awaited` returns.
    """
    import heapq

    import numpy as np

    def active(spans):
        running = np.zeros(max(end for _, end in spans), int)
        for start, end in spans:
            running[start:end] += 1
        return running

    ratios = []
    for lengths, counts in zip(sets, needed, strict=True):
        free, plain, staged = [0] * slots, [], []
        for n in lengths.ravel().tolist():
            start = heapq.heappop(free)
            plain.append((start, start + n - 1))
            heapq.heappush(free, start + n - 1)
        for drafts, refined, count in zip(lengths[:, : args.drafts], lengths[:, args.drafts :], counts, strict=True):
            start = drafts[:count].max() - 1
            staged += [(0, n - 1) for n in drafts] + [(start, start + n - 1) for n in refined]
        grpo, igrpo = active(plain), active(staged)
        ratios.append((len(igrpo) / len(grpo), np.interp(igrpo, *costs).sum() / np.interp(grpo, *costs).sum()))
    return tuple(round(float(x), 3) for x in np.mean(ratios, axis=0))


def main() -> None:
    args = parser(__doc__).parse_args()
    full = args.prompts * (args.drafts + args.generations)
    half = args.slots or full // 2
    both = args.drafts + args.generations
    with contextlib.ExitStack() as stack:
        stages_by_name = {}
        for name, slots in (("", half), ("full_", full)):
            make = lambda *how: stack.enter_context(make_stages(args, *how))
            stages_by_name[f"{name}grpo"] = make(0, both, slots)
            streamed = stages_by_name[f"{name}igrpo"] = make(args.drafts, args.generations, slots)
            stages_by_name[f"{name}igrpo_barrier"] = make(args.drafts, args.generations, slots, False, streamed.engine)
        for stages in stages_by_name.values():
            stages.engine.compile()
        params = models.random_params(stages_by_name["grpo"].cfg, stages_by_name["grpo"].mesh)
        seconds = {name: [[] for _ in range(args.seeds)] for name in stages_by_name}
        watched, needed = [], {}
        for again in range(args.steps + 1):  # the first time does not count
            for seed, lengths in enumerate(length_sets(args)):
                for name, stages in stages_by_name.items():
                    groups, metrics = stages.collect(params, lengths)
                    if again:
                        seconds[name][seed].append(metrics["perf/rollout_time"])
                    if again and name == "igrpo":
                        watched.append(metrics)
                        needed[seed] = awaited(groups)
        costs = step_costs(stages_by_name["grpo"], params, stages_by_name["grpo"].prompts[0].tokens)
    makespan, best_possible = ideal(args, length_sets(args), list(needed.values()), half, costs)
    total = {f"{name}_seconds": round(sum(map(models.median, each)), 4) for name, each in seconds.items()}
    best = min(total["grpo_seconds"], total["full_grpo_seconds"])
    mean = lambda name: round(sum(metrics[name] for metrics in watched) / len(watched), 4)
    figures = total | {
        "ratio": round(total["igrpo_seconds"] / total["grpo_seconds"], 3),
        "barrier_ratio": round(total["igrpo_barrier_seconds"] / total["grpo_seconds"], 3),
        "full_ratio": round(total["full_igrpo_seconds"] / total["full_grpo_seconds"], 3),
        "full_barrier_ratio": round(total["full_igrpo_barrier_seconds"] / total["full_grpo_seconds"], 3),
        "ratio_to_best_grpo": round(total["igrpo_seconds"] / best, 3),
        "makespan_ratio": makespan,
        "ideal_ratio": best_possible,
        "step_seconds_by_rows": {rows: round(cost, 5) for rows, cost in zip(*costs, strict=True)},
        "stage_overlap_frac": mean("perf/stage_overlap_frac"),
        "slot_utilization": mean("perf/slot_utilization"),
        "verify_wait_seconds": mean("perf/verify_wait_time"),
    }
    models.finish(vars(args) | figures | models.machine("numpy"))


if __name__ == "__main__":
    main()
