"""A phase without progress is named once its budget is used up; one that makes progress is not."""

import re
import time

import pytest

from igrpo_jax import config
from igrpo_jax.distributed import watchdog

BUDGETS = config.WatchdogConfig(verifier=20, dispatch=20, checkpoint=0)


class Clock:
    """In place of the module `time`: it stands still but for `pass_`, after which the watchdog looks."""

    def __init__(self):
        self._now = 1000.0

    def monotonic(self):
        return self._now

    def pass_(self, seconds):
        self._now += seconds
        watchdog._look()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


def named(caplog) -> list[tuple[str, str]]:
    """(phases, budget's field) of each report."""
    return re.findall(r"watchdog: (.*): no progress for .* s, more than (config\.watchdog\.\w+)", caplog.text)


def test_a_hanging_phase_is_named_with_the_stacks(capfd, caplog):
    budgets = config.WatchdogConfig(verifier=0.05, dispatch=0, checkpoint=0)
    with watchdog.watching(budgets), watchdog.phase("rollout", "step 3"), watchdog.phase("verifier", "2 to come"):
        end = time.monotonic() + 60
        while not named(caplog) and time.monotonic() < end:
            time.sleep(0.01)
    assert ("rollout (step 3), verifier (2 to come)", "config.watchdog.verifier") in named(caplog)
    assert "test_a_hanging_phase_is_named_with_the_stacks" in capfd.readouterr().err  # the stack of the main thread


def test_it_is_named_again_when_the_wait_has_doubled(caplog, clock):
    with watchdog.watching(BUDGETS), watchdog.phase("dispatch"):
        for seconds, times in ((19, 0), (2, 1), (20, 1), (2, 2), (42, 2), (2, 3)):  # at 21, 43 and 87 s
            clock.pass_(seconds)
            assert named(caplog) == [("dispatch", "config.watchdog.dispatch")] * times
        watchdog.beat()
        clock.pass_(19)
        assert len(named(caplog)) == 3
        clock.pass_(2)
        assert len(named(caplog)) == 4


def test_progress_and_phases_without_a_budget_are_not(caplog, clock):
    with watchdog.watching(BUDGETS):
        with watchdog.phase("rollout"):
            for _ in range(8):
                with watchdog.phase("verifier"):
                    clock.pass_(15)
        with watchdog.phase("dispatch"):
            for _ in range(8):
                clock.pass_(15)
                watchdog.beat()
        for name in ("checkpoint", "update"):  # a budget of 0, and none
            with watchdog.phase(name):
                clock.pass_(1000)
    assert named(caplog) == []


def test_an_error_leaves_its_phase_to_be_named():
    with watchdog.watching(BUDGETS):
        with pytest.raises(KeyError), watchdog.phase("rollout", "step 1"), watchdog.phase("dispatch"):
            raise KeyError
        assert watchdog.current() == "rollout (step 1), dispatch"
    with watchdog.watching(BUDGETS):
        with watchdog.phase("evaluation"):
            with pytest.raises(KeyError), watchdog.phase("dispatch"):
                raise KeyError
            assert watchdog.current() == "evaluation, dispatch"
        assert watchdog.current() == ""  # the outer phase has ended
    with watchdog.watching(BUDGETS):  # of a later run in the same process
        assert watchdog.current() == ""
        with watchdog.phase("update"):
            assert watchdog.current() == "update"
        assert watchdog.current() == ""


def test_the_last_program_is_named_within_a_phase():
    with watchdog.watching(BUDGETS):
        watchdog.running("decode 64 x 256")
        assert watchdog.current() == ""
        with watchdog.phase("rollout", "step 1"):
            assert watchdog.current() == "rollout (step 1), last program decode 64 x 256"
    with watchdog.watching(BUDGETS), watchdog.phase("update"):  # of a later run
        assert watchdog.current() == "update"
