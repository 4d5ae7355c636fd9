"""Settings: one declaration each, names that are right or corrected, values that a run can use."""

import copy
import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from igrpo_jax import config, loading
from igrpo_jax.data.catalog import TRAINING_SETS
from igrpo_jax.errors import InputError
from igrpo_jax.schema import fields

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def test_the_defaults_are_the_papers_and_valid():
    frozen = config.freeze(config.default())
    assert frozen == config.Config()
    assert (frozen.algorithm.num_drafts, frozen.algorithm.num_generations, frozen.prompts_per_step) == (4, 4, 32)
    optimizer = frozen.optimizer
    assert (optimizer.learning_rate, optimizer.min_lr_ratio, optimizer.warmup_ratio) == (1e-6, 0.1, 0.1)
    assert (frozen.rollout.temperature, frozen.algorithm.beta) == (0.7, 0.0)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_is_valid(path):
    tree = load(path)
    if path.stem == "smollm2_gsm8k_cpu":  # needs what its docstring says is to be given
        tree.model.path, tree.data.train = "model", "gsm8k"
    train = config.freeze(tree).data.train
    # Only a hub id or a known name is right: nobody else has the file that a path would name.
    assert train in ("", *TRAINING_SETS) or train.count("/") == 1


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("stesp", "steps"),
        ("algorithm.num_draft", "algorithm.num_drafts"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("learning_rate", "learning_rate"),
        ("rollout.temprature", "rollout.temperature"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("warm_start.lr", "warm_start.learning_rate"),
        ("sft.learning_rate", "optimizer.learning_rate"),
        ("batch_size", "prompts_per_step"),
        ("max_new_tokens", "rollout.max_completion_length"),
        ("evaluation.max_tokens", "evaluation.max_completion_length"),
        ("num_train_epochs", "epochs"),
        ("max_steps", "steps"),
        ("optimizer.warmup", "optimizer.warmup_ratio"),  # and none of another group
    ],
)
def test_a_misspelt_field_names_the_nearest(given, nearest):
    with pytest.raises(InputError, match=rf"config\.{given}: no such field; the nearest is config\.\S*{nearest}$"):
        config.check_field(given)


def rew(completions, **columns):
    return [0.0] * len(completions)


class Table:
    """Prints itself as data frames do."""

    def __repr__(self):
        return "   question  answer\n" * 100


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (
            "rewards.custom",
            rew,
            r"<function rew .*>: must be a text; write the function into a file and name it, as in",
        ),
        ("rewards.functions", (rew,), r".*: each entry must be a text; write the function into a file and name it"),
        ("rewards.functions", rew, r".*: must be a tuple, each entry a text; write the function into a file and name"),
        ("data.train", [{"question": "1"}] * 99, r".{80}\.\.\.: must be a text; write the rows to a \.jsonl file and"),
        (
            "data.train",
            Table(),
            r"question answer .{60,70}\.\.\.: must be a text; write the rows to a \.jsonl file and give",
        ),
        ("data.train", 3, "3: must be a text$"),
        ("data.task", rew, r"<function rew .*>: must be a text$"),
    ],
)
def test_objects_in_the_place_of_settings(path, value, says):
    with pytest.raises(InputError, match=rf"^config\.{path} = {says}") as error:
        loading.load_config(None, {path: value})
    assert "\n" not in str(error.value)


def test_paths_are_settings_as_they_are():
    made = loading.load_config(None, {"data.train": Path("a") / "b.jsonl", "model.path": "m"})
    assert (made.data.train, made.model.path) == ("a/b.jsonl", "m")


def test_aliases_are_no_fields_themselves():
    known = set(fields.field_paths(config.Config))
    for name, meant in config.Config.ALIASES.items():
        assert name not in known and all(path in known or path.startswith("--") for path in meant)
    with pytest.raises(InputError, match=r"^config\.output_dir: no such field; it is given as --workdir$"):
        config.check_field("output_dir")


def test_a_field_that_a_config_file_adds_is_refused():
    tree = config.default()
    tree.rollout.temprature = 0.5
    with pytest.raises(InputError, match=r"config\.rollout\.temprature: no such field; the nearest is .*temperature"):
        config.freeze(tree)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("steps", -1, "must be 0"),
        ("algorithm.num_generations", 1, "at least 2"),
        ("algorithm.loss_type", "ppo", "one of grpo, dr_grpo, dapo, gspo"),
        ("algorithm.draft_selection", "last", "one of best, random, worst, first"),
        ("algorithm.baseline", "group", "one of mean, leave_one_out"),
        ("algorithm.max_redraws", -1, "at least 0"),
        ("algorithm.filter_groups_metric", "acc", "not a reward in use; give one of reward, accuracy, format"),
        ("algorithm.entropy_coef", -0.1, "at least 0"),
        ("algorithm.delta", 1.0, "above 1"),
        ("algorithm.scale_rewards", "std", "one of None, group, batch, none"),
        ("algorithm.draft_dropout", 1.5, "within 0 and 1"),
        ("rollout.top_p", 0.0, "above 0"),
        ("rollout.slots", 0, "at least 1"),
        ("model.builtin.hidden_size", 0, "at least 1"),
        ("model.builtin.intermediate_size", -5, "at least 1"),
        ("warm_start.learning_rate", -1.0, "at least 0"),
        ("rewards.memory_gib", 0.5, "within 1 and 1048576"),
        ("rewards.memory_gib", 1e10, "within 1 and 1048576"),
        ("learner.minibatches", 3, "must divide the 128 trained completions"),
        ("learner.microbatch_sizes", (1.0, 0.0), "each must be within 0.01 and 1"),
        ("learner.microbatch_sizes", (0.5,), "add 1.0"),
        ("learner.microbatch_sizes", (), "add 1.0"),
        ("learner.microbatch_sizes", (0.5, 1.0), None),
        ("mesh.data", 0, "-1 .* or at least 1"),
        ("mesh.data", -1, "only one axis"),
        ("rewards.timeout", 0.0, "above 0"),
        ("refine.instruction", "no place for it", "{draft} exactly once"),
        ("warm_start.steps", 5, None),
        ("data.train", "x.jsonl", "needs a model"),
        ("evaluation.every", 10, "name at least one benchmark"),
        ("rewards.overlong", 0.5, "between 1 and rollout.max_completion_length = 4096"),
        ("rewards.custom", "my_rewards.py", "written as module:function"),
        ("rewards.judge.weight", 1.0, "name the model"),
        ("rewards.judge.concurrency", 0, "at least 1"),
        ("rewards.judge.timeout", 0.0, "above 0"),
        ("model.dtype", "float16", "one of bfloat16, float32"),
        ("seed", 2**31, "must be at least 0 and below 2\\*\\*31"),
        ("epochs", 0.0, "above 0 if steps = 0"),
        ("optimizer.b2", 1.0, "must be at least 0 and below 1"),
        ("optimizer.max_grad_norm", 0.0, "above 0 .a large number switches clipping off"),
        ("evaluation.pass_at", (1, 0), "each must be at least 1"),
        ("evaluation.samples", 0, "must be at least 1, or None"),
        ("log.trackers", ("wandb", "wandb"), "each must be tensorboard, wandb, trackio, mlflow or module:Class, once"),
        ("rollout.dispatches_ahead", 2, "must be one of None, 0, 1"),
        ("log.profile_steps", (0,), "each must be at least 1"),
    ],
)
def test_a_value_that_no_run_can_use_is_one_line_with_field_value_and_fix(path, value, says):
    tree = config.default()
    tree.update_from_flattened_dict({path: value})
    if says is None:
        config.freeze(tree)
        return
    with pytest.raises(InputError, match=says) as error:
        config.freeze(tree)
    assert str(error.value).startswith("config.") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 5, "epochs": 0.0}, None),
        ({"model.lora.rank": 2, "model.lora.targets": ()}, r"targets = \(\): name at least one weight"),
        ({"model.lora.targets": ()}, None),
        ({"data.arithmetic.min_terms": 4, "data.arithmetic.max_terms": 3}, "max_terms = 3: must be at least"),
        ({"data.arithmetic.min_terms": 4, "data.arithmetic.max_terms": 4}, None),
        ({"warm_start.steps": 5, "model.path": "m"}, "warm_start.steps = 5: the warm start is for the built-in model"),
        ({"warm_start.draft_error_rate": 0.0}, None),
        ({"sft.draft_fraction": 0.5}, "sft.draft_column = '': name the column of the drafts"),
        ({"sft.draft_fraction": 0.5, "sft.draft_column": "old"}, None),
        ({"sft.draft_fraction": 0.5, "sft.drafts_from": "run"}, None),
        ({"sft.draft_column": "old", "sft.drafts_from": "run"}, "drafts_from = 'run': drafts are read from one place"),
        ({"rewards.overlong": 1.0, "rewards.overlong_cache": 4097}, "overlong_cache = 4097: must be between 1 and"),
        ({"rewards.overlong": 1.0, "rewards.overlong_cache": 4096}, None),
        ({"rewards.overlong": 1.0, "rewards.overlong_cache": 1}, None),
        ({"rewards.overlong_cache": 4097}, None),
        ({"rewards.judge.weight": 1.0, "rewards.judge.model": "j", "algorithm.draft_metric": "judge"}, None),
        ({"algorithm.draft_metric": "judge"}, "draft_metric = 'judge': not a reward in use"),
        ({"rewards.accuracy": 0.0}, None),
        ({"optimizer.name": "adafactor", "optimizer.max_grad_norm": 1001.0}, "max_grad_norm = 1001.0: at most 1000"),
        ({"optimizer.name": "adafactor", "optimizer.max_grad_norm": 1000.0}, None),
        ({"optimizer.max_grad_norm": 1e9}, None),
        ({"algorithm.train_drafts": True, "algorithm.num_drafts": 1, "algorithm.group": "prompt"}, None),
        ({"algorithm.num_drafts": 1}, None),
        ({"mesh.tensor": -1}, "mesh.fsdp = -1: only one axis may be -1"),
        ({"mesh.tensor": -1, "mesh.fsdp": 2}, None),
    ],
)
def test_settings_that_do_not_go_together(changes, says):
    tree = config.default()
    tree.update_from_flattened_dict(changes)
    if says is None:
        config.freeze(tree)
        return
    with pytest.raises(InputError, match=says):
        config.freeze(tree)


UNSOLVED = {"draft_when": "unsolved", "train_drafts": True}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train_drafts": True, "num_drafts": 1}, "algorithm.train_drafts = True: one draft has no other"),
        ({"train_drafts": True, "draft_early_stop": True}, "algorithm.train_drafts = True: .* biased"),
        (
            {"train_drafts": True, "num_drafts": 5, "num_generations": 8},
            "minibatches = 64: must divide the 160",
        ),
        ({"train_drafts": True, "num_drafts": 0, "num_generations": 8}, None),  # the base algorithm: there are none
        ({"draft_early_stop": True, "custom": "my:reward"}, "algorithm.draft_early_stop = True: .* not known"),
        ({"draft_early_stop": True, "custom": ""}, None),
        (
            {"draft_early_stop": True, "draft_selection": "first"},
            "early_stop = True: .* algorithm.draft_selection to .best",
        ),
        (
            {"draft_early_stop": True, "draft_metric": "format"},
            "early_stop = True: .* algorithm.draft_metric to .reward",
        ),
        ({"draft_when": "unsolved"}, "draft_when = 'unsolved': .* set algorithm.train_drafts to True"),
        ({**UNSOLVED, "num_drafts": 3}, "draft_when = 'unsolved': .* to a multiple of algorithm.num_drafts"),
        ({**UNSOLVED, "max_redraws": 1}, "draft_when = 'unsolved': .* set algorithm.max_redraws to 0"),
        ({**UNSOLVED, "draft_dropout": 0.5}, "draft_when = 'unsolved': .* set algorithm.draft_dropout to 0"),
        ({**UNSOLVED, "alternate": True}, "draft_when = 'unsolved': .* set algorithm.alternate to False"),
        ({**UNSOLVED, "draft_selection": "refined"}, "draft_when = 'unsolved': .* to something other than refined"),
        ({**UNSOLVED, "accuracy": 0.0}, "draft_when = 'unsolved': .* set rewards.accuracy above 0"),
        ({**UNSOLVED, "group": "prompt", "num_drafts": 2, "improvement_bonus": 0.5}, None),
        ({**UNSOLVED, "num_drafts": 0, "group": "prompt"}, None),  # the base algorithm again
        ({"alternate": True, "num_drafts": 0}, "alternate = True: .* set algorithm.num_drafts to at least 1"),
        ({"alternate": True, "draft_selection": "random"}, None),
        ({"refine_credit": "plain"}, None),
        ({"refine_credit": "plain", "accuracy": 0.0}, "credit_completions = 'right': .* set rewards.accuracy above 0"),
        ({"refine_credit": "plain", "accuracy": 0.0, "credit_completions": "all"}, None),
        (
            {"refine_credit": "plain", "importance_sampling_cap": 2.0},
            "credit_gamma = 0.1: .* or algorithm.importance_sampling_cap to 0",
        ),
        ({"refine_credit": "plain", "importance_sampling_cap": 2.0, "credit_gamma": 0.0}, None),
        ({"importance_sampling_cap": 2.0}, None),
        ({"importance_sampling_cap": 2.0, "top_p": 0.9}, "sampling_cap = 2.0: .* set it to 0, or rollout.top_p"),
        ({"importance_sampling_cap": 2.0, "top_k": 9}, "importance_sampling_cap = 2.0: .* rollout.top_k to 0"),
        ({"top_p": 0.9, "top_k": 9}, None),
        ({"group": "prompt"}, "group = 'prompt': .* set algorithm.train_drafts to True"),
        (
            {"group": "prompt", "train_drafts": True, "max_redraws": 1},
            "group = 'prompt': .* set algorithm.max_redraws to 0",
        ),
        ({"num_generations": 1}, "num_generations = 1: must be at least 2"),
        ({"num_generations": 1, "group": "prompt", "train_drafts": True, "num_drafts": 0}, "must be at least 2"),
        ({"num_generations": 1, "group": "prompt", "train_drafts": True, "draft_selection": "refined"}, None),
        ({"num_generations": 1, "group": "prompt", "train_drafts": True, "draft_dropout": 0.5}, "must be at least 2"),
        ({"num_generations": 1, "group": "prompt", "train_drafts": True, "alternate": True}, "must be at least 2"),
        ({"verdict": True, "accuracy": 0.0}, "refine.instruction = .*: .* set rewards.accuracy above 0"),
        ({"verdict": True}, None),
        ({"improvement_bonus": 0.5}, "improvement_bonus = 0.5: .* set algorithm.group to .prompt"),
        ({"repeat_penalty": 0.5}, None),
        ({"repeat_penalty": 0.5, "accuracy": 0.0}, "repeat_penalty = 0.5: .* set rewards.accuracy above 0"),
    ],
)
def test_draft_controls_that_do_not_go_together(changes, says):
    tree = config.default()
    tree.learner.minibatches = 32 if "draft_when" in changes or changes.get("num_generations") == 1 else 64
    if changes.get("verdict"):
        tree.refine.instruction = "{draft} is {verdict}"
    tree.algorithm.num_generations = 4
    tree.rewards.accuracy = changes.get("accuracy", 1.0)
    tree.rewards.custom = changes.get("custom", "")
    tree.rollout.update({name: changes[name] for name in ("top_p", "top_k") if name in changes})
    others = ("custom", "accuracy", "verdict", "top_p", "top_k")
    tree.algorithm.update({name: value for name, value in changes.items() if name not in others})
    if says is None:
        config.freeze(tree)
        return
    with pytest.raises(InputError, match=says):
        config.freeze(tree)


VERIFYING = {
    "algorithm.second_stage": "verify",
    "algorithm.train_drafts": True,
    "algorithm.draft_selection": "balanced",
    "refine.instruction": "{draft} is right:",
}


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("algorithm.draft_selection", "random", None),
        ("algorithm.num_drafts", 0, "algorithm.second_stage = 'verify': .* set algorithm.num_drafts to at least 2"),
        ("algorithm.train_drafts", False, "train_drafts = False: .* set it to True"),
        ("algorithm.draft_selection", "best", "draft_selection = 'best': .* must be random or first or balanced"),
        ("algorithm.draft_selection", "refined", "draft_selection = 'refined': .* must be random or first or balanced"),
        ("algorithm.draft_metric", "accuracy", "draft_metric = 'accuracy': .* must be reward"),
        ("algorithm.draft_when", "unsolved", "draft_when = 'unsolved': .* must be always"),
        ("algorithm.draft_dropout", 0.5, "draft_dropout = 0.5: .* must be 0"),
        ("algorithm.alternate", True, "alternate = True: .* must be False"),
        ("algorithm.group", "prompt", "group = 'prompt': .* must be stage"),
        ("algorithm.refine_credit", "plain", "refine_credit = 'plain': .* must be context"),
        ("algorithm.repeat_penalty", 0.5, "repeat_penalty = 0.5: .* must be 0"),
        ("algorithm.max_redraws", 1, "max_redraws = 1: .* must be 0"),
        ("refine.instruction", config.RefineConfig().instruction, "refine.instruction = .*: asks for a better answer"),
        ("refine.instruction", "{draft} is {verdict}", "refine.instruction = .*: {verdict} gives the answer"),
        ("rewards.accuracy", 0.0, "rewards.accuracy = 0.0: .* verifications are graded"),
        ("rewards.judge.weight", 1.0, "judge.weight = 1.0: .* must be 0"),
        ("evaluation.rounds", 1, "evaluation.rounds = 1: .* must be 0"),
        ("sft.draft_fraction", 0.5, "sft.draft_fraction = 0.5: .* must be 0"),
        ("algorithm.second_stage", "refine", "draft_selection = 'balanced': is for verifications"),
    ],
)
def test_what_verifications_do_not_go_together_with(path, value, says):
    tree = config.default()
    tree.rewards.judge.model, tree.sft.draft_column = "judge", "drafts"
    tree.update_from_flattened_dict(VERIFYING | {path: value})
    if says is None:
        assert config.freeze(tree).algorithm.trained_stages == ("draft", "verify")
        return
    with pytest.raises(InputError, match=says):
        config.freeze(tree)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"custom": "a:f", "functions": ("a:g",)}, "rewards.custom = 'a:f': is the short form for one function"),
        (
            {"functions": ("a:f", "a:g"), "function_weights": (1.0,)},
            r"function_weights = \(1.0,\): give 2, one for each",
        ),
        ({"function_weights": (1.0,)}, "give 0"),
        ({"functions": ("a:f", "b:f")}, "two functions have the name f"),
        ({"functions": ("a:f", "a:f")}, "module:function, once; 'a:f' comes more than once"),
        ({"functions": ("a:f", "a.f")}, "written as module:function, once; 'a.f' is not"),
        ({"functions": ("a:f", "a:F.f")}, "written as module:function, once; 'a:F.f' is not"),
        ({"functions": ("a:f",), "function_weights": (0.0,), "accuracy": 0.0, "format": 0.0}, "there is no reward"),
    ],
)
def test_functions_that_do_not_go_together(changes, says):
    tree = config.default()
    tree.rewards.update(changes)
    with pytest.raises(InputError, match=says):
        config.freeze(tree)


def test_custom_rewards_by_name_and_weight():
    """Each may filter groups and choose drafts, also one of weight 0, which alone is no reward to train on."""
    tree = config.default()
    tree.rewards.functions, tree.rewards.function_weights = ("a.b:f", "c:g", "c:h"), (2.0, 0.0, -1.0)
    for metric in ("reward", "accuracy", "f", "g", "h"):
        tree.algorithm.filter_groups_metric = tree.algorithm.draft_metric = metric
        rewards = config.freeze(tree).rewards
    assert rewards.custom_weights == {"a.b:f": 2.0, "c:g": 0.0, "c:h": -1.0}
    assert rewards.custom_names == ("f", "g", "h") and rewards.names == ("accuracy", "format", "f", "g", "h")
    for field in ("filter_groups_metric", "draft_metric"):
        other = copy.deepcopy(tree)
        other.algorithm[field] = "i"
        with pytest.raises(InputError, match=rf"{field} = 'i': .*give one of reward, accuracy, format, f, g, h"):
            config.freeze(other)
    equal = config.RewardsConfig(functions=("a:f", "a:g"))
    assert equal.custom_weights == {"a:f": 1.0, "a:g": 1.0}
    assert config.RewardsConfig(custom="a:f", custom_weight=3.0).custom_weights == {"a:f": 3.0}


def test_what_follows_from_several_settings():
    made = config.Config()
    assert (made.trained_completions, made.draft_limit, made.filter_groups_metric) == (32 * 4, 4096, "accuracy")
    algorithm = config.AlgorithmConfig(train_drafts=True, num_drafts=3, num_iterations=2)
    learner, refine = config.LearnerConfig(minibatches=4), config.RefineConfig(max_draft_length=7)
    rewards = config.RewardsConfig(accuracy=0.0)
    made = config.Config(algorithm=algorithm, learner=learner, refine=refine, rewards=rewards)
    assert (made.trained_completions, made.draft_limit, made.filter_groups_metric) == (32 * (4 + 3), 7, "reward")
    assert made.optimizer_steps_per_update == 4 * 2


@pytest.mark.parametrize("key", ["sk-proj-abc123", "gsk_abc123", ""])
def test_a_key_in_the_place_of_its_variable_is_refused_and_not_repeated(key):
    tree = config.default()
    tree.rewards.judge.api_key_env = key
    with pytest.raises(InputError, match="must be the name of an environment variable") as error:
        config.freeze(tree)
    assert not key or key not in str(error.value)


def test_there_must_be_some_reward():
    tree = config.default()
    tree.rewards.accuracy = tree.rewards.format = 0.0
    with pytest.raises(InputError, match="no reward"):
        config.freeze(tree)
    tree.rewards.custom = "mine:reward"
    config.freeze(tree)
    tree.rewards.custom, tree.rewards.judge.weight, tree.rewards.judge.model = "", 1.0, "judge"
    config.freeze(tree)


def test_the_best_checkpoint_needs_evaluations():
    tree = config.default()
    tree.checkpoint.best_metric = "eval/math500/pass@1"
    with pytest.raises(InputError, match=r"config\.checkpoint\.best_metric = .*: .*set evaluation\.every"):
        config.freeze(tree)
    tree.evaluation.every, tree.evaluation.benchmarks = 1, ("math500",)
    config.freeze(tree)


def test_types_are_checked_and_whole_numbers_pass_as_floats():
    tree = config.default()
    tree.optimizer.learning_rate = 1
    assert config.freeze(tree).optimizer.learning_rate == 1.0
    tree = config.default()
    tree.evaluation.benchmarks = (1,)
    with pytest.raises(InputError, match=r"evaluation\.benchmarks = \(1,\): each entry must be a text"):
        config.freeze(tree)


def test_numbers_of_numpy_are_numbers():
    given = {
        "steps": np.int64(3),
        "optimizer.learning_rate": np.float32(0.5),
        "algorithm.alternate": np.bool_(True),
        "evaluation.pass_at": (np.int32(1), 2),
        "model.path": np.str_("owner/name"),
    }
    tree = config.default()
    tree.update_from_flattened_dict(given)
    tree.data.template_kwargs.depth = np.int64(2)
    made = config.freeze(tree)
    for path, value in given.items():
        assert fields.value_at(made, path) == value
        assert type(fields.value_at(made, path)).__module__ == "builtins"
    config.to_dict(made)  # which JSON can hold
    tree.steps = np.float64(3.5)
    with pytest.raises(InputError, match=r"config\.steps = 3\.5: must be a whole number"):
        config.freeze(tree)


def test_what_may_change_on_resume_is_no_difference():
    old = config.to_dict(config.Config())
    new = config.to_dict(
        dataclasses.replace(
            config.Config(), steps=9, seed=3, checkpoint=config.CheckpointConfig(every=7), log=config.LogConfig(2)
        )
    )
    assert config.differences(old, new) == ["seed: 0 -> 3"]
    assert config.differences({"steps": 1, "x": {"steps": 1}}, {"steps": 2, "x": {"steps": 2}}) == ["x.steps: 1 -> 2"]


def test_settings_of_an_older_version_have_the_defaults_of_newer_fields():
    old = config.to_dict(config.Config(seed=3))
    del old["data"]["template_kwargs"], old["data"]["template_date"], old["log"]
    assert config.with_defaults(old) == config.to_dict(config.Config(seed=3))
    assert config.with_defaults({"data": {"template_kwargs": {"x": 1}}})["data"]["template_kwargs"] == {"x": 1}


def test_what_may_change_on_resume_is_a_field():
    sections = {field.name for field in dataclasses.fields(config.Config)}
    assert set(config.MAY_CHANGE_ON_RESUME) <= {*fields.field_paths(config.Config), *sections}
