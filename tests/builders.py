"""Finished completions, groups and settings for tests that need no model."""

import numpy as np

from igrpo_jax import config as config_lib
from igrpo_jax.records import Completion, Group, Prompt, Score


def completion(stage, sample_id, tokens, accuracy=None, form=0.0, finished=True, text=""):
    rewards = {"format": form} if accuracy is None else {"accuracy": accuracy, "format": form}
    score = Score(reward=sum(rewards.values()), rewards=rewards, extracted="7", status="ok")
    tokens = np.array(tokens, np.int32)
    return Completion(stage, sample_id, tokens, np.zeros(len(tokens), np.float32), finished, text, score)


def group(drafts, best, completions, question="3 + 4", answer="7", prompt_id="p0"):
    prompt = Prompt(prompt_id, 0, question, answer, np.array([1, 2], np.int32))
    return Group(prompt, tuple(drafts), best, prompt.tokens, tuple(completions))


def run_config(**overrides):
    """The default configuration without trackers, and with these fields by their dotted names."""
    tree = config_lib.default()
    tree.log.trackers = ()
    tree.update_from_flattened_dict(overrides)
    return config_lib.freeze(tree)
