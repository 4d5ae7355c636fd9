"""The built-in task: sums of a few small numbers, worked out step by step, and the tokenizer of the built-in model.

A problem is "7+5-3+8". A solution is the tape of a pocket calculator, with each total before the next operator,
followed by the answer: "<think>7+5=12-3=9+8=17</think><answer>17</answer>". Everything is generated from a seed,
without a download. Train and test problems are disjoint.

The teacher of the warm start is right at most steps and wrong at some. For a model that imitates it, the right
answer is the most likely one with noise around it, and reinforcement learning can sharpen that.
"""

from dataclasses import dataclass

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from igrpo_jax.config import ArithmeticConfig
from igrpo_jax.data import drawing

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per printable ASCII character and newline, and one per tag of TAGS."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocab = {token: i for i, token in enumerate([PAD, END, USER, ASSISTANT, *TAGS, "<|unknown|>", *characters])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<|unknown|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token="<|unknown|>",
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    fast.add_tokens(list(TAGS))
    fast.chat_template = CHAT_TEMPLATE
    return fast


@dataclass(frozen=True)
class Problem:
    """A sum: the first number and, for each step, an operator and an operand."""

    first: int
    steps: tuple[tuple[str, int], ...]

    @property
    def question(self) -> str:
        return f"{self.first}" + "".join(f"{operator}{operand}" for operator, operand in self.steps)

    @property
    def answer(self) -> int:
        total = self.first
        for operator, operand in self.steps:
            total += operand if operator == "+" else -operand
        return total


def problems(settings: ArithmeticConfig, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Returns train and test problems, all different.

    Raises:
        InputError: there are too few different problems of this size.
    """
    rng = np.random.default_rng([seed, 0xA217])
    draw = lambda: _problem(settings, rng)
    return drawing.train_and_test(draw, settings, "arithmetic", "max_terms or max_operand")


def _problem(settings: ArithmeticConfig, rng: np.random.Generator) -> Problem:
    total = first = int(rng.integers(1, min(settings.max_operand, settings.max_total) + 1))
    steps = []
    for _ in range(int(rng.integers(settings.min_terms, settings.max_terms + 1)) - 1):
        operand = int(rng.integers(1, settings.max_operand + 1))
        choices = [
            sign for sign, value in (("+", total + operand), ("-", total - operand)) if 0 <= value <= settings.max_total
        ]
        if not choices:  # neither fits, but an operand of 1 always does
            operand, choices = 1, ["+" if total < settings.max_total else "-"]
        operator = choices[int(rng.integers(len(choices)))]
        total += operand if operator == "+" else -operand
        steps.append((operator, operand))
    return Problem(first, tuple(steps))


def solution(problem: Problem, error_rate: float, max_total: int, rng: np.random.Generator) -> str:
    """Returns a written solution.

    With probability `error_rate` the result of a step is a random total, from which later steps continue.
    """
    total, tape = problem.first, str(problem.first)
    for operator, operand in problem.steps:
        right = total + operand if operator == "+" else total - operand
        result = right
        if rng.random() < error_rate:
            result = int(rng.integers(0, max_total + 1))
        tape += f"{operator}{operand}={result}"
        total = result
    return f"<think>{tape}</think><answer>{total}</answer>"
