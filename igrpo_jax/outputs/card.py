"""The model card of a run: base model, data, method, settings and measured results, as README.md of a repository.

Its contents are untrusted text: names of files, settings and problems may hold any character. The front matter is
written by huggingface_hub's YAML, settings are in a code block, and table cells are escaped. Paths of the model and of
the data that are not hub ids are shortened to their last part.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub

from igrpo_jax import __version__
from igrpo_jax.config import Config, to_dict
from igrpo_jax.data import readers
from igrpo_jax.data.catalog import BENCHMARKS, TRAINING_SETS
from igrpo_jax.outputs.evaluation_settings import changed, evaluation_folder, read_settings
from igrpo_jax.outputs.workdir import SFT
from igrpo_jax.storage.addresses import names

PAPER = "[arXiv 2602.09000](https://arxiv.org/abs/2602.09000)"
# Settings that say where a run kept things, not what it did.
_PLACES = {
    ("compilation_cache",),
    ("evaluation", "data_dir"),
    ("rewards", "judge", "base_url"),
    ("rewards", "judge", "cache"),
}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def settings(config: Config) -> dict[str, Any]:
    """Returns the settings of a run as they are published: without places, and with paths shortened."""
    published = _without_places(to_dict(config), ())
    for section, name in (("model", "path"), ("data", "train")):
        published[section][name] = _short(published[section][name])
    return published


def model_card(config: Config, workdir: Path, step: int, name: str, adapter: bool) -> str:
    """Returns the card of the policy after `step` of the run in `workdir`.

    Args:
        name: that of the repository, "owner/name".
        adapter: whether the repository holds only LoRA's adapters.
    """
    measured = {at: _measured(workdir, at) for at in dict.fromkeys((0, step))}
    other = changed(*(read_settings(evaluation_folder(workdir, at)) for at in (0, step)))
    data = huggingface_hub.ModelCardData(
        model_name=name.partition("/")[2],
        base_model=_hub_id(config.model.path),
        base_model_relation="adapter" if adapter else "finetune" if _hub_id(config.model.path) else None,
        datasets=[dataset] if (dataset := _dataset(config)) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["igrpo_jax", *_tags(config, workdir)],
        eval_results=[_result(benchmark, values) for benchmark, values in measured[step].items()] or None,
    )
    sections = [
        f"# {html.escape(name.partition('/')[2])}",
        _about(config, step),
        f"## Data\n\n{_data(config)}",
        f"## Method\n\n{_method(config, workdir)}",
        f"## Measured results\n\n{_results(measured, step, other)}",
        "## Settings\n\nThose that differ from the defaults of the library's version:\n\n" + _block(_changed(config)),
        "## Licence\n\nThis card states none: the licences of the base model and of the data apply.",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _about(config: Config, step: int) -> str:
    base = _short(config.model.path)
    what = f"of {_code(base)}" if base else "of the library's built-in model"
    how = f"LoRA of rank {config.model.lora.rank}" if config.model.lora.rank else "all weights"
    return f"The policy after step {step} of a run that trained {how} {what}, by igrpo_jax {__version__}."


def _data(config: Config) -> str:
    if not config.data.train:
        return f"The library's built-in task, {_code(config.data.task)}."
    columns = [config.data.prompt_column, config.data.answer_column]
    named = f", columns {' and '.join(map(_code, columns))}" if all(columns) else ""
    return f"Problems of {_code(_short(config.data.train))}, split {_code(config.data.split)}{named}."


def _is_sft(workdir: Path) -> bool:
    return SFT in names(workdir)


def _tags(config: Config, workdir: Path) -> list[str]:
    if _is_sft(workdir):
        return ["sft"]
    is_igrpo = config.algorithm.num_drafts > 0 and config.algorithm.second_stage == "refine"
    return ["reinforcement-learning", "grpo", *["igrpo"] * is_igrpo]


def _method(config: Config, workdir: Path) -> str:
    algorithm = config.algorithm
    if _is_sft(workdir):
        drafts = f"; {config.sft.draft_fraction:.0%} of them with a draft in the prompt" * bool(
            config.sft.draft_fraction
        )
        return f"Supervised fine-tuning: the solutions are imitated, {config.prompts_per_step} examples a step{drafts}."
    loss, count = algorithm.loss_type.upper().replace("DR_GRPO", "Dr. GRPO"), config.prompts_per_step
    if algorithm.second_stage == "verify":
        return (
            f"{loss} with self-verification: for each of {count} prompts a step, {algorithm.num_drafts} solutions, and "
            f"{algorithm.num_generations} verifications of one of them ({algorithm.draft_selection}) where some are "
            "right and some wrong; both are trained."
        )
    if algorithm.num_drafts:
        return (
            f"iGRPO ({PAPER}): for each of {count} prompts a step, {algorithm.num_drafts} drafts, and "
            f"{algorithm.num_generations} refinements of the draft that is chosen ({algorithm.draft_selection}); the "
            f"objective of {loss} on the refinements."
        )
    return f"{loss}: {algorithm.num_generations} completions for each of {count} prompts a step, without drafts."


def _results(measured: dict[int, dict[str, Any]], step: int, other: dict[str, tuple[str, str]]) -> str:
    """Returns the table of the evaluations that the run itself made, before the first step and after `step`.

    Args:
        other: the settings by which these two differ (`changed`); the first is then left out, as it is for a benchmark
            that had another number of problems.
    """
    if not measured[step]:
        return f"The run made no evaluation after step {step}."
    lines = ["Single shot, in percent, with 95 % intervals over the problems.", ""]
    lines += ["| benchmark | problems | samples | pass@1 before | pass@1 after |", "|---|---|---|---|---|"]
    for name, values in measured[step].items():
        first = measured[0].get(name) if step else None
        is_comparable = first is not None and not other and first["problems"] == values["problems"]
        before = _interval(first) if is_comparable else "not comparable" if first else "not measured"
        counts = f"{int(values['problems'])} | {int(values['samples'])}"
        lines.append(f"| {_cell(name)} | {counts} | {before} | {_interval(values)} |")
    if other and step and measured[0]:
        texts = ", ".join(f"{_code(name)} was {_code(was)} and then {_code(now)}" for name, (was, now) in other.items())
        lines += ["", f"The evaluation before the first step had other settings: {texts}."]
    return "\n".join(lines)


def _measured(workdir: Path, step: int) -> dict[str, Any]:
    """Returns the summaries of the evaluation that the run made after `step`, by benchmark; {} if it made none."""
    try:
        return json.loads((evaluation_folder(workdir, step) / "summary.json").read_text(encoding="utf-8"))["benchmarks"]
    except (OSError, ValueError, KeyError):
        return {}


def _interval(summary: dict[str, Any]) -> str:
    low, mean, high = (100 * summary["single_shot"][name] for name in ("pass@1_low", "pass@1", "pass@1_high"))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _result(name: str, summary: dict[str, Any]) -> huggingface_hub.EvalResult:
    known = BENCHMARKS.get(name)
    return huggingface_hub.EvalResult(
        task_type="text-generation",
        dataset_type=known.hub.id if known else name,
        dataset_name=name,
        metric_type="pass@1",
        metric_value=round(100 * summary["single_shot"]["pass@1"], 2),
    )


def _changed(config: Config) -> dict[str, Any]:
    """Returns the published settings that differ from the defaults."""
    return _difference(settings(config), settings(Config()))


def _difference(tree: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    changed = {}
    for name, value in tree.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            value, default = _difference(value, default), {}
        if value != default:
            changed[name] = value
    return changed


def _without_places(tree: dict[str, Any], above: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: _without_places(value, (*above, name)) if isinstance(value, dict) else value
        for name, value in tree.items()
        if (*above, name) not in _PLACES
    }


def _hub_id(path: str) -> str | None:
    """Returns `path` if it is a hub id; None for local paths, remote files of problems, and buckets."""
    if readers.ending(path):
        return None
    return path if _HUB_ID.fullmatch(path) and not Path(path).exists() else None


def _dataset(config: Config) -> str | None:
    """Returns the hub id of the training set, None if it is not a data set of the hub."""
    train = config.data.train
    return TRAINING_SETS[train].id if train in TRAINING_SETS and not Path(train).exists() else _hub_id(train)


def _short(path: str) -> str:
    """Returns a hub id unchanged, and the last part of any other path."""
    return _hub_id(path) or path.rstrip("/").rpartition("/")[2]


def _code(text: str) -> str:
    return f"<code>{html.escape(' '.join(text.split()))}</code>"


def _cell(text: str) -> str:
    return _code(text).replace("|", "&#124;")


def _block(value: dict[str, Any]) -> str:
    """Returns JSON in a fenced block, whose fence is longer than any run of backticks in it."""
    text = json.dumps(value, indent=2)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}json\n{text}\n{fence}"
