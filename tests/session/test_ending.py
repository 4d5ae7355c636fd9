"""A finished run that is started again: what is seen of it, and when there is something to do after all."""

import dataclasses
import io

import pytest

from igrpo_jax import config
from igrpo_jax.distributed.programs import compilations
from igrpo_jax.errors import InputError
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.workdir import prepare_workdir
from igrpo_jax.session import ending, overview
from igrpo_jax.session.progress import Progress

NAME = "eval/x/pass@1"


@pytest.fixture
def workdir(tmp_path):
    """The folder of a run of 5 steps that has ended."""
    prepare_workdir(tmp_path, settings())
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("{}\n" * 6)
    ending.write_finished(tmp_path, settings(), 5, 6, Progress({0: {NAME: 0.25}, 5: {NAME: 0.5}}))
    return tmp_path


def settings(**fields):
    return dataclasses.replace(config.Config(steps=5), **fields)


def ended(workdir, settings) -> tuple[bool, str]:
    """Whether the run has ended, and what was printed."""
    printed = io.StringIO()
    with Console(printed) as console:
        return ending.is_finished(workdir, settings, console), printed.getvalue()


def test_it_says_done_with_the_scores_and_compiles_nothing(workdir):
    with compilations() as compiled:
        done, printed = ended(workdir, settings())
    assert done and not compiled
    assert printed.startswith("Done\n") and "5, resumed after 5" in printed
    assert "0.250 before, 0.500 after (+0.250)" in printed and str(workdir / "metrics.jsonl") in printed
    assert "lost" not in printed


def test_what_does_not_matter_to_a_finished_run_may_change(workdir):
    changed = settings(rollout=config.RolloutConfig(slots=4), log=config.LogConfig(every=2))
    assert ended(workdir, changed)[0]


def test_scores_are_before_only_where_no_step_was_made(tmp_path):
    """A benchmark that a resume adds has no score of before, and its first one has no change."""
    scores = {0: {NAME: 0.25}, 2: {"eval/y/pass@1": 0.5}, 5: {NAME: 0.5, "eval/y/pass@1": 0.625, "eval/z/pass@1": 1.0}}
    table = dict(overview.after(tmp_path, Progress(scores), "", 2, 5))
    assert table[NAME] == "0.250 before, 0.500 after (+0.250)"
    assert table["eval/y/pass@1"] == "0.500 at step 2, 0.625 after (+0.125)"
    assert table["eval/z/pass@1"] == "1.000 at step 5"


@pytest.mark.parametrize(
    "more",
    [
        {"steps": 6},
        {"evaluation": config.EvaluationConfig(every=1, benchmarks=("arithmetic",))},
        {"checkpoint": config.CheckpointConfig(export=True)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_a_run_that_is_asked_for_more_goes_on(workdir, more):
    assert ended(workdir, settings(**more)) == (False, "")


def test_a_run_whose_export_is_gone_goes_on(workdir):
    asked = settings(checkpoint=config.CheckpointConfig(export=True))
    ending.write_finished(workdir, asked, 5, 6, Progress())
    assert not ended(workdir, asked)[0]
    (workdir / "export").mkdir()
    assert ended(workdir, asked)[0]


def test_a_run_whose_last_checkpoint_is_gone_goes_on(workdir):
    (workdir / "checkpoints" / "5").rename(workdir / "checkpoints" / "4")
    assert not ended(workdir, settings())[0]


def test_a_run_that_goes_on_is_no_longer_finished(workdir):
    ending.remove_finished(workdir)
    assert not ended(workdir, settings())[0]
    ending.remove_finished(workdir)


def test_other_settings_are_refused_by_name(workdir):
    with pytest.raises(InputError, match="seed: 0 -> 7"):
        ended(workdir, settings(seed=7))


def test_the_day_that_the_run_recorded_is_taken(tmp_path):
    dated = settings(data=config.DataConfig(template_date="2026-01-31"))
    prepare_workdir(tmp_path, dated)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    ending.write_finished(tmp_path, dated, 5, 0, Progress())
    assert ended(tmp_path, settings())[0]
    with pytest.raises(InputError, match="template_date"):
        ended(tmp_path, settings(data=config.DataConfig(template_date="2026-02-01")))


def test_a_row_that_was_lost_is_missed(workdir):
    (workdir / "metrics.jsonl").write_text("{}\n" * 5)
    done, printed = ended(workdir, settings())
    assert done and "has 5 rows up to step 5, 6 were written" in printed


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"step": 5'])
def test_a_note_that_is_no_note_is_ignored(workdir, text):
    (workdir / ending.FILE).write_text(text)
    assert not ended(workdir, settings())[0]
