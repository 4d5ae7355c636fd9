"""The part `step`: whole steps of iGRPO (4 + 4) and GRPO (8), with the verifier on texts that look like solutions."""

import random
import statistics
import zlib
from typing import TYPE_CHECKING

import step
import two_stage
import verifier

from benchmarks.accelerator import sizes

if TYPE_CHECKING:
    from benchmarks.accelerator.part import Task

WRONG = ("\\frac{5}{12}", "7", "0.58", "\\sqrt{3}", "x = 12", "\\frac{7}{13}", "no solution")
SENTENCES = (
    "We bring both terms to the common denominator $%d \\cdot %d$ and add the numerators.",
    "Since $%d + %d > 0$, the inequality keeps its direction.",
    "Let $x = \\frac{%d}{%d}$; then $2x - 1$ is what we are looking for.",
    "Wait, $%d^2$ was counted twice, so we subtract $%d$ once.",
)
TOKENS = 24  # of a sentence, about


class SolutionRenderer(two_stage.TokenRenderer):
    """Gives each completion a text as long as its tokens would be, with an answer that is right half of the time.

    Random weights write noise, on which a verifier has nothing to do. The text follows from the tokens alone.
    """

    answer = "\\frac{7}{12}"

    def text(self, tokens) -> str:
        rng = random.Random(zlib.crc32(tokens.tobytes()))
        lines = [rng.choice(SENTENCES) % (rng.randint(2, 99), rng.randint(2, 99)) for _ in range(len(tokens) // TOKENS)]
        stated = verifier.rewritten(self.answer, rng) if rng.random() < 0.5 else rng.choice(WRONG)
        return "<think>\n" + "\n".join(lines) + f"\n</think>\n<answer>{stated}</answer>"


def run(task: "Task") -> None:
    """Measures both methods, one after the other, so that one training state is in memory at a time."""
    import jax

    shape, reduced = sizes.trainable(task.sizes.shape, task.memory, jax.device_count())
    args = sizes.stepped(task.sizes, shape)
    both = args.drafts + args.generations
    for case, drafts, generations in (("iGRPO (4 + 4)", args.drafts, args.generations), ("GRPO (8)", 0, both)):
        if not task.has(case):
            figures = _measured(args, drafts, generations)
            task.add(case, {"shape": shape, "dtype": args.dtype} | figures | ({"reduced": reduced} if reduced else {}))


def slots(args) -> int:
    """Returns half as many slots as completions of a step, and a multiple of the devices."""
    import jax

    devices = jax.device_count()
    return -(-args.prompts * (args.drafts + args.generations) // 2 // devices) * devices


def _measured(args, drafts: int, generations: int) -> dict:
    from igrpo_jax.distributed.programs import compilations

    (lengths,) = two_stage.length_sets(args)
    with two_stage.make_stages(args, drafts, generations, slots(args), renderer=SolutionRenderer) as stages:
        whole = step.Step(args, stages)
        whole.run(lengths, 0)  # compiles
        with compilations() as recompiled:
            seconds = [whole.run(lengths, 0) for _ in range(args.steps)]
    completions = [part for group in whole.groups for part in (*group.drafts, *group.completions)]
    tokens = sum(len(completion.tokens) for completion in completions)
    rollout, update = (statistics.median(times) for times in zip(*seconds, strict=True))
    return {
        "step_seconds": round(rollout + update, 4),
        "rollout_seconds": round(rollout, 4),
        "update_seconds": round(update, 4),
        "tokens_per_second": round(tokens / (rollout + update)),
        "verify_wait_seconds": round(whole.metrics["perf/verify_wait_time"], 4),
        "slot_utilization": round(whole.metrics["perf/slot_utilization"], 4),
        "solved": statistics.mean(completion.score.is_right for completion in completions),
        "recompiles": len(recompiled),
        "completions": len(completions),
    }
