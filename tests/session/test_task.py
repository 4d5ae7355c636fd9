"""Which prompts a step has."""

from types import SimpleNamespace

from igrpo_jax import config
from igrpo_jax.session.task import Task


def test_alternating_steps_share_their_prompts():
    """Steps 1 and 2 have those that step 1 has alone, steps 3 and 4 those of step 2; so have their redraws."""

    def step_prompts(step, redraw=0, **algorithm):
        settings = config.Config(prompts_per_step=4, algorithm=config.AlgorithmConfig(**algorithm))
        return Task.step_prompts(SimpleNamespace(config=settings, prompts=list(range(24))), step, redraw)

    for redraw in (0, 1):
        shared = [step_prompts(step, redraw, alternate=True) for step in (1, 2, 3, 4)]
        alone = [step_prompts(step, redraw) for step in (1, 2)]
        assert shared == [alone[0], alone[0], alone[1], alone[1]] and alone[0] != alone[1]
