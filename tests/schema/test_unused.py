"""Settings that have no effect beside the others are named with what they need."""

import pytest

from igrpo_jax import config
from igrpo_jax.schema import fields, unused

BUILTIN, FROM_FILES = {"model.path": "", "data.train": ""}, {"model.path": "a/model", "data.train": "gsm8k"}
# A setting, what is said that it needs, and the values of others with which it has no effect and with which it has one.
CASES = [
    ("model.builtin.num_layers=2", "model.path to be empty", FROM_FILES, BUILTIN),
    ("model.lora.targets=q_proj", "model.lora.rank above 0", {"model.lora.rank": 0}, {"model.lora.rank": 2}),
    ("data.task=lookups", "data.train to be empty", FROM_FILES, BUILTIN),
    ("data.arithmetic.max_terms=4", 'data.task = "arithmetic", or that benchmark', {"data.task": "lookups"}, BUILTIN),
    (
        "data.lookups.items=3",
        'data.task = "lookups", or that benchmark',
        {},
        {"evaluation.benchmarks": ("lookups",), "evaluation.every": 1},
    ),
    ("data.prompt_column=query", "data.train", BUILTIN, FROM_FILES),
    ("data.answer_column=solution", "data.train, or a reward of your own", BUILTIN, FROM_FILES),
    ("data.answer_column=solution", "data.train, or a reward of your own", {}, {"rewards.custom": "module:function"}),
    ("warm_start.batch_size=8", "model.path to be empty and warm_start.steps above 0", {}, {"warm_start.steps": 10}),
    (
        "algorithm.solved_fraction=0.5",
        'algorithm.draft_when = "unsolved"',
        {"algorithm.train_drafts": True},
        {"algorithm.train_drafts": True, "algorithm.draft_when": "unsolved"},
    ),
    (
        "algorithm.credit_completions=all",
        'algorithm.refine_credit = "plain"',
        {},
        {"algorithm.refine_credit": "plain"},
    ),
    ("algorithm.credit_gamma=0.3", 'algorithm.refine_credit = "plain"', {}, {"algorithm.refine_credit": "plain"}),
    (
        "algorithm.filter_groups_metric=reward",
        "algorithm.max_redraws above 0",
        {"algorithm.max_redraws": 0},
        {"algorithm.max_redraws": 1},
    ),
    ("rewards.overlong_cache=8", "rewards.overlong above 0", {}, {"rewards.overlong": 1.0}),
    ("rewards.custom_weight=0.5", "rewards.custom", {}, {"rewards.custom": "module:function"}),
    (
        "rewards.conversational=True",
        "rewards.custom or rewards.functions",
        {},
        {"rewards.functions": ("module:function",)},
    ),
    ("rewards.judge.model=judge", "rewards.judge.weight above 0", {}, {"rewards.judge.weight": 1.0}),
    ("learner.offload_reference=True", "algorithm.beta above 0", {}, {"algorithm.beta": 0.1}),
    ("optimizer.b2=0.95", "an optimizer.name other than adafactor", {"optimizer.name": "adafactor"}, {}),
    ("evaluation.drafts=2", "evaluation.rounds above 0", {}, {"evaluation.rounds": 1}),
    ("sft.draft_column=old", "sft.draft_fraction above 0", {}, {"sft.draft_fraction": 0.5}),
]
EVERY = (*unused.RUN, "sft")


def with_values(**values):
    tree = config.default()
    tree.update_from_flattened_dict(values)
    return config.freeze(tree)


@pytest.mark.parametrize(("setting", "need", "idle", "used"), CASES)
def test_a_setting_without_effect_is_named_with_what_it_needs(setting, need, idle, used):
    path, _, text = setting.partition("=")
    default = fields.value_at(config.Config(), path)
    value = (text,) if isinstance(default, tuple) else text == "True" if default is False else text
    value = type(default)(value) if isinstance(default, int | float) else value
    assert unused.unused(with_values(**idle, **{path: value}), EVERY) == [f"{path}: needs {need}"]
    assert unused.unused(with_values(**used, **{path: value}), EVERY) == []
    assert unused.unused(with_values(**idle), EVERY) == []


def test_every_need_has_a_case_and_names_fields():
    named = [path for need in unused.NEEDS for path in need.paths]
    for path in named:
        config.check_field(path)
    for need in unused.NEEDS:
        starts = tuple(f"{path}." for path in need.paths)
        assert any(f"{setting.partition('=')[0]}.".startswith(starts) for setting, *_ in CASES)


def test_sft_reads_few_sections():
    settings = with_values(**FROM_FILES, **{"evaluation.drafts": 2, "data.task": "lookups", "sft.draft_column": "old"})
    assert unused.unused(settings) == [
        "data.task: needs data.train to be empty",
        "evaluation.drafts: needs evaluation.rounds above 0",
    ]
    of_sft = ["data.task: needs data.train to be empty", "sft.draft_column: needs sft.draft_fraction above 0"]
    assert unused.unused(settings, unused.SFT_RUN) == of_sft


def test_several_are_named_together():
    told = unused.unused(with_values(**{"rewards.judge.model": "judge", "rewards.judge.timeout": 3.0}))
    assert told == ["rewards.judge.model, rewards.judge.timeout: need rewards.judge.weight above 0"]
