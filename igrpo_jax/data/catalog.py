"""The benchmarks and training sets that are known by name: where they are, their columns, and how often they are asked.

`data.instruction` stands before the questions of all benchmarks, and `rewards/mathematics/grader` grades the answers;
the answer to a multiple-choice question is a letter. The paper (arXiv 2602.09000) reports means of 64 samples on AIME
and of 8 on its other benchmarks, at temperature 0.6 and top-p 0.95 (the defaults of `evaluation`), with up to 65,000
tokens.

On the day in `Benchmark.checked`, ids and columns were last compared with what is published about the data sets; no
data set was downloaded for that. "card" means the data set's own card with its list of columns, "loaders" means public
programs that read it.

- aime24, aime25, math500, amc23, gsm8k, minerva: id, split and columns from loaders.
- gpqa_diamond: id, subsets, columns and the condition of access from its card; 198 problems from loaders.
- mmlu_pro: id, columns and the splits from its card; 12,032 problems from the card of a copy (an older card says
  12,187).
- aime26, brumo25: id, columns, split and number of problems from their cards.
- hmmt_feb25: id, split and 30 problems from the hub's pages; columns from loaders, its card was not seen.
- hmmt_nov25: id, split, columns and 30 problems from loaders; its card was not seen.
- olympiadbench: id and subset from the hub's pages, columns from the card of a copy; 674 problems, of which 93 have
  several answers, from loaders. The subset is the one with text, English, open-ended mathematics.
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
    gated: bool = False  # whether its conditions must be accepted on the hub first


@dataclass(frozen=True)
class Choices:
    """The columns that hold the choices of a multiple-choice question; `choices` puts them into the question.

    Either `options` names one column that lists all choices in the order of their letters, or `wrong` names the columns
    of the wrong choices, and the answer's column holds the text of the right one; `choices` then orders them.
    """

    options: str = ""
    wrong: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All names of columns."""
        return (self.options,) if self.options else self.wrong


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and how it is evaluated."""

    problems: int
    samples: int  # completions per problem: the paper's for its benchmarks, chosen by size for the others
    hub: Hub
    files: tuple[str, ...] = ()  # other names that its file in evaluation.data_dir may have, without the ending
    choices: Choices | None = None
    subject: str = ""  # column by which results are reported too
    checked: str = ""  # day on which id and columns were last compared with what is published


# fmt: off
BENCHMARKS = {
    "aime24": Benchmark(30, 64, Hub("HuggingFaceH4/aime_2024", "problem", "answer"), ("aime_2024",),
                        checked="2026-11-27"),
    "aime25": Benchmark(30, 64, Hub("math-ai/aime25", "problem", "answer", split="test"), ("aime_2025",),
                        checked="2026-11-27"),
    "aime26": Benchmark(30, 64, Hub("MathArena/aime_2026", "problem", "answer"), ("aime_2026",), checked="2026-11-27"),
    "hmmt_feb25": Benchmark(30, 64, Hub("MathArena/hmmt_feb_2025", "problem", "answer"), ("hmmt_feb_2025",),
                            checked="2026-11-27"),
    "hmmt_nov25": Benchmark(30, 64, Hub("MathArena/hmmt_nov_2025", "problem", "answer"), ("hmmt_nov_2025",),
                            checked="2026-11-27"),
    "brumo25": Benchmark(30, 64, Hub("MathArena/brumo_2025", "problem", "answer"), ("brumo_2025",),
                         checked="2026-11-27"),
    "math500": Benchmark(500, 8, Hub("HuggingFaceH4/MATH-500", "problem", "answer", split="test"), ("math-500",),
                         checked="2026-11-27"),
    "amc23": Benchmark(40, 8, Hub("math-ai/amc23", "question", "answer", split="test"), checked="2026-11-27"),
    "gsm8k": Benchmark(1319, 8, Hub("openai/gsm8k", "question", "answer", "main", "test"), ("gsm8k_test",),
                       checked="2026-11-27"),
    "minerva": Benchmark(272, 8, Hub("math-ai/minervamath", "question", "answer", split="test"), ("minerva_math",),
                         checked="2026-11-27"),
    "olympiadbench": Benchmark(674, 8, Hub("Hothan/OlympiadBench", "context+question", "final_answer",
                                           "OE_TO_maths_en_COMP"), ("OE_TO_maths_en_COMP",), checked="2026-11-27"),
    "gpqa_diamond": Benchmark(198, 8, Hub("Idavidrein/gpqa", "Question", "Correct Answer", "gpqa_diamond", gated=True),
                              choices=Choices(wrong=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")),
                              subject="High-level domain", checked="2026-11-27"),
    "mmlu_pro": Benchmark(12032, 1, Hub("TIGER-Lab/MMLU-Pro", "question", "answer", split="test"), ("mmlu-pro",),
                          choices=Choices(options="options"), subject="category", checked="2026-11-27"),
}

TRAINING_SETS = {
    "math": Hub("DigitalLearningGmbH/MATH-lighteval", "problem", "solution"),  # 7,500 problems
    "acereason-math": Hub("nvidia/AceReason-Math", "problem", "answer"),  # 49,600; the paper uses 9,400
    "openr1-math-220k": Hub("open-r1/OpenR1-Math-220k", "problem", "answer", "default"),  # 93,700
    "gsm8k": Hub("openai/gsm8k", "question", "answer", "main"),  # 7,473
}
# fmt: on


def samples_of(name: str) -> int:
    """Returns the number of completions per problem of a known benchmark; 1 for any other."""
    return BENCHMARKS[name].samples if name in BENCHMARKS else 1


def subject_of(name: str) -> str:
    """Returns the column by which the results of a benchmark are reported too; "" without one."""
    return BENCHMARKS[name].subject if name in BENCHMARKS else ""
