"""What a run remembers from step to step."""

from igrpo_jax.session.progress import Progress


def test_of_programs_of_a_kind_the_first_is_named_once():
    progress = Progress()
    assert progress.first_of_their_kind([]) == []
    compiled = ["decode 16 x 128", "apply", "decode 16 x 256"]
    assert sorted(progress.first_of_their_kind(compiled)) == ["apply", "decode 16 x 128"]
    assert progress.first_of_their_kind(["decode 8 x 128", "harvest"]) == ["harvest"]


def test_a_checkpoint_of_an_older_version_holds_more_and_is_read():
    progress = Progress({2: {"eval/x/pass@1": 0.5}}, skipped_optimizer_steps=1, skipped_in_a_row=1)
    older = {"step": 3, "seed": 0, "epoch": 0, "index": 24, "metrics_rows": 4, "data": "a hash"}
    assert Progress.from_meta(older | progress.meta(), 1) == progress


def test_a_checkpoint_says_which_evaluation_was_interrupted():
    """What is under way later is none of it."""
    progress = Progress.from_meta(Progress(evaluating={"step": 3}).meta(), 0)
    progress.evaluating = None
    assert progress.interrupted == 3 and Progress.from_meta(progress.meta(), 0).interrupted is None


def test_an_evaluation_whose_scores_are_in_the_rows_is_no_longer_interrupted():
    """A launch has made up for it, and called `on_step`, which may have raised."""
    progress = Progress.from_meta(Progress(evaluating={"step": 3}).meta(), 0)
    progress.recall({"2": {}})
    assert progress.interrupted == 3
    progress.recall({"3": {"eval/x/pass@1": 0.5}})
    assert progress.interrupted is None
