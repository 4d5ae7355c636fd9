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

# What to lower where memory does not suffice, by the phase that needs it.
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
    limit: float  # seconds after which it is named next

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


_phases: list[_Phase] = []  # of the main thread, outermost first
_budgets: dict[str, float] = {}
_program = ""


@contextlib.contextmanager
def phase(name: str, detail: str = "") -> Iterator[None]:
    """Marks what the main thread does; within another phase it is a part of that one.

    A phase that fails stays the current one until the error is handled further out: `current` can name it.
    """
    depth, budget = len(_phases), _budgets.get(name, 0.0)
    _phases.append(_Phase(name, detail, budget, time.monotonic(), budget))
    yield
    del _phases[depth:]
    beat()  # of the phase around it


def beat() -> None:
    """Says that the innermost phase makes progress."""
    if _phases:
        here = _phases[-1]
        here.since, here.limit = time.monotonic(), here.budget


def running(program: str) -> None:
    """Says which compiled program was asked for last, by kind and shape."""
    global _program
    _program = program


def current() -> str:
    """Where the main thread is, as "rollout (step 12), dispatch, last program decode 64 256"; "" outside of all."""
    here = ", ".join(map(str, _phases))
    return f"{here}, last program {_program}" if here and _program else here


@contextlib.contextmanager
def watching(budgets: WatchdogConfig) -> Iterator[None]:
    """Looks at the phases from a thread while it lasts."""
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
    here = _phases[-1:]  # a copy: the main thread goes on
    if here and here[0].budget:
        waited = time.monotonic() - here[0].since
        if waited > here[0].limit:
            here[0].limit = 2 * waited
            _name(here[0], waited)


def _name(slow: _Phase, waited: float) -> None:
    logging.error(
        "watchdog: %s: no progress for %.3g s, more than config.watchdog.%s = %g; what each thread does:",
        *(current(), waited, slow.name, slow.budget),
    )
    try:
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
    except (AttributeError, OSError, ValueError):  # stderr is no file, as in a notebook
        logging.error("watchdog: no stacks, since stderr is no file here")
