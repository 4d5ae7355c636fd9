"""What a run does between two updates."""

from types import SimpleNamespace

from igrpo_jax.config import Config
from igrpo_jax.session.progress import Progress
from igrpo_jax.session.run import Run


def test_rows_wait_for_the_checkpoint_that_counts_on_them():
    """The checkpointer alone decides whether one is due: a save that is not due uploads nothing in a bucket."""
    synced, asked = [], []
    run = SimpleNamespace(
        config=Config(),
        inputs=SimpleNamespace(total_steps=9, fingerprint="", reward_sources={"mine": "a hash"}),
        progress=Progress(),
        check_lock=lambda: None,
        writer=SimpleNamespace(sync=lambda: synced.append("rows"), rows=3),
        checkpointer=SimpleNamespace(save=lambda step, state, meta, **how: asked.append((step, meta, how))),
    )
    Run.save(run, 5, None)
    ((step, meta, how),) = asked
    assert meta["rewards"] == {"mine": "a hash"}
    assert step == 5 and synced == [] and how["before"] is run.writer.sync
