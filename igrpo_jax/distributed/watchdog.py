"""Which phase a run is in, and a thread that names a phase which makes no progress.

    with watchdog.watching(config.watchdog), watchdog.phase("rollout", "step 12"):
        with watchdog.phase("verifier"):     # has a budget: config.watchdog.verifier
            ...
            watchdog.beat()                  # progress

Nothing is killed: a slow phase may be a large model. Its name and the stacks of all threads go to stderr when a
budget is used up, and again each time that the wait has doubled. `current` is also what an error names, and what a
process tells the others.
"""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from absl import logging

from igrpo_jax.config import WatchdogConfig

# The settings to lower where memory does not suffice, by the phase that needs it.
SMALLER = {
    "rollout": "rollout.slots, rollout.max_completion_length or refine.max_draft_length",
    "update": "learner.tokens_per_microbatch or learner.logprob_chunk, or set learner.remat to full",
    "evaluation": "rollout.slots or evaluation.max_completion_length",
    "start": "rollout.slots and learner.tokens_per_microbatch",
}

_LOOK = 1.0  # seconds between two looks, at most


@dataclass
class _Phase:
    name: str
    detail: str
    budget: float  # seconds without progress; 0 = no limit
    since: float  # of the last progress
    limit: float  # seconds without progress after which it is reported next

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


_phases: list[_Phase] = []  # of the main thread, outermost first
_budgets: dict[str, float] = {}
_program = ""


@contextlib.contextmanager
def phase(name: str, detail: str = "") -> Iterator[None]:
    """Marks what the main thread does within the block; phases may be nested.

    After an error the phase stays the current one until an outer phase ends, so that `current` can name it.
    """
    depth, budget = len(_phases), _budgets.get(name, 0.0)
    _phases.append(_Phase(name, detail, budget, time.monotonic(), budget))
    yield
    del _phases[depth:]
    beat()  # the phase around it has made progress


def beat() -> None:
    """Notes that the innermost phase makes progress."""
    if _phases:
        innermost = _phases[-1]
        innermost.since = time.monotonic()
        innermost.limit = innermost.budget


def running(program: str) -> None:
    """Notes which compiled program was asked for last, by kind and shape."""
    global _program
    _program = program


def current() -> str:
    """Returns where the main thread is: "rollout (step 12), dispatch, last program decode 64 x 256"; "" in no phase."""
    phases = ", ".join(map(str, _phases))
    return f"{phases}, last program {_program}" if phases and _program else phases


@contextlib.contextmanager
def watching(budgets: WatchdogConfig) -> Iterator[None]:
    """Looks at the phases from a separate thread while the block runs.

    Args:
        budgets: seconds without progress that each phase may take; 0 means no limit.
    """
    _phases.clear()
    running("")
    _budgets.update(vars(budgets))
    done = threading.Event()
    look = min([_LOOK, *(budget / 4 for budget in _budgets.values() if budget)])
    thread = threading.Thread(target=_watch, args=(done, look), name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _budgets.clear()


def _watch(done: threading.Event, look: float) -> None:
    while not done.wait(look):
        _look()


def _look() -> None:
    innermost = next(iter(_phases[-1:]), None)  # of a copy: the main thread continues
    if innermost is not None and innermost.budget:
        waited = time.monotonic() - innermost.since
        if waited > innermost.limit:
            innermost.limit = 2 * waited
            _report(innermost, waited)


def _report(slow: _Phase, waited: float) -> None:
    logging.error(
        "watchdog: %s: no progress for %.3g s, more than config.watchdog.%s = %g; what each thread does:",
        *(current(), waited, slow.name, slow.budget),
    )
    try:
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
    except (AttributeError, OSError, ValueError):  # stderr is not a file, as in a notebook
        logging.error("watchdog: no stacks, because stderr is not a file here")
