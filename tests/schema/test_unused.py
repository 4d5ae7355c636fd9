"""Settings that have no effect beside the others are named with what they need."""

import pytest

from igrpo_jax import config
from igrpo_jax.schema import fields, unused

# A setting that needs others, and their values with which it has no effect and with which it has one.
CASES = {
    "model.builtin.num_layers=2": {"model.path": ("some/model", "")},
    "model.lora.targets=q_proj": {"model.lora.rank": (0, 2)},
    "data.task=lookups": {"data.train": ("gsm8k", ""), "model.path": ("some/model", "some/model")},
    "data.arithmetic.max_terms=4": {"data.task": ("lookups", "arithmetic")},
    "data.lookups.items=3": {"evaluation.benchmarks": ((), ("lookups",))},
    "data.answer_column=solution": {"data.train": ("", "gsm8k"), "model.path": ("some/model", "some/model")},
    "warm_start.batch_size=8": {"warm_start.steps": (0, 10)},
    "algorithm.solved_fraction=0.5": {
        "algorithm.draft_when": ("always", "unsolved"),
        "algorithm.train_drafts": (True, True),
    },
    "algorithm.credit_completions=all": {"algorithm.refine_credit": ("context", "plain")},
    "algorithm.credit_gamma=0.3": {"algorithm.refine_credit": ("context", "plain")},
    "algorithm.filter_groups_metric=reward": {"algorithm.max_redraws": (0, 1)},
    "rewards.overlong_cache=8": {"rewards.overlong": (0.0, 1.0)},
    "rewards.custom_weight=0.5": {"rewards.custom": ("", "module:function")},
    "rewards.conversational=True": {"rewards.functions": ((), ("module:function",))},
    "rewards.judge.model=judge": {"rewards.judge.weight": (0.0, 1.0)},
    "learner.offload_reference=True": {"algorithm.beta": (0.0, 0.1)},
    "optimizer.b2=0.95": {"optimizer.name": ("adafactor", "muon")},
    "evaluation.drafts=2": {"evaluation.rounds": (0, 1)},
}


def with_values(**values):
    tree = config.default()
    tree.update_from_flattened_dict(values)
    return config.freeze(tree)


@pytest.mark.parametrize("case", CASES)
def test_a_setting_without_effect_is_named_with_what_it_needs(case):
    path, _, text = case.partition("=")
    default = fields.value_at(config.Config(), path)
    value = (text,) if isinstance(default, tuple) else text == "True" if default is False else text
    value = type(default)(value) if isinstance(default, int | float) else value
    idle, used = ({name: both[k] for name, both in CASES[case].items()} for k in (0, 1))
    (told,) = unused.unused(with_values(**idle, **{path: value}))
    assert told.startswith(f"{path}: needs ") and (next(iter(idle)) in told or path.startswith("data."))
    assert unused.unused(with_values(**used, **{path: value})) == []
    assert unused.unused(with_values(**idle)) == []


def test_every_need_has_a_case_and_names_fields():
    named = [path for need in unused.NEEDS for path in need.paths]
    for path in named:
        config.check_field(path)
    for need in unused.NEEDS:
        assert any(f"{case.partition('=')[0]}.".startswith(tuple(f"{path}." for path in need.paths)) for case in CASES)


def test_several_are_named_together():
    told = unused.unused(with_values(**{"rewards.judge.model": "judge", "rewards.judge.timeout": 3.0}))
    assert told == ["rewards.judge.model, rewards.judge.timeout: need rewards.judge.weight above 0"]
