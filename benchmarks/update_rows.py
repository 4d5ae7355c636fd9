"""The rows of benchmarks/update.py: the same random tokens, lengths and advantages for ours and for torch."""

import argparse
from dataclasses import dataclass

import models
import numpy as np


@dataclass(frozen=True)
class Rows:
    """Prompts of equal length, and completions of each."""

    contexts: np.ndarray  # [P, L] int32
    completions: list[list[np.ndarray]]  # [P][G], each [T] int32
    advantages: np.ndarray  # [P, G] float32

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each completion, [P, G]."""
        return np.array([[len(tokens) for tokens in of_prompt] for of_prompt in self.completions])

    @property
    def idle(self) -> np.ndarray:
        """Whether the advantages of a group are all zero, so that it has no gradient, [P] bool."""
        return ~self.advantages.any(axis=1)

    def groups(self) -> list:
        """Returns the rows as groups of the package."""
        from igrpo_jax.records import Completion, Group, Prompt, Score

        def completion(i, tokens):
            score = Score(0, {}, None, "ok")
            return Completion("refine", i, tokens, np.zeros(len(tokens), np.float32), True, score=score)

        groups = []
        for i, (context, of_prompt) in enumerate(zip(self.contexts, self.completions, strict=True)):
            completions = tuple(completion(j, tokens) for j, tokens in enumerate(of_prompt))
            groups.append(Group(Prompt(str(i), i, "", "", context), (), None, context, completions))
        return groups

    def rates(self, seconds: float) -> dict:
        """Returns how many tokens there are, and the rates of an update that takes `seconds`."""
        completion_tokens = int(self.lengths.sum())
        real_tokens = self.contexts.size + completion_tokens
        return {
            "tokens_per_second": round(completion_tokens / seconds),
            "real_tokens": real_tokens,
            "seconds_per_token": float(f"{seconds / real_tokens:.4g}"),
        }


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `make_rows` reads."""
    parser.add_argument("--groups", type=int, default=2, help="prompts")
    parser.add_argument("--group", type=int, default=8, help="completions of each")
    parser.add_argument("--prefix", type=int, default=64, help="tokens of each prompt, with its draft")
    parser.add_argument("--completion", type=int, default=64, help="tokens of each completion, or of the longest")
    parser.add_argument("--lengths", choices=("fixed", "lognormal"), default="fixed", help="of completions")
    parser.add_argument("--mean-length", type=int, default=64, help="with --lengths lognormal, before they are cut")
    parser.add_argument("--idle", type=_fraction, default=0.0, metavar="FRACTION", help="of groups without advantages")


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be within 0 and 1")
    return value


def make_rows(args: argparse.Namespace, vocab_size: int) -> Rows:
    """Returns the rows that `args` ask for. The same arguments give the same rows."""
    shape = (args.groups, args.group)
    lengths = np.full(shape, args.completion)
    if args.lengths == "lognormal":
        lengths = models.lognormal(np.random.default_rng(0), shape, args.mean_length, args.completion)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(17, vocab_size, shape, np.int32)
    contexts, completions = draw(args.groups, args.prefix), [[draw(length) for length in row] for row in lengths]
    advantages = rng.standard_normal(shape).astype(np.float32)
    advantages[rng.permutation(args.groups)[: round(args.idle * args.groups)]] = 0
    return Rows(contexts, completions, advantages)
