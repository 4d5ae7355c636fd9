"""Evaluates a model: `python -m igrpo_jax.evaluate --config configs/X.py --model MODEL --benchmarks a,b --workdir OUT`.

MODEL is the folder of a run (its newest checkpoint, or that of --step N), a Hugging Face directory or a hub id.
--samples K, --rounds R and --benchmarks set the fields of these names in `evaluation`; --config may be left out.
The same command resumes where it was killed or preempted. --compare A,B compares two such OUTs, or two runs, instead.

jax is imported inside functions only: the verifier's worker processes import this module too.
"""

import contextlib
import functools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igrpo_jax.cli import exits, parsing
from igrpo_jax.config import Config
from igrpo_jax.errors import InputError
from igrpo_jax.loading import check_model, config_of_run
from igrpo_jax.rewards import main_guard
from igrpo_jax.schema.fields import refusal
from igrpo_jax.storage import reading
from igrpo_jax.storage.addresses import path_of

if TYPE_CHECKING:
    from igrpo_jax.evaluation.inference import EvaluationInputs

USAGE = (
    "python -m igrpo_jax.evaluate [--config FILE] --model MODEL --benchmarks a,b [--samples K] [--rounds R] "
    "--workdir OUT [--config.FIELD=VALUE ...]\npython -m igrpo_jax.evaluate --compare OUT_A,OUT_B"
)
FLAGS = {
    "benchmarks": "names of the benchmarks, separated by commas",
    "samples": "answers to each problem; default: evaluation.samples, or if it is None 64 or 8 on benchmarks known by "
    "name, 1 on mmlu_pro and files of your own",
    "rounds": "rounds of draft -> refine after the single-shot answers; default: evaluation.rounds",
    "workdir": "folder to write the answers and the summary to",
    "step": "step of the checkpoint to evaluate, where --model is a run; default: the newest",
    "compare": "A,B, the --workdir of two evaluations: prints how much better B is, and samples nothing",
}


def main(argv: list[str]) -> None:
    config, values = parsing.parse_model(argv, USAGE, FLAGS)
    if values["compare"]:
        from igrpo_jax.evaluation.comparison import compare
        from igrpo_jax.outputs.lines import printable

        folders = [folder.strip() for folder in values["compare"].split(",")]
        if len(folders) != 2:
            raise InputError(f"--compare {values['compare']}: give two folders, A,B")
        wanted = lambda name: "/" not in name or name.startswith("evaluations/")  # of a run in a bucket
        text = compare(*(reading.local(f"--compare {folder}", folder, wanted) for folder in folders))
        print(printable(text, sys.stdout.encoding), end="")  # no `Console`, which would take the accelerator
        return
    for flag, fix in (("model", "the folder of a run, a Hugging Face directory or a hub id"), ("workdir", "a folder")):
        if not values[flag]:
            raise InputError(f"--{flag}: missing; give {fix}")
    step = parsing.number("step", values["step"])
    from igrpo_jax.distributed import cluster

    with cluster.joined(config.cluster, parsing.cluster_arguments(argv)):
        evaluate(config, values["model"], values["workdir"], step)


def evaluate(config: Config, model: str | Path, out: str | Path, step: int | None = None) -> dict[str, dict[str, Any]]:
    """Evaluates the benchmarks of `config` into `out`, or resumes where `out` ends, and prints the summary.

    Args:
        config: what `load_config(..., model=model)` returns.
        model: the folder of a run, a Hugging Face directory or a hub id.
        step: the step of the checkpoint, where `model` is a run; None for the newest.

    Returns:
        The summary of each benchmark by its name, as `out`/summary.json holds it.

    Raises:
        InputError: `config` is not that of `model`, names no benchmark, or something in it is wrong, such as settings
            of a built-in task with which it asks problems that a run was trained on; `out` holds another evaluation.
        Preempted: SIGTERM arrived, and the answers so far are in `out`.
    """

    from igrpo_jax.data import builtin, problems
    from igrpo_jax.distributed import cluster, preemption
    from igrpo_jax.evaluation import inference, results, summary_tables
    from igrpo_jax.outputs.console import Console

    main_guard.check_main()
    check_model(config, model)
    if not config.evaluation.benchmarks:
        fix = "name at least one, such as aime24 and math500 with --benchmarks aime24,math500"
        raise refusal("evaluation.benchmarks", config.evaluation.benchmarks, fix)
    model, out = str(model), path_of(f"--workdir {out}", out)
    rows = problems.asked(problems.evaluation_rows(config), config.evaluation.limit)
    if run := config_of_run(model):
        questions = {name: [row.question for row in benchmark] for name, benchmark in rows.items()}
        builtin.check_held_out(config, run, model, questions)
    with contextlib.ExitStack() as stack:
        stack.enter_context(preemption.noticed(config.checkpoint.preemption_grace))
        console = stack.enter_context(Console())
        recorded_date = cluster.from_first(functools.partial(results.recorded_date, out))
        inputs = inference.open_evaluation(config, model, step, rows, recorded_date)
        settings = {
            "model": inputs.name,
            "step": inputs.step,
            "weights_written": inputs.weights_written,
            **inputs.policy.prompt_hashes,
            **results.settings(inputs.config, inputs.plan.max_new_tokens),
        }
        stack.enter_context(results.held(out, settings))
        console.table("Evaluation", overview(inputs))
        benchmarks, params = inference.load(inputs, console, stack)
        began = time.perf_counter()
        try:
            summaries = benchmarks.run(params, out, settings)
        except preemption.Preempted:
            raise preemption.Preempted(f"preempted: the answers so far are in {out}") from None
        console.message(f"{summary_tables.markdown(summaries)}\n{time.perf_counter() - began:.1f} s; written to {out}")
    return summaries


def overview(inputs: "EvaluationInputs") -> list[tuple[str, object]]:
    """Returns the rows of the table that is printed before the first answer."""
    from igrpo_jax.evaluation.planning import left_out, samples_per_problem

    config, settings, plan = inputs.config, inputs.config.evaluation, inputs.plan
    rounds = "none"
    if settings.rounds:
        rounds = f"{settings.rounds} of draft -> refine, each from one of up to {settings.drafts} answers"
    step = "" if inputs.step is None else f", step {inputs.step}"
    answers = {name: samples_per_problem(config, name) for name in plan.prompts}
    size = f"{inputs.policy.cfg.num_params / 1e6:,.1f} M parameters"
    return [
        ("model", f"{inputs.name}{step}, {size}, {config.model.dtype}"),
        *(
            (name, f"{len(prompts):,} problems, {answers[name]} answer{'s' * (answers[name] != 1)} each")
            for name, prompts in plan.prompts.items()
        ),
        *([("day of the chat template", config.data.template_date)] * bool(config.data.template_date)),
        (
            "answers",
            f"temperature {settings.temperature:g}, top-p {settings.top_p:g}, up to {plan.max_new_tokens:,} tokens",
        ),
        *(("note", note) for note in [*plan.notes, *left_out(config, plan)]),
        ("rounds", rounds),
    ]


if __name__ == "__main__":
    exits.run(main, resumes=True)
