"""What the rows of a benchmark say: which drafts the rounds of refinement start from, and the measures of all samples.

Of the first `evaluation.drafts` samples of a prompt one is chosen as the draft of the next round, in two chains: by
majority vote of their answers (the first of the largest class), and, to show what choosing is worth, by an oracle that
knows the answer (the first right one).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from igrpo_jax.config import Config
from igrpo_jax.evaluation import measures
from igrpo_jax.evaluation.planning import Plan, reported_ks, samples_per_problem, subject_metric, subjects_of
from igrpo_jax.evaluation.results import Rows
from igrpo_jax.records import Prompt
from igrpo_jax.rewards.verifier import Verifier

CHAINS = ("vote", "oracle")  # ways to choose a draft


class Summaries:
    """Reads the rows of an evaluation; the verifier says which answers are equal."""

    def __init__(self, config: Config, plan: Plan, verifier: Verifier):
        self._config = config
        self._plan = plan
        self._verifier = verifier
        # Classes of equal answers, kept by the answers so that a repeated vote has the same result.
        self._known_classes: dict[tuple[str | None, ...], list[int]] = {}
        # Problem, path and answers of the votes by which this process samples.
        self._sampled_votes: set[tuple[Any, ...]] = set()

    def chosen(
        self, prompts: Sequence[Prompt], rows: Rows, chain: str, number: int, sampled: int = 0
    ) -> list[tuple[int, ...]]:
        """Returns, for each problem, the drafts that lead to its prompt of round `number` in the chain of this name.

        Args:
            sampled: the number of samples that these prompts have in `rows`; 0 where they are still to be sampled. The
                vote of the process that sampled a prompt counts: another may compare answers by their text alone, where
                the verifier takes too long, and so choose a draft that was never shown.
        """
        paths: list[tuple[int, ...]] = [()] * len(prompts)
        for _ in range(number):
            drafts = [
                rows.of(prompt.index, path)[: self._config.evaluation.drafts]
                for prompt, path in zip(prompts, paths, strict=True)
            ]
            right = [next((i for i, row in enumerate(some) if row["accuracy"] == 1), 0) for some in drafts]
            best = right
            if chain != "oracle":
                best = [measures.vote(classes) or 0 for classes in self._classes(drafts)]
                votes = [
                    (prompt.index, path, *(row["extracted"] for row in some))
                    for prompt, path, some in zip(prompts, paths, drafts, strict=True)
                ]
                if not sampled:
                    self._sampled_votes |= set(votes)
                else:
                    best = [
                        choice if vote in self._sampled_votes else _shown(rows, vote[0], path, choice, oracle, sampled)
                        for vote, path, choice, oracle in zip(votes, paths, best, right, strict=True)
                    ]
            paths = [(*path, draft) for path, draft in zip(paths, best, strict=True)]
        return paths

    def summary(self, name: str, rows: Rows) -> dict[str, Any]:
        """Returns `problems`, `samples`, and the measures `single_shot` and, for each round and chain, `rounds`."""
        prompts, count = self._plan.prompts[name], samples_per_problem(self._config, name)
        ks = reported_ks(self._config, name)
        plain = self._answers(prompts, [()] * len(prompts), rows, count)
        rounds = []
        for number in range(1, self._config.evaluation.rounds + 1):
            chains = {}
            for chain in CHAINS:
                paths = self.chosen(prompts, rows, chain, number, sampled=count)
                answers = self._answers(prompts, paths, rows, count)
                draft = [
                    rows.of(prompt.index, path[:-1])[path[-1]]["accuracy"] == 1
                    for prompt, path in zip(prompts, paths, strict=True)
                ]
                chains[chain] = measures.summary(answers, ks) | {"draft_accuracy": float(np.mean(draft))}
                chains[chain] |= measures.refined(np.array(draft), answers.correct)
            rounds.append(chains)
        whole = {"problems": len(prompts), "samples": count, "single_shot": measures.summary(plain, ks)}
        subjects = by_subject(subjects_of(name, prompts), plain.correct)
        return whole | {"rounds": rounds} | ({"subjects": subjects} if subjects else {})

    def _answers(
        self, prompts: Sequence[Prompt], paths: Sequence[tuple[int, ...]], rows: Rows, count: int
    ) -> measures.Answers:
        samples = [rows.of(prompt.index, path)[:count] for prompt, path in zip(prompts, paths, strict=True)]
        grid = lambda read: np.array([[read(row) for row in of_problem] for of_problem in samples])
        return measures.Answers(
            correct=grid(lambda row: row["accuracy"] == 1),
            lengths=grid(lambda row: row["token_count"]),
            finished=grid(lambda row: row["finished"]),
            parsed=grid(lambda row: row["extracted"] is not None),
            failed=grid(lambda row: row["status"] in ("timeout", "error")),
            classes=np.array(self._classes(samples)),
        )

    def _classes(self, samples: list[list[dict[str, Any]]]) -> list[list[int]]:
        """Returns the class number of the answer in each row, by problem; equal answers have the same number."""
        keys = [tuple(row["extracted"] for row in of_problem) for of_problem in samples]
        new = [key for key in dict.fromkeys(keys) if key not in self._known_classes]
        futures = {key: self._verifier.classes(key) for key in new}
        self._known_classes |= {key: future.result() for key, future in futures.items()}
        return [self._known_classes[key] for key in keys]


def _shown(rows: Rows, index: int, path: tuple[int, ...], vote: int, oracle: int, samples: int) -> int:
    """Returns which draft the vote chose where the next prompt was sampled: `vote`, unless only another was shown.

    Args:
        index: of the problem.
        path: the drafts before.
        oracle: the draft that the oracle chose. Where the vote chose another, that one was shown too.
        samples: of each prompt.
    """
    drafts = range(len(rows.of(index, path)))
    shown = [draft for draft in drafts if len(rows.of(index, (*path, draft))) >= samples]
    others = [draft for draft in shown if draft != oracle]
    return vote if vote in others else (others or shown or [vote])[0]


def by_subject(subjects: Sequence[str], correct: np.ndarray) -> dict[str, dict[str, float]]:
    """Returns `problems` and pass@1 with its interval of each subject, from correct [P, K] bool, by name."""
    rates, names = correct.mean(axis=1), np.array(subjects)
    result = {}
    for name in sorted(set(subjects)):
        own = rates[names == name]
        low, high = measures.interval(own)
        result[name] = {"problems": len(own), "pass@1": float(own.mean()), "pass@1_low": low, "pass@1_high": high}
    return result


def flat(summaries: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns the metrics of a run: `eval/NAME/pass@1` and so on, of rounds `eval/NAME/refine_1/…` for the vote and
    `eval/NAME/refine_1_oracle/…` for the oracle, and `eval/NAME/subject/SUBJECT/pass@1` of each subject."""
    metrics = {}
    for name, summary in summaries.items():
        metrics |= {f"eval/{name}/{measure}": value for measure, value in summary["single_shot"].items()}
        for number, chains in enumerate(summary["rounds"], 1):
            for chain, values in chains.items():
                stage = f"refine_{number}" + ("_oracle" if chain == "oracle" else "")
                metrics |= {f"eval/{name}/{stage}/{measure}": value for measure, value in values.items()}
        for subject, values in summary.get("subjects", {}).items():
            metrics[subject_metric(name, subject)] = values["pass@1"]
    return metrics
