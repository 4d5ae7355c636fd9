"""Which prompts a step has, and whether there are enough."""

from types import SimpleNamespace

from model_files import error_of
from whole_runs import settings

from igrpo_jax import config
from igrpo_jax.session.run_inputs import RunInputs, check_profiled, check_prompts_per_step, open_inputs


def test_alternating_steps_share_their_prompts():
    """Steps 1 and 2 have those that step 1 has alone, steps 3 and 4 those of step 2; so have their redraws."""

    def step_prompts(step, redraw=0, **algorithm):
        settings = config.Config(prompts_per_step=4, algorithm=config.AlgorithmConfig(**algorithm))
        return RunInputs.step_prompts(SimpleNamespace(config=settings, prompts=list(range(24))), step, redraw)

    for redraw in (0, 1):
        shared = [step_prompts(step, redraw, alternate=True) for step in (1, 2, 3, 4)]
        alone = [step_prompts(step, redraw) for step in (1, 2)]
        assert shared == [alone[0], alone[0], alone[1], alone[1]] and alone[0] != alone[1]


def test_problems_that_are_too_long_for_a_step_of_all_are_counted():
    settings = config.Config(prompts_per_step=4, data=config.DataConfig(max_prompt_length=64))
    check_prompts_per_step(settings, 4, 2)
    message = error_of(check_prompts_per_step, settings, 2, 2)
    assert "there are 2 training problems left of 4 (config.data.max_prompt_length = 64 leaves out 2)" in message
    assert message.endswith("set it to 2 or less, or raise that limit, or give more problems")
    assert "there are 2 training problems, so" in error_of(check_prompts_per_step, settings, 2, 0)


def test_a_profile_of_a_step_that_never_comes_is_refused():
    check_profiled(config.LogConfig(profile_steps=(1, 5)), 5)
    check_profiled(config.LogConfig(), 5)
    message = error_of(open_inputs, settings(**{"log.profile_steps": (2, 6)}))
    assert message == "config.log.profile_steps = (2, 6): the run ends after step 5; name steps from 1 to 5"
