"""The benchmarks and training sets that are known by name: where they are, their columns, and how the paper uses them.

The prompts of all benchmarks have `data.instruction`, and `rewards/mathematics/grader` grades their answers. The paper
(arXiv 2602.09000) reports means of 64 samples on AIME and of 8 on the others, at temperature 0.6 and top-p 0.95 (the
defaults of `evaluation`), with up to 65,000 tokens.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hub:
    """A data set of the hub and its columns."""

    id: str
    prompt: str
    answer: str
    subset: str = ""  # the hub's "configuration"
    split: str = "train"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and how the paper evaluates it."""

    problems: int
    samples: int  # completions per problem in the paper
    hub: Hub
    files: tuple[str, ...] = ()  # other names that its file in evaluation.data_dir may have, without the ending


# fmt: off
BENCHMARKS = {
    "aime24": Benchmark(30, 64, Hub("HuggingFaceH4/aime_2024", "problem", "answer"), ("aime_2024",)),
    "aime25": Benchmark(30, 64, Hub("math-ai/aime25", "problem", "answer", split="test"), ("aime_2025",)),
    "math500": Benchmark(500, 8, Hub("HuggingFaceH4/MATH-500", "problem", "answer", split="test"), ("math-500",)),
    "amc23": Benchmark(40, 8, Hub("math-ai/amc23", "question", "answer", split="test")),
    "gsm8k": Benchmark(1319, 8, Hub("openai/gsm8k", "question", "answer", "main", "test"), ("gsm8k_test",)),
    "minerva": Benchmark(272, 8, Hub("math-ai/minervamath", "question", "answer", split="test"), ("minerva_math",)),
}

TRAINING_SETS = {
    "math": Hub("DigitalLearningGmbH/MATH-lighteval", "problem", "solution"),  # 7,500 problems
    "acereason-math": Hub("nvidia/AceReason-Math", "problem", "answer"),  # 49,600; the paper uses 9,400
    "openr1-math-220k": Hub("open-r1/OpenR1-Math-220k", "problem", "answer", "default"),  # 93,700
    "gsm8k": Hub("openai/gsm8k", "question", "answer", "main"),  # 7,473
}
# fmt: on


def samples_of(name: str) -> int:
    """Returns the paper's number of completions per problem; 1 for a benchmark that is not in the paper."""
    return BENCHMARKS[name].samples if name in BENCHMARKS else 1
