"""Do drafts teach what moves the plain prompt? Compares gradients, and tells how much refinements rely on drafts.

Three gradients of each problem, of the objective that config.algorithm names, for accuracy alone:

    plain      GRPO on the plain prompt, over all K plain answers
    refine     iGRPO on q', over the refinements of a right and of a wrong draft, weighted by how often each is kept
    credited   the right ones among the same refinements, with the same advantages, scored under the plain prompt as
               algorithm.refine_credit = "plain" trains on them: with p / (p + credit_gamma) for their tokens

The cosine is that of the expected gradients, not of the means over the measured problems, whose noise would pull it
towards 0: the gradients of two different problems have no common noise, so the mean of their products is an unbiased
estimate of the product of the expected gradients.

A gradient is as large as the model, so only a sketch of it is kept: each value is added, with a random sign, to one of
WIDTH sums (Charikar, Chen & Farach-Colton 2002). It keeps the product of two gradients up to about 1 / sqrt(WIDTH) =
0.4 % of the product of their lengths. Each problem has a file, and a second start computes what is missing. Reliance
needs no gradient, so several problems are scored together.

Legend: P problems.
"""

import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from igrpo_jax.config import AlgorithmConfig, Config
from igrpo_jax.distributed import sharding, watchdog
from igrpo_jax.learning import objectives
from igrpo_jax.learning.packing import Unit
from igrpo_jax.learning.programs import LearnerPrograms
from igrpo_jax.learning.rescoring import rescore_units
from igrpo_jax.models import decoder
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.files import writing
from igrpo_jax.probe.answers import Answered
from igrpo_jax.probe.estimates import FEW, UNKNOWN, Estimate, resamples
from igrpo_jax.records import Completion
from igrpo_jax.storage.addresses import make_folder, names
from igrpo_jax.storage.reading import read_bytes
from igrpo_jax.storage.writing import write_bytes

KINDS = ("plain", "refine", "credited")
DRAFTS = ("right", "wrong")
WIDTH = 65_521  # a prime, so that the rows of a weight do not line up in the sums
FOLDER = "gradients"


class Measured(NamedTuple):
    """What is kept of a problem."""

    sketches: dict[str, np.ndarray]  # by kind, [WIDTH] float32; 0 if the problem has no such gradient
    reliance: dict[str, np.ndarray]  # log pi(o|q') - log pi(o|q) of right refinements, by their draft, one of DRAFTS


class Gradients:
    """Computes gradients and reliance with the programs of an update.

    Args:
        params: what is trained, float32.
        frozen: what LoRA adapts, {} without LoRA.
    """

    def __init__(
        self, programs: LearnerPrograms, params: decoder.Params, frozen: decoder.Params, console: Console, folder: Path
    ):
        self._programs = programs
        self._params = params
        self._frozen = frozen
        self._console = console
        self._folder = folder / FOLDER
        self._present: set[str] = set()  # names of files that an earlier launch has written

    def measure(self, answered: Sequence[Answered], compared: int) -> list[Measured]:
        """Returns what is measured of each problem: reliance of all, and gradients of the first `compared`."""
        with writing(self._folder):
            make_folder(self._folder)
            self._present = names(self._folder)
        kinds = [KINDS if number < compared else () for number in range(len(answered))]
        kept = {number: self._kept(problem, kinds[number]) for number, problem in enumerate(answered)}
        results = {number: measured for number, measured in kept.items() if measured is not None}
        missing = [number for number in kept if number not in results]
        with (
            self._console.phase("gradients and reliance", len(answered)) as update,
            watchdog.phase("update", "gradients"),
        ):
            update(len(results))
            for numbers in self._together(missing, answered):
                reliance = self._reliance([answered[number] for number in numbers])
                for number, values in zip(numbers, reliance, strict=True):
                    results[number] = self._of(answered[number], kinds[number], values)
                    update(len(results))
        return [results[number] for number in range(len(answered))]

    def _kept(self, problem: Answered, kinds: Sequence[str]) -> Measured | None:
        """Returns what an earlier launch has measured, None where something is missing."""
        path = self._path(problem)
        if path.name not in self._present:
            return None
        with np.load(io.BytesIO(read_bytes(path))) as kept:
            if not all(kind in kept for kind in kinds):
                return None
            reliance = {draft: kept[f"reliance_{draft}"] for draft in DRAFTS}
            return Measured({kind: kept[kind] for kind in kinds}, reliance)

    def _path(self, problem: Answered) -> Path:
        return self._folder / f"{problem.prompt.index:06d}.npz"

    def _together(self, numbers: Sequence[int], answered: Sequence[Answered]) -> Iterator[list[int]]:
        """Yields the numbers of problems whose reliance fills a micro-batch, at least one."""
        chosen: list[int] = []
        left = 0
        for number in numbers:
            tokens = sum(unit.tokens for pair in reliance_units(answered[number]).values() for unit in pair)
            if chosen and tokens > left:
                yield chosen
                chosen = []
            if not chosen:
                shapes = self._programs.packer.shapes
                left = shapes.largest * shapes.shards
            chosen.append(number)
            left -= tokens
        if chosen:
            yield chosen

    def _of(self, problem: Answered, kinds: Sequence[str], reliance: dict[str, np.ndarray]) -> Measured:
        """Returns what is measured of a problem, after its file is written."""
        units = of_kinds(problem, self._programs.objective, self._programs.packer.shapes.max_completion)
        sketches = {kind: self._sketch(units[kind]) for kind in kinds}
        arrays = sketches | {f"reliance_{draft}": values for draft, values in reliance.items()}
        file, path = io.BytesIO(), self._path(problem)
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its own keywords have other types
        with writing(path):
            write_bytes(path, file.getvalue())
        return Measured(sketches, reliance)

    def _sketch(self, units: Sequence[Unit]) -> np.ndarray:
        """Returns the sketch of the gradient of `units`, 0 if there are none."""
        if not units:
            return np.zeros(WIDTH, np.float32)
        programs, packer = self._programs, self._programs.packer
        grads, sums = programs.zeros()
        for batch in packer.micro_batches(units):
            arrays = programs.to_devices(packer.fill(batch))
            grads, sums["refine"] = programs.accumulate(
                self._params, grads, sums["refine"], arrays, self._frozen, shape=(batch.size,)
            )
        return sketch(grads)

    def _reliance(self, problems: Sequence[Answered]) -> list[dict[str, np.ndarray]]:
        """Returns log pi(o | q') - log pi(o | q) of each right refinement of a right, or wrong, draft; in nats."""
        pairs = [reliance_units(problem) for problem in problems]
        units = [unit for of in pairs for pair in of.values() for unit in pair]
        batches = self._programs.packer.micro_batches(units)
        rescored = rescore_units(self._programs, self._params, self._frozen, batches, units)
        sums = iter([np.array([x.sum(dtype=np.float64) for x in logprobs]) for logprobs in rescored])
        none = dict.fromkeys(DRAFTS, np.zeros(0))
        return [none | {draft: next(sums) - next(sums) for draft in of} for of in pairs]


def reliance_units(problem: Answered) -> dict[str, tuple[Unit, Unit]]:
    """Returns by its draft, "right" or "wrong", the right refinements of it, after q' and after the plain prompt q."""
    units = {}
    for part in problem.refined:
        right = tuple(completion for completion in part.completions if completion.score.is_right)
        if right:
            q_prime, q = (
                Unit(context, right, np.zeros(len(right), np.float32))
                for context in (part.context, problem.prompt.tokens)
            )
            units["right" if part.is_right else "wrong"] = q_prime, q
    return units


def learner_config(config: Config) -> Config:
    """Returns the settings of a learner that computes the gradient of one problem, at the policy that sampled it.

    It is the gradient of only the objective, without the terms and the departures from the paper that are off by
    default, except algorithm.refine_credit, whose units are marked.
    """
    base = AlgorithmConfig()
    neutral = (
        *("beta", "entropy_coef", "num_iterations", "importance_sampling_cap", "train_drafts", "draft_when"),
        *("group", "improvement_bonus", "repeat_penalty", "alternate"),
    )
    algorithm = replace(config.algorithm, refine_credit="plain", **{name: getattr(base, name) for name in neutral})
    return replace(config, algorithm=algorithm, learner=replace(config.learner, minibatches=1), prompts_per_step=1)


def of_kinds(problem: Answered, objective: objectives.ResolvedObjective, longest: int) -> dict[str, list[Unit]]:
    """Returns the units of each kind of gradient, with advantages and weights; none where all rewards are equal.

    The weights of tokens are those of a step that has only this group, so that the mean over problems is that of a
    large step; where the objective counts tokens over the step (dapo), groups count the same here.

    Args:
        longest: the budget of a completion, in tokens.
    """
    unit = functools.partial(_unit, objective=objective, longest=longest)
    q, parts = problem.prompt.tokens, [(part, problem.weight(part)) for part in problem.refined]
    plain = unit(q, problem.plain)
    refined = [unit(part.context, part.completions, factor=weight) for part, weight in parts]
    credited = [unit(q, part.completions, factor=weight, is_credit=True) for part, weight in parts]
    every = {"plain": [plain], "refine": refined, "credited": credited}
    return {kind: [each for each in units if each is not None] for kind, units in every.items()}


def _unit(
    context: np.ndarray,
    completions: Sequence[Completion],
    objective: objectives.ResolvedObjective,
    longest: int,
    factor: float = 1.0,
    is_credit: bool = False,
) -> Unit | None:
    """Returns a group as a unit, None if it has no gradient.

    Args:
        factor: what its advantages are multiplied by.
        is_credit: the completions were sampled after another prompt: only right ones are kept, and they are `shaped`.
    """
    right = np.array([completion.score.is_right for completion in completions])
    # A divisor that is the same for all groups does not change the direction of the gradient.
    scale = "none" if objective.scale_rewards == "batch" else objective.scale_rewards
    advantage = factor * objectives.group_advantages(right[None].astype(np.float32), scale, objective.baseline)[0]
    lengths = np.array([len(completion.tokens) for completion in completions])
    finished = np.array([completion.finished for completion in completions])
    weight = objectives.row_weights(objective, lengths, finished, longest)
    chosen = right if is_credit else np.ones(len(right), bool)
    if not advantage[chosen].any():
        return None
    kept = tuple(replace(x, stage="refine") for x, is_kept in zip(completions, chosen, strict=True) if is_kept)
    no_bonus = np.zeros(len(kept), np.float32)
    return Unit(context, kept, advantage[chosen], is_credit, weight=weight[chosen], entropy_weight=no_bonus)


def sketch(grads: Mapping[str, jax.Array]) -> np.ndarray:
    """Returns WIDTH sums [WIDTH] float32 of the values of `grads`; each value enters one sum, with a random sign.

    The signs are the same in every call.
    """
    parts = [_sums(grads[path], jax.random.fold_in(jax.random.key(0), i)) for i, path in enumerate(sorted(grads))]
    return np.stack([sharding.to_host(part) for part in parts]).sum(axis=0, dtype=np.float32)


@jax.jit
def _sums(values: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the WIDTH sums of one array, [WIDTH] float32; it is compiled once for each shape."""
    rows = -(-values.size // WIDTH)
    bits = jax.random.bits(key, (rows * WIDTH,), jnp.uint8)
    padded = jnp.pad(values.astype(jnp.float32).ravel(), (0, rows * WIDTH - values.size))
    return jnp.sum(jnp.where(bits & 1, padded, -padded).reshape(rows, WIDTH), axis=0)


def cosine(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Returns the cosine of two expected gradients, estimated from the gradients of P problems, [P, number] each.

    It is unknown where fewer than FEW problems have one of the gradients, or where one of the means is lost in its
    noise. The interval is a bootstrap over problems; where a mean is lost in more than one of forty resamples, it is
    -1 to 1.
    """
    if min(np.count_nonzero(x.any(axis=1)) for x in (first, second)) < FEW:
        return UNKNOWN
    weights = resamples(len(first))
    products = [_products(x, y, weights) for x, y in ((first, second), (first, first), (second, second))]
    observed, of_first, of_second = (product[0] for product in products)
    if min(of_first, of_second) <= 0:
        return UNKNOWN
    value = float(np.clip(observed / np.sqrt(of_first * of_second), -1, 1))
    both, of_first, of_second = (product[1:] for product in products)
    is_known = (of_first > 0) & (of_second > 0)
    if np.mean(is_known) < 0.975:
        return Estimate(value, -1.0, 1.0)
    resampled = np.clip(both[is_known] / np.sqrt(of_first[is_known] * of_second[is_known]), -1, 1)
    low, high = np.quantile(resampled, (0.025, 0.975), method="inverted_cdf")
    return Estimate(value, float(low), float(high))


def _products(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns weighted sums of products of two different problems: equal weights, then rows of `weights`, [1 + B]."""
    gram = first.astype(np.float64) @ second.T.astype(np.float64)
    np.fill_diagonal(gram, 0.0)
    every = np.concatenate([np.full((1, len(gram)), 1 / len(gram)), weights])
    return np.sum((every @ gram) * every, axis=1)


def reliance(answered: Sequence[Answered], measured: Sequence[Measured]) -> dict[str, Estimate]:
    """Returns rho, the mean of log pi(o | q') - log pi(o | q) over right refinements, by the name "reliance"; and
    "reliance_right" and "reliance_wrong", those after right and after wrong drafts.

    A refinement of a draft counts as often as such a draft is kept. The interval is a bootstrap over problems.
    """
    weights, sums = resamples(len(answered)), {}
    for draft in DRAFTS:
        weight = np.array([np.mean(problem.kept == (draft == "right")) for problem in answered])
        values = [each.reliance[draft] for each in measured]
        sums[draft] = weight * [x.sum() for x in values], weight * [len(x) for x in values]
    figures = {}
    for name, drafts in (("", DRAFTS), ("_right", ("right",)), ("_wrong", ("wrong",))):
        total, count = (np.sum([sums[draft][i] for draft in drafts], axis=0) for i in (0, 1))
        figures[f"reliance{name}"] = _mean(total, count, weights)
    return figures


def _mean(total: np.ndarray, count: np.ndarray, weights: np.ndarray) -> Estimate:
    """Returns sum of `total` over that of `count`, with a bootstrap interval; unknown with fewer than FEW problems."""
    if np.count_nonzero(count) < FEW:
        return UNKNOWN
    resampled, counted = weights @ total, weights @ count
    low, high = np.quantile(resampled[counted > 0] / counted[counted > 0], (0.025, 0.975), method="inverted_cdf")
    return Estimate(float(total.sum() / count.sum()), float(low), float(high))
