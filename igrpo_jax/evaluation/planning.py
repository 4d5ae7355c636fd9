"""Plans an evaluation before any device work: the prompts of each benchmark, their lengths and numbers of samples.

Also the names of the metrics that such an evaluation writes, so that a setting that names one can be checked early.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from igrpo_jax.config import Config
from igrpo_jax.data.catalog import samples_of, subject_of
from igrpo_jax.data.problems import Row, encoded_question
from igrpo_jax.data.prompts import Renderer
from igrpo_jax.errors import InputError
from igrpo_jax.evaluation import measures
from igrpo_jax.records import Prompt


@dataclass(frozen=True)
class Plan:
    """The prompts of an evaluation, and the lengths in tokens that a sampler needs for them."""

    prompts: dict[str, list[Prompt]]  # by benchmark
    max_positions: int  # tokens of the longest sequence that the model takes
    longest_prompt: int  # tokens of the longest prompt, with a draft in it where there are rounds
    max_completion: int  # tokens of the longest completion that any prompt leaves space for
    max_new_tokens: int  # tokens that a completion may have where the model has positions for them

    @property
    def length(self) -> int:
        """Most tokens of a prompt and its completion."""
        return min(self.longest_prompt + self.max_completion, self.max_positions)

    def limit(self, tokens: np.ndarray) -> int:
        """Returns the most tokens of a completion of this prompt [L]: up to the model's last position.

        It does not depend on the other prompts, so that a sample depends only on its own prompt.
        """
        return min(self.max_new_tokens, self.max_positions - len(tokens))

    def first(self, config: Config) -> tuple[list[int], int]:
        """Returns the token count of each prompt of the first benchmark, and the number of completions per prompt."""
        name = next(iter(self.prompts), None)
        if name is None:
            return [], 0
        return [len(prompt.tokens) for prompt in self.prompts[name]], samples_per_problem(config, name)

    @property
    def fingerprint(self) -> str:
        """A hash of all prompts and answers in their order."""
        facts = {
            name: [(prompt.tokens.tolist(), prompt.answer) for prompt in prompts]
            for name, prompts in self.prompts.items()
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def notes(self) -> list[str]:
        """What a user should know before the first answer."""
        shortest = self.max_positions - self.longest_prompt
        if shortest >= self.max_new_tokens:
            return []
        return [
            f"completions end at the model's context of {self.max_positions} tokens, {shortest} tokens after the "
            f"longest prompt, not at {self.max_new_tokens}"
        ]


def make_plan(config: Config, rows: dict[str, list[Row]], renderer: Renderer, max_positions: int) -> Plan:
    """Returns the plan with the prompts of all problems; none is left out.

    Args:
        rows: problems by benchmark.
        max_positions: tokens of the longest sequence that the model takes.

    Raises:
        InputError: a prompt leaves no position of the model for an answer, or cannot be encoded.
    """
    prompts = {
        name: [
            Prompt(row.id, row.index, row.question, row.answer, encoded_question(row, renderer.plain), row.columns)
            for row in benchmark
        ]
        for name, benchmark in rows.items()
    }
    lengths = [(len(prompt.tokens), name, prompt.id) for name, some in prompts.items() for prompt in some]
    max_new_tokens = config.evaluation.max_completion_length or config.rollout.max_completion_length
    if not lengths:
        return Plan(prompts, max_positions, 0, 0, max_new_tokens)
    longest, name, problem = max(lengths)
    if config.evaluation.rounds:
        longest += renderer.draft_overhead(max_new_tokens, [row.question for some in rows.values() for row in some])
    if longest >= max_positions:
        drafts = " with a draft (at most config.refine.max_draft_length)" if config.evaluation.rounds else ""
        raise InputError(
            f"problem {problem} of {name} has {longest} tokens{drafts}, and the model's context of {max_positions} "
            "leaves no room for an answer; use a model with a longer one, or leave it out"
        )
    return Plan(prompts, max_positions, longest, min(max_new_tokens, max_positions - min(lengths)[0]), max_new_tokens)


def samples_per_problem(config: Config, name: str) -> int:
    """Returns the number of completions per problem of a benchmark."""
    return config.evaluation.samples or samples_of(name)


def reported_ks(config: Config, name: str) -> list[int]:
    """Returns the k of pass@k and maj@k of a benchmark, none above its samples."""
    count = samples_per_problem(config, name)
    return [k for k in config.evaluation.pass_at or _doubled(count) if k <= count]


def left_out(config: Config, plan: Plan) -> list[str]:
    """Returns a line for each benchmark that has fewer samples than a k of config.evaluation.pass_at."""
    lines = []
    for name in plan.prompts:
        above = sorted(set(config.evaluation.pass_at) - set(reported_ks(config, name)))
        if above:
            wanted, count = ", ".join(f"pass@{k}" for k in above), samples_per_problem(config, name)
            fix = f"evaluation.samples = {above[-1]} gives all"
            lines.append(f"no {wanted} of {name}, which has {count} sample{'s' * (count > 1)} per problem; {fix}")
    return lines


def subjects_of(name: str, prompts: Sequence[Prompt]) -> list[str]:
    """Returns the subject of each problem of a benchmark; an empty list where any problem has none."""
    subjects = [str(prompt.columns.get(subject_of(name)) or "").strip() for prompt in prompts]
    return subjects if all(subjects) else []


def subject_metric(name: str, subject: str) -> str:
    """Returns the name of the metric of one subject of a benchmark."""
    return f"eval/{name}/subject/{subject.replace(' ', '_')}/pass@1"


def metric_names(config: Config, plan: Plan) -> list[str]:
    """Returns the names of all metrics that an evaluation of `plan` can write, as `summaries.flat` names them.

    `solved_length` and `unsolved_length` are written only where an evaluation has answers of that kind.
    """
    names = []
    for benchmark, prompts in plan.prompts.items():
        measured = measures.summary_names(reported_ks(config, benchmark))
        names += [f"eval/{benchmark}/{name}" for name in measured]
        for number in range(1, config.evaluation.rounds + 1):
            for stage in (f"refine_{number}", f"refine_{number}_oracle"):
                of_round = [*measured, "draft_accuracy", *measures.REFINED]
                names += [f"eval/{benchmark}/{stage}/{name}" for name in of_round]
        names += [subject_metric(benchmark, each) for each in sorted(set(subjects_of(benchmark, prompts)))]
    return names


def _doubled(samples: int) -> list[int]:
    """Returns 1, 2, 4, ... up to `samples`, which is always the last."""
    powers = [1 << i for i in range(samples.bit_length())]
    return powers if powers[-1] == samples else [*powers, samples]
