"""Will drafts pay for a model and its data? `python -m igrpo_jax.probe --model MODEL --data FILE`.

MODEL is the folder of a run (its newest checkpoint, or that of --step N), a Hugging Face directory or a hub id. DATA is
what config.data.train may be: a file, a folder, a known name or a hub id. With the settings of the training that is
planned (--config), the model answers --problems of the problems, plain and with its own drafts; nothing is trained.
The folder --workdir gets probe.html, probe.json and all answers, and the same command resumes where it was
killed.

docs/when_drafts_pay.md explains the figures and the conclusion.
"""

import contextlib
import functools
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igrpo_jax.cli import exits, parsing
from igrpo_jax.config import Config, to_dict
from igrpo_jax.errors import InputError
from igrpo_jax.loading import check_model
from igrpo_jax.storage.addresses import path_of

if TYPE_CHECKING:
    from igrpo_jax.session.run_inputs import RunInputs

USAGE = (
    "python -m igrpo_jax.probe [--config FILE] --model MODEL --data DATA [--problems P] [--workdir OUT] "
    "[--config.FIELD=VALUE ...]"
)
FOLDER = "probe"
FLAGS = {
    "data": "problems: a file, a folder, a known name or a hub id; default: those of --config or of the run",
    "problems": "number of problems to answer, the first that the run would read; default: 64",
    "answers": "plain answers to each problem; default: N + G, the least",
    "gradients": "problems whose gradients are compared; default: 32, and 0 for none",
    "workdir": f"folder to write the answers, the gradients and the conclusion to; default: {FOLDER}",
    "step": "step of the checkpoint that answers, where --model is a run; default: the newest",
}
# Settings that decide which answers and gradients there are, in addition to the model's name.
DECIDING = (
    *("seed", "model.dtype", "model.lora.rank", "model.lora.alpha", "model.lora.targets"),
    *("data.train", "data.instruction", "data.system_prompt", "data.template_kwargs", "data.max_prompt_length"),
    *("algorithm.num_drafts", "algorithm.num_generations", "algorithm.draft_selection", "algorithm.draft_metric"),
    *("algorithm.loss_type", "algorithm.credit_gamma"),
    *("algorithm.scale_rewards", "algorithm.baseline", "algorithm.mask_truncated_completions"),
    *("refine.instruction", "refine.max_draft_length"),
    *("rollout.max_completion_length", "rollout.temperature", "rollout.top_p", "rollout.top_k"),
    *("rewards.accuracy", "rewards.format", "rewards.overlong", "rewards.overlong_cache"),
    *("rewards.custom", "rewards.custom_weight", "rewards.functions", "rewards.function_weights"),
    *("rewards.conversational", "rewards.judge.weight", "rewards.judge.model", "rewards.judge.instruction"),
    *("rewards.judge.show_reference", "rewards.judge.temperature", "rewards.judge.max_tokens"),
)


def main(argv: list[str]) -> None:
    config, values = parsing.parse_model(argv, USAGE, FLAGS)
    if not values["model"]:
        raise InputError("--model: missing; give the folder of a run, a Hugging Face directory or a hub id")
    if parsing.cluster_arguments(argv):
        raise InputError("--processes: a probe is one process; leave it out, and --coordinator and --process")
    model = values["model"]
    is_run = (path_of(f"--model {model}", model) / "checkpoints").is_dir()
    if not (values["data"] or values["config"] or is_run):
        raise InputError("--data: missing; give the problems to train on, a file or what config.data.train accepts")
    if values["data"]:
        config = replace(config, data=replace(config.data, train=values["data"]))
    numbers = {name: parsing.number(name, values[name]) for name in ("problems", "answers", "gradients", "step")}
    workdir = values["workdir"] or FOLDER
    chosen = {name: value for name, value in numbers.items() if value is not None}
    probe(config, model, workdir, **chosen, command=again(argv))


def again(argv: list[str]) -> str:
    """Returns the command line that makes a probe again, without the --workdir that it was written to."""
    kept, words = [], iter(argv[1:])
    for word in words:
        name = word.lstrip("-").partition("=")[0]
        if not (word.startswith("-") and name == "workdir"):
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return shlex.join(["python", "-m", "igrpo_jax.probe", *kept])


def probe(
    config: Config,
    model: str | Path,
    workdir: str | Path,
    problems: int = 64,
    answers: int | None = None,
    gradients: int = 32,
    step: int | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Measures whether drafts will pay, resuming what `workdir` holds, and prints the conclusion.

    Args:
        config: what `load_config(..., model=model)` returns, with the settings of the planned training.
        model: the folder of a run, a Hugging Face directory or a hub id.
        workdir: gets probe.html, probe.json, answers.jsonl and gradients/.
        problems: how many problems are answered, at most.
        answers: plain answers to each; None for N + G.
        gradients: the number of problems whose gradients are compared, at most.
        step: the step of the checkpoint, where `model` is a run; None for the newest.
        command: the command line that makes it again, for the record; None if there is none.

    Returns:
        What `workdir`/probe.json holds.

    Raises:
        InputError: something in `config` or what it names is wrong, or `workdir` holds something else.
        RunError: no problem could be graded; a full disk.
    """
    import jax

    from igrpo_jax.distributed import watchdog
    from igrpo_jax.distributed.disk_cache import use_disk_cache
    from igrpo_jax.evaluation import inference, results
    from igrpo_jax.outputs.console import Console
    from igrpo_jax.probe import measure

    check_model(config, model)
    began, folder = time.perf_counter(), path_of(f"--workdir {workdir}", workdir)
    config = planned(config)
    samples = checked(config, answers, problems)
    run, step = inference.checkpoint_of(str(model), step)
    inputs = _opened(config, run, folder)
    name, written = inference.identity(str(model), run, step)
    head = {"model": name, "step": step, "weights_written": written}
    asked = measure.ProbeInputs(inputs, run, step, problems, samples, gradients)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(inputs.mesh))
        training, sampler = measure.programs(asked)  # checks settings before anything is written
        settings = {"kind": "probe", **head, "samples": samples, **deciding(inputs)}
        still_ours = stack.enter_context(results.held(folder, settings))
        console = stack.enter_context(Console())
        console.table("Probe", measure.plan(asked))
        use_disk_cache(config.compilation_cache)
        stack.enter_context(watchdog.watching(config.watchdog))
        answered, measured = measure.measure(asked, training, sampler, folder, console, stack)
        still_ours()
        summary = measure.finish(inputs, folder, {**head, "command": command}, answered, measured, console)
        console.message(f"{time.perf_counter() - began:.1f} s; written to {folder / 'probe.html'}")
    return summary


def _opened(config: Config, run: Path | None, folder: Path) -> "RunInputs":
    """Returns what is read and checked before anything is written to `folder`.

    Args:
        run: the folder of the run whose model is probed; None for another model.
    """
    from igrpo_jax.evaluation import results
    from igrpo_jax.outputs import weights
    from igrpo_jax.session.run_inputs import open_inputs

    inputs = open_inputs(config, results.recorded_date(folder))
    if run:
        weights.check_tokenizer(inputs.policy, run)
    return inputs


def planned(config: Config) -> Config:
    """Returns the settings of the planned training, without what a probe does not do.

    Raises:
        InputError: there would be nothing to measure.
    """
    if config.data.train and not config.model.path:
        raise InputError("--data: the built-in model only knows its own task; leave it out, or name another --model")
    if not config.algorithm.num_drafts:
        raise InputError("config.algorithm.num_drafts = 0: must be at least 1, the drafts that a probe asks about")
    if config.algorithm.num_generations < 2:
        raise InputError(
            "config.algorithm.num_generations = 1: must be at least 2 in a probe, which compares the refinements of "
            "one draft with each other"
        )
    if not config.rewards.accuracy:
        raise InputError(
            "config.rewards.accuracy = 0: must be above 0, because a probe counts right answers; give "
            "--config.rewards.accuracy=1"
        )
    if config.algorithm.second_stage == "verify":
        raise InputError('config.algorithm.second_stage = "verify": a probe asks about refinements; choose "refine"')
    if config.algorithm.draft_selection == "refined":
        raise InputError('config.algorithm.draft_selection = "refined": a probe shows one draft; choose "best"')
    return replace(
        config,
        # The judge's budget for a step is too small for a probe.
        rewards=replace(config.rewards, judge=replace(config.rewards.judge, budget=0)),
        evaluation=replace(config.evaluation, every=0),
        checkpoint=replace(config.checkpoint, best_metric=""),
        log=replace(config.log, trackers=(), profile_steps=()),
        warm_start=replace(config.warm_start, steps=0),
    )


def checked(config: Config, answers: int | None, problems: int) -> int:
    """Returns K, the plain answers to each problem. Raises InputError if there are too few answers or problems."""
    least = config.algorithm.num_drafts + config.algorithm.num_generations
    if answers is not None and answers < least:
        raise InputError(f"--answers {answers}: must be at least N + G = {least}, the completions of a group of GRPO")
    if problems < 1:
        raise InputError(f"--problems {problems}: must be at least 1")
    return answers or least


def deciding(inputs: "RunInputs") -> dict[str, Any]:
    """Returns by their dotted names the settings that decide which answers and gradients there are."""
    tree = to_dict(inputs.config)  # as JSON has it
    settings = {path: functools.reduce(lambda part, key: part[key], path.split("."), tree) for path in DECIDING}
    return {**settings, "data": inputs.fingerprint, "template_date": inputs.config.data.template_date}


if __name__ == "__main__":
    exits.run(main)
