"""When gradings that failed stop a run: above the share of them in config.rewards.max_error_fraction."""

import math
import re
from collections.abc import Sequence

from igrpo_jax.errors import RunError
from igrpo_jax.records import STATUSES, Score

# Statuses that count towards max_error_fraction: no grading took place, or it gave no verdict.
FAILED = ("timeout", "error", "invalid")

# What Python, and the loader of its extensions, say where the address space of a process is used up. The stack of each
# thread takes 8 MiB of it.
_WANTS_MEMORY = re.compile(r"MemoryError|[Cc]annot allocate memory|failed to map segment|can't start new thread")


class VerifierError(RunError):
    """So many gradings failed that training on the rest would teach the wrong thing.

    Attributes:
        comes_again: whether the same command would end in the same way, because reward functions gave no value.
    """

    def __init__(self, message: str, comes_again: bool = False):
        super().__init__(message)
        self.comes_again = comes_again


def memory_fix(detail: str) -> str:
    """Returns the end of an error whose `detail` says that a worker was out of memory; "" for any other detail."""
    wants = _WANTS_MEMORY.search(detail)
    return "; if a reward needs more memory than config.rewards.memory_gib, raise that" if wants else ""


def too_many_failed(statuses: Sequence[str], max_error_fraction: float) -> bool:
    """Returns whether more than `max_error_fraction` of gradings timed out, failed or have no verdict."""
    failed = sum(status in FAILED for status in statuses)
    return bool(failed) and failed / len(statuses) > max_error_fraction


def check_errors(scores: Sequence[Score], max_error_fraction: float) -> None:
    """Stops a run in which too many gradings failed.

    Raises:
        VerifierError: more than `max_error_fraction` of `scores` timed out, failed or have no verdict.
    """
    if not too_many_failed([score.status for score in scores], max_error_fraction):
        return
    failed = [score for score in scores if score.status in FAILED]
    count = {status: sum(score.status == status for score in failed) for status in STATUSES}
    detail = next((score.detail for score in failed if score.detail), "")
    unjudged = [score for score in failed if score.status == "invalid" and math.isnan(score.rewards.get("judge", 0.0))]
    if unjudged:
        detail = f"the judge of config.rewards.judge (base_url, model, api_key_env) gave none: {unjudged[0].detail}"
    reason = f". The first: {detail}" if detail else ""
    reason += next(filter(None, (memory_fix(score.detail) for score in failed)), "")
    if count["timeout"]:
        reason += ". A larger config.rewards.timeout helps where the machine is overloaded"
    unvalued = count["invalid"] - len(unjudged)
    if comes_again := unvalued / len(scores) > max_error_fraction:
        reason = (
            f". Every reward function returned None for {unvalued} of them: return a number, or raise "
            "config.rewards.max_error_fraction"
        )
    raise VerifierError(
        f"of {len(scores)} gradings {count['timeout']} timed out, {count['error']} failed and {count['invalid']} have "
        f"no verdict: more than the share of {max_error_fraction} in config.rewards.max_error_fraction{reason}",
        comes_again,
    )
