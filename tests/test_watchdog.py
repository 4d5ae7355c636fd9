"""A phase without progress is named once its budget is used up; one that makes progress is not."""

import re
import time

import pytest

from igrpo_jax import config, watchdog

BUDGETS = config.Watchdog(verifier=0.2, dispatch=0.2, checkpoint=0)


def named(caplog) -> list[tuple[str, str]]:
    """(phases, budget's field) of each report."""
    return re.findall(r"watchdog: (.*): no progress for .* s, more than (config\.watchdog\.\w+)", caplog.text)


def test_a_hanging_phase_is_named_with_the_stacks(capfd, caplog):
    with watchdog.watching(BUDGETS), watchdog.phase("rollout", "step 3"), watchdog.phase("verifier", "2 to come"):
        time.sleep(0.5)
    assert ("rollout (step 3), verifier (2 to come)", "config.watchdog.verifier") in named(caplog)
    assert "test_a_hanging_phase_is_named_with_the_stacks" in capfd.readouterr().err  # the stack of the main thread


def test_it_is_named_again_when_the_wait_has_doubled(caplog):
    with watchdog.watching(BUDGETS), watchdog.phase("dispatch"):
        time.sleep(1.2)  # at 0.2, about 0.45, about 0.95
    assert named(caplog) in ([("dispatch", "config.watchdog.dispatch")] * n for n in (2, 3))


def test_progress_and_phases_without_a_budget_are_not(caplog):
    with watchdog.watching(BUDGETS):
        with watchdog.phase("rollout"):
            for _ in range(8):
                with watchdog.phase("verifier"):
                    time.sleep(0.05)
        with watchdog.phase("dispatch"):
            for _ in range(8):
                time.sleep(0.05)
                watchdog.beat()
        with watchdog.phase("checkpoint"):  # 0: never
            time.sleep(0.3)
        with watchdog.phase("update"):
            time.sleep(0.3)
    assert named(caplog) == []


def test_an_error_leaves_its_phase_to_be_named():
    with watchdog.watching(BUDGETS):
        with pytest.raises(KeyError), watchdog.phase("rollout", "step 1"), watchdog.phase("dispatch"):
            raise KeyError
        assert watchdog.current() == "rollout (step 1), dispatch"
    with watchdog.watching(BUDGETS):  # of a later run in the same process
        assert watchdog.current() == ""
        with watchdog.phase("update"):
            assert watchdog.current() == "update"
        assert watchdog.current() == ""


def test_the_last_program_is_named_within_a_phase():
    with watchdog.watching(BUDGETS):
        watchdog.running("decode 64 256")
        assert watchdog.current() == ""
        with watchdog.phase("rollout", "step 1"):
            assert watchdog.current() == "rollout (step 1), last program decode 64 256"
