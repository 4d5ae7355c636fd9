"""A whole step, rollout, verifier and update: GRPO with N + G samples against iGRPO with N drafts and G refinements.

    python benchmarks/step.py
    python benchmarks/step.py --prompts 8 --fixed --new-tokens 64 --slots 64      # the work of TRL's step

Lengths as in two_stage.py (or all --new-tokens, with --fixed). The update trains all N + G completions of GRPO, and
the G refinements of iGRPO with q' run once for all of them; rewards are random, so that every group has a gradient.
GRPO and iGRPO take turns. The last line is one JSON object; seconds are sums over the seeds of the median over --steps:

    grpo_step_seconds, igrpo_step_seconds, ratio            whole steps, and iGRPO's over GRPO's
    grpo_rollout_seconds, grpo_update_seconds, igrpo_...    their parts
    grpo_peak_memory_bytes, igrpo_peak_memory_bytes         of the larger of rollout and update, training state
                                                            included, by the compiler's count
"""

import contextlib
import time

import models
import two_stage


class Step:
    """Rollout and learner of one method, with weights and moments of its own."""

    def __init__(self, args, stages):
        import jax

        from igrpo_jax.learning.learner import Learner
        from igrpo_jax.learning.programs import LearnerPrograms

        self._stages = stages
        sizes = {"longest_prompt": stages.longest_prompt, "total_steps": 1000}
        with jax.set_mesh(stages.mesh):
            programs = LearnerPrograms(stages.config, stages.cfg, stages.mesh, **sizes)
            self._learner = Learner(programs, frozen={}, reference=None)
        self.reset()

    def reset(self) -> None:
        """Goes back to the weights that it began with, and to a fresh optimizer."""
        import jax

        self.state = None  # two of them may not fit
        with jax.set_mesh(self._stages.mesh):
            self.state = self._learner.init(models.random_params(self._stages.cfg, self._stages.mesh))

    def compile(self) -> None:
        """Compiles all programs of the sampler, so that none is compiled in a step that is measured."""
        self._stages.engine.compile()

    def peak_bytes(self) -> int:
        from igrpo_jax.distributed.programs import tree_bytes

        moments = tree_bytes(self._learner.programs.state.opt_state)
        return max(self._learner.programs.predicted_bytes(), self._stages.engine.programs.predicted_bytes + moments)

    def run(self, lengths, seed: int) -> tuple[float, float]:
        """Makes one step and returns the seconds of its rollout and of its update; see `groups` and `metrics`."""
        import jax
        import numpy as np

        began = time.perf_counter()
        groups, sampling = self._stages.collect(self.state.params, lengths)
        sampled = time.perf_counter()
        advantages = np.random.default_rng(seed).standard_normal((len(groups), len(groups[0].completions)))
        with jax.set_mesh(self._stages.mesh):
            self.state, learned = self._learner.update(self.state, groups, advantages.astype(np.float32), 1)
            jax.block_until_ready(self.state.params)
        self.groups, self.metrics = groups, sampling | learned
        return sampled - began, time.perf_counter() - sampled


def main() -> None:
    parser = two_stage.parser(__doc__)
    parser.add_argument("--fixed", action="store_true", help="all completions are --new-tokens long")
    args = parser.parse_args()
    both = args.drafts + args.generations
    slots = args.slots or args.prompts * both // 2
    sets = two_stage.length_sets(args)
    if args.fixed:
        sets = [lengths * 0 + args.new_tokens for lengths in sets[:1]]
    with contextlib.ExitStack() as stack:
        steps = {
            name: Step(args, stack.enter_context(two_stage.make_stages(args, *sizes, slots)))
            for name, sizes in {"grpo": (0, both), "igrpo": (args.drafts, args.generations)}.items()
        }
        for step in steps.values():
            step.compile()
        seconds = {name: [[] for _ in sets] for name in steps}
        for again in range(args.steps + 1):  # the first time compiles
            for seed, lengths in enumerate(sets):
                for name, step in steps.items():
                    spent = step.run(lengths, seed)
                    if again:
                        seconds[name][seed].append(spent)
        figures = {f"{name}_peak_memory_bytes": step.peak_bytes() for name, step in steps.items()}
    for name, each in seconds.items():
        for part, pick in {"rollout": lambda x: x[0], "update": lambda x: x[1], "step": sum}.items():
            medians = (models.median([pick(spent) for spent in spents]) for spents in each)
            figures[f"{name}_{part}_seconds"] = round(sum(medians), 4)
    figures["ratio"] = round(figures["igrpo_step_seconds"] / figures["grpo_step_seconds"], 3)
    models.finish(vars(args) | figures | models.machine("optax"))


if __name__ == "__main__":
    main()
