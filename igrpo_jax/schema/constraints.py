"""The rules between the settings of a run; those about one field stand beside its type in `config`.

Each function yields the path of a field and what it must be, for each rule that a configuration breaks.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from igrpo_jax.schema import fields

if TYPE_CHECKING:
    from igrpo_jax.config import AlgorithmConfig, Config, RewardsConfig  # `config.freeze` calls `check`

# Squares of larger gradients, beside Adafactor's least mean of 1e-30, leave float32.
MAX_ADAFACTOR_NORM = 1e3


def check(config: "Config") -> None:
    """Checks the rules between fields, which name the field that is easiest to change and the fix.

    Raises:
        InputError: a rule is broken.
    """
    for problems in (_sources, _rewards, _drafts, _batch_and_mesh, _evaluation):
        for path, fix in problems(config):
            raise fields.refusal(path, fields.value_at(config, path), fix)


def _sources(config: "Config") -> Iterator[tuple[str, str]]:
    """Yields what is wrong with the length of the run, its model and its problems."""
    if config.steps == 0 and not config.epochs > 0:
        yield "epochs", "must be above 0 if steps = 0"
    if config.model.lora.rank and not config.model.lora.targets:
        yield "model.lora.targets", "name at least one weight to adapt"
    if config.data.arithmetic.max_terms < config.data.arithmetic.min_terms:
        yield "data.arithmetic.max_terms", "must be at least data.arithmetic.min_terms"
    if config.warm_start.refinements in ("checked", "critiqued") and config.data.task != "lookups":
        fix = "a step of a sum depends on those before it and cannot be checked alone; set data.task to lookups"
        yield "warm_start.refinements", fix
    if config.warm_start.refinements in ("verdicts", "critiqued") and not config.warm_start.draft_error_rate:
        yield "warm_start.draft_error_rate", "half of the drafts are wrong in such a warm start; set it above 0"
    if config.warm_start.refinements == "critiqued" and "{verdict}" not in config.refine.instruction:
        fix = "only {verdict} tells the model which drafts its teacher repeats; put it in refine.instruction"
        yield "warm_start.refinements", fix
    if config.warm_start.steps and config.model.path:
        yield "warm_start.steps", "the warm start is for the built-in model; set it to 0 with model.path"
    if config.sft.draft_fraction and not (config.sft.draft_column or config.sft.drafts_from):
        yield "sft.draft_column", "name the column of the drafts that sft.draft_fraction asks for, or sft.drafts_from"
    if config.sft.draft_column and config.sft.drafts_from:
        yield "sft.drafts_from", "drafts are read from one place; leave it out, or sft.draft_column"
    if config.data.train and not config.model.path:
        yield "model.path", "data.train needs a model and its tokenizer; the built-in model only knows its own task"


def _rewards(config: "Config") -> Iterator[tuple[str, str]]:
    """Yields what is wrong with the rewards."""
    rewards = config.rewards
    longest = config.rollout.max_completion_length
    yield from _custom_rewards(rewards)
    if not (rewards.largest > 0 or any(rewards.custom_weights.values())):
        fix = "with rewards.format, rewards.judge.weight, rewards.custom and rewards.functions also unused there is no "
        yield "rewards.accuracy", fix + "reward"
    if rewards.overlong and not 1 <= rewards.overlong_cache <= longest:
        fix = f"must be between 1 and rollout.max_completion_length = {longest} if rewards.overlong is used"
        yield "rewards.overlong_cache", fix
    if rewards.judge.weight and not rewards.judge.model:
        yield "rewards.judge.model", "name the model of the endpoint"
    metrics = ["reward", *rewards.names]
    for field_name, wanted in (
        ("filter_groups_metric", config.algorithm.filter_groups_metric),
        ("draft_metric", config.algorithm.draft_metric),
    ):
        if wanted not in (None, *metrics):
            yield f"algorithm.{field_name}", f"not a reward in use; give one of {', '.join(metrics)}"


def _custom_rewards(rewards: "RewardsConfig") -> Iterator[tuple[str, str]]:
    """Yields what is wrong with the rewards of the user's own."""
    if rewards.custom and rewards.functions:
        yield (
            "rewards.custom",
            "is the short form for one function; put it into rewards.functions too, and set it to ''",
        )
    if rewards.function_weights and len(rewards.function_weights) != len(rewards.functions):
        yield "rewards.function_weights", f"give {len(rewards.functions)}, one for each of rewards.functions, or none"
    names = [path.rpartition(":")[2] for path in rewards.functions]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        fix = f"two functions have the name {repeated[0]}, under which rewards are reported; rename one"
        yield "rewards.functions", fix


def _drafts(config: "Config") -> Iterator[tuple[str, str]]:
    """Yields what is wrong with the departures from the paper that concern drafts."""
    algorithm = config.algorithm
    alone = algorithm.group == "stage" or not algorithm.num_drafts or algorithm.alternate or algorithm.draft_dropout
    if algorithm.num_generations == 1 and alone:
        fix = "must be at least 2: a group's completions are compared; 1 is for drafts with algorithm.group = prompt"
        yield "algorithm.num_generations", fix
    if algorithm.train_drafts and algorithm.num_drafts == 1 and algorithm.group == "stage":
        fix = "one draft has no other to be compared with; set algorithm.num_drafts to at least 2"
        yield "algorithm.train_drafts", fix
    if algorithm.train_drafts and algorithm.draft_early_stop:
        fix = (
            "drafts that stop at a success are a biased sample of the policy's; set algorithm.draft_early_stop to False"
        )
        yield "algorithm.train_drafts", fix
    if algorithm.draft_early_stop and any(config.rewards.custom_weights.values()):
        yield "algorithm.draft_early_stop", "the largest possible reward is not known with a reward of your own"
    if algorithm.draft_early_stop and (algorithm.draft_selection, algorithm.draft_metric) != ("best", "reward"):
        fix = "the draft that ends drafting, which has the largest reward, is to be shown"
        choices = 'algorithm.draft_selection to "best" and algorithm.draft_metric to "reward"'
        yield "algorithm.draft_early_stop", f"{fix}; set {choices}"
    if algorithm.alternate and not algorithm.num_drafts:
        yield "algorithm.alternate", "no step has drafts; set algorithm.num_drafts to at least 1"
    if algorithm.num_drafts:  # without drafts all of this is the base algorithm
        yield from _draft_when(algorithm)
        yield from _credit(config)
    if algorithm.second_stage == "verify":
        yield from _verifications(config)
    elif algorithm.draft_selection == "balanced":
        fix = 'is for verifications; choose another, or set algorithm.second_stage to "verify"'
        yield "algorithm.draft_selection", fix


def _draft_when(algorithm: "AlgorithmConfig") -> Iterator[tuple[str, str]]:
    """Yields what does not go together with leaving out the refinements of solved prompts."""
    if algorithm.draft_when == "always":
        return
    path = "algorithm.draft_when"
    if not algorithm.train_drafts:
        yield path, "prompts with a right draft teach only through their drafts; set algorithm.train_drafts to True"
    if algorithm.num_generations % algorithm.num_drafts:
        fix = f"the {algorithm.num_generations} completions that a solved prompt saves are drafts of additional prompts"
        yield path, f"{fix}; set algorithm.num_generations to a multiple of algorithm.num_drafts"
    if algorithm.max_redraws:
        yield path, "has its own rule for additional prompts; set algorithm.max_redraws to 0"
    if algorithm.draft_dropout:
        yield path, "a prompt without drafts is neither solved nor unsolved; set algorithm.draft_dropout to 0"
    if algorithm.draft_selection == "refined":
        fix = "a position has G completions for refinements, not G for each draft"
        yield path, f"{fix}; set algorithm.draft_selection to something other than refined"
    if algorithm.alternate:
        yield path, "the steps without drafts have no solved prompts; set algorithm.alternate to False"


def _credit(config: "Config") -> Iterator[tuple[str, str]]:
    """Yields what is wrong with the rewards, baselines and weights of completions that depart from the paper."""
    algorithm = config.algorithm
    is_plain = algorithm.refine_credit == "plain"
    right = {
        "algorithm.draft_when": algorithm.draft_when == "unsolved",
        "algorithm.credit_completions": is_plain and algorithm.credit_completions == "right",
        "algorithm.repeat_penalty": algorithm.repeat_penalty > 0,
        "refine.instruction": "{verdict}" in config.refine.instruction,
    }
    for path in [path for path, is_used in right.items() if is_used and not config.rewards.accuracy]:
        yield path, "depends on which answers are right; set rewards.accuracy above 0"
    if is_plain and algorithm.credit_gamma and algorithm.importance_sampling_cap:
        fix = "refinements have two weights; set it to 0, or algorithm.importance_sampling_cap to 0"
        yield "algorithm.credit_gamma", fix
    if algorithm.group == "prompt" and not algorithm.train_drafts:
        yield "algorithm.group", "drafts share the baseline of the refinements; set algorithm.train_drafts to True"
    if algorithm.group == "prompt" and algorithm.max_redraws:
        yield "algorithm.group", "dynamic sampling looks only at the refinements; set algorithm.max_redraws to 0"
    if algorithm.improvement_bonus and algorithm.group == "stage":
        fix = "all refinements of a prompt have improved on one draft, so their baseline takes the bonus away again"
        yield "algorithm.improvement_bonus", f'{fix}; set algorithm.group to "prompt"'


def _verifications(config: "Config") -> Iterator[tuple[str, str]]:
    """Yields what does not go together with verifications instead of refinements."""
    algorithm, wording = config.algorithm, config.refine.instruction
    cause = 'with algorithm.second_stage = "verify"'
    if not algorithm.num_drafts:
        yield "algorithm.second_stage", "there is no solution to verify; set algorithm.num_drafts to at least 2"
    if not algorithm.train_drafts:
        yield "algorithm.train_drafts", f"{cause} the drafts are the solutions that are learned from; set it to True"
    if wording == type(config.refine)().instruction:
        fix = "ask whether {draft} is right, to be answered with 1 or 0"
        yield "refine.instruction", f"asks for a better answer; {cause} {fix}"
    if "{verdict}" in wording:
        yield "refine.instruction", f"{{verdict}} gives the answer to a verification away; leave it out {cause}"
    if not config.rewards.accuracy:
        fix = "verifications are graded against the verdict on their solution; set it above 0"
        yield "rewards.accuracy", f"{cause} {fix}"
    # For each field the values that it may have, and why no others.
    needs = [
        (
            "algorithm.draft_selection",
            ("random", "first", "balanced"),
            "a solution chosen by its reward, or all of them, would give its verdict away",
        ),
        ("algorithm.draft_metric", ("reward",), "the solution is not chosen by how good it is"),
        ("algorithm.draft_when", ("always",), "prompts with right and wrong drafts are verified, whatever it says"),
        ("algorithm.draft_dropout", (0,), "without a solution in the prompt there is nothing to verify"),
        ("algorithm.alternate", (False,), "without a solution in the prompt there is nothing to verify"),
        ("algorithm.group", ("stage",), "rewards of solutions and of verdicts on them have no common baseline"),
        ("algorithm.refine_credit", ("context",), "a verdict is not an answer to the plain prompt"),
        ("algorithm.repeat_penalty", (0,), "a verdict does not repeat the answer of its solution"),
        ("algorithm.max_redraws", (0,), "dynamic sampling looks only at Stage 2"),
        ("rewards.judge.weight", (0,), "a judge would take a verdict for an answer to the problem"),
        ("evaluation.rounds", (0,), "the policy learns to give verdicts on drafts, not to refine them"),
        ("sft.draft_fraction", (0,), "the solution of a problem is not a verdict on its draft"),
    ]
    for path, allowed, reason in needs:
        if fields.value_at(config, path) not in allowed:
            choices = " or ".join(map(str, allowed))
            yield path, f"{reason}; {cause} it must be {choices}"


def _batch_and_mesh(config: "Config") -> Iterator[tuple[str, str]]:
    """Yields what is wrong with how the completions of a step and the devices are divided."""
    algorithm = config.algorithm
    # Refinements and drafts are divided apart, so that every minibatch has its part of both.
    counts = [algorithm.num_generations] + [algorithm.num_drafts] * algorithm.train_drafts
    for completions in [config.prompts_per_step * count for count in counts]:
        if completions % config.learner.minibatches:
            yield "learner.minibatches", f"must divide the {completions} trained completions of a stage per step"
    if algorithm.importance_sampling_cap and (config.rollout.top_p < 1 or config.rollout.top_k):
        fix = "the sampler's log-probs are those before top-p and top-k, not of what it draws from; set it to 0, or "
        yield "algorithm.importance_sampling_cap", f"{fix}rollout.top_p to 1 and rollout.top_k to 0"
    if 1 not in config.learner.microbatch_sizes:
        yield "learner.microbatch_sizes", "add 1.0, the size that holds the longest context with a completion"
    if config.optimizer.name == "adafactor" and config.optimizer.max_grad_norm > MAX_ADAFACTOR_NORM:
        fix = (
            f"at most {MAX_ADAFACTOR_NORM:g} with adafactor, whose means of squared gradients could overflow otherwise"
        )
        yield "optimizer.max_grad_norm", fix
    if (config.mesh.data, config.mesh.fsdp, config.mesh.tensor).count(-1) > 1:
        yield "mesh.fsdp", "only one axis may be -1 (the rest of the devices)"


def _evaluation(config: "Config") -> Iterator[tuple[str, str]]:
    """Yields what is wrong with evaluations and what needs them."""
    if config.evaluation.every and not config.evaluation.benchmarks:
        yield "evaluation.benchmarks", "name at least one benchmark, or set evaluation.every to 0"
    if config.checkpoint.best_metric and not config.evaluation.every:
        yield "checkpoint.best_metric", "is a metric of evaluations; set evaluation.every"
