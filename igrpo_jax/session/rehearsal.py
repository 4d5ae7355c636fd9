"""What rewards say to made-up answers before a run, and whether the judge's budget is enough for a step."""

import math
from collections.abc import Sequence
from dataclasses import replace

from igrpo_jax.config import Config
from igrpo_jax.errors import InputError, one_line
from igrpo_jax.models.policy import Policy
from igrpo_jax.records import VERDICTS, Candidate, Prompt
from igrpo_jax.rewards import custom, judge, verdicts, verifier
from igrpo_jax.rewards.format import opens_thinking
from igrpo_jax.rewards.mathematics import golds

WRONG_ANSWER = "-987654321"  # what custom rewards see as a wrong answer
OTHER_ANSWER = "0"  # what is stated in place of the right answer where there is none


def rehearsed_rewards(
    config: Config, prompts: Sequence[Prompt], policy: Policy, opening: str, steps: int
) -> list[tuple[str, str]]:
    """Calls custom rewards with a right and a wrong answer to each of the first two problems, in each stage.

    Where the problems have no answers, both are made up. In Stage 2, the prompt shows the wrong one as the draft.

    They are called in a worker and within a time limit, as in the run. The limit is that of a batch of the run, because
    the first call imports the user's module.

    Args:
        opening: how the chat template begins a reply.
        steps: of the run, which functions may ask for.

    Returns:
        Name and values of each function, for the table that a run prints, with the first answer to the first problem
        where all of its values are alike; nothing without custom rewards.

    Raises:
        InputError: a function failed.
    """
    rewards = verifier.custom_rewards(config.rewards, config.data.answer_name)
    if not rewards:
        return []
    batches = []
    for prompt in prompts[:2]:
        draft = None
        if config.algorithm.num_drafts:
            batches.append(_batch(config, prompt, policy, opening, "draft", None))
            draft = batches[-1][1].text  # a wrong one
        if config.algorithm.second_stage == "verify":
            prompt = replace(prompt, answer=VERDICTS[False])
        batches.append(_batch(config, prompt, policy, opening, config.algorithm.second_stage, draft))
    timeout = config.rewards.timeout * max(1, config.algorithm.num_generations // 2)
    values = custom.rehearse(rewards, batches, timeout, config.rewards.memory_gib, steps)
    notes = []
    named = ("a right answer", "a wrong one") if prompts[0].answer else ("an answer", "another one")
    for reward, by_problem in zip(rewards, values, strict=True):
        texts = [f"{first:g} for {named[0]}, {second:g} for {named[1]}" for first, second in by_problem]
        text = "; ".join(dict.fromkeys(texts)).replace("nan", "None")
        if all(f"{first:g}" == f"{second:g}" for first, second in by_problem):
            text += f" ({'right' if prompts[0].answer else 'the first'} was {one_line(batches[0][0].text)!r})"
        notes.append((f"reward {reward.name}", text))
    return notes


def rehearsed_judge(config: Config, prompt: Prompt, opening: str) -> list[tuple[str, str]]:
    """Asks the judge about a right answer to `prompt`, or about any where it has none.

    It is not asked where config.rewards.judge.cache is there already, whose verdicts may be all that a run needs.

    Returns:
        Its score, for the table that a run prints; nothing where it was not asked.

    Raises:
        RunError: it gave no verdict.
    """
    settings = config.rewards.judge
    if not settings.weight or ((cache := verdicts.named(settings)) and cache.exists()):
        return []
    text = _reply(config, prompt, _stated(prompt), opening)
    score = judge.rehearse(settings, prompt.question, prompt.answer, opening + text)
    return [("reward judge", f"{score:g} for {'a right' if prompt.answer else 'a made-up'} answer")]


def checked_budget(config: Config) -> list[tuple[str, str]]:
    """Compares config.rewards.judge.budget with what a step asks the judge where all its completions differ.

    What is asked without redraws decides whether it is refused. Redraws are only possible, and how many there will be
    depends on the policy, so a budget that is too small for all of them is told.

    Returns:
        What some completions may lack, for the table that a run prints; nothing where none can lack a verdict.

    Raises:
        InputError: so many would lack one that the run would stop.
    """
    algorithm, rewards = config.algorithm, config.rewards
    budget, most = rewards.judge.budget, rewards.max_error_fraction
    refined = algorithm.num_drafts if algorithm.draft_selection == "refined" and algorithm.num_drafts else 1
    asked = config.prompts_per_step * (algorithm.num_drafts + refined * algorithm.num_generations)
    with_redraws = asked * (1 + algorithm.max_redraws)
    if not rewards.judge.weight or not budget or budget >= with_redraws:
        return []
    if (asked - budget) / asked > most:
        raise InputError(
            f"config.rewards.judge.budget = {budget}: a step asks for up to {asked} verdicts, and the run stops if "
            f"more than config.rewards.max_error_fraction = {most:g} of them are missing; set it to 0 for no limit, to "
            f"at least {asked - math.floor(asked * most)} ({with_redraws}, plus some for retries, gives all of them "
            f"one{', those of redraws too' if algorithm.max_redraws else ''}), or raise that fraction"
        )
    note = f"{budget} requests per step for up to {with_redraws} completions; the rest get no verdict"
    if (with_redraws - budget) / with_redraws > most:
        # A group without verdicts has no signal, so it is drawn again until its redraws are used up.
        note += f", and a step that asks for more than {math.floor(budget / (1 - most))}, by its redraws, stops the run"
    return [("judge", note)]


def _batch(
    config: Config, prompt: Prompt, policy: Policy, opening: str, stage: str, draft: str | None
) -> list[Candidate]:
    """Returns a right and a wrong reply to `prompt`, as reward functions see what is sampled in `stage`."""
    texts = [_reply(config, prompt, answer, opening) for answer in (_stated(prompt), WRONG_ANSWER)]
    return [
        Candidate(
            text=text,
            answer=prompt.answer,
            opening=opening,
            question=prompt.question,
            columns=prompt.columns,
            tokens=policy.encode_completion(text),
            sample_id=number,
            stage=stage,
            draft=draft,
        )
        for number, text in enumerate(texts)
    ]


def _stated(prompt: Prompt) -> str:
    """Returns the right answer to `prompt`, or one that is made up where it has none."""
    return golds.alternatives(prompt.answer)[0] if prompt.answer else OTHER_ANSWER


def _reply(config: Config, prompt: Prompt, answer: str, opening: str) -> str:
    """Returns a reply to `prompt` that states `answer` in the form that is asked for, without its `opening`.

    Where neither a box nor tags are asked for, it has a box in its thinking and then the tags. It has no thinking where
    the `opening` has closed that.
    """
    asked = " ".join([config.data.system_prompt, config.data.instruction, prompt.question])
    box, boxed, tagged = f"\\boxed{{{answer}}}", "\\boxed" in asked, "<answer>" in asked
    stated = box if boxed else answer
    thought = "Done." if boxed or tagged else f"It is {box}. Done."
    stated = stated if boxed and not tagged else f"<answer>{stated}</answer>"
    if opening and not opens_thinking(opening):
        return stated
    return f"{'' if opening else '<think>'}{thought}</think>{stated}"
