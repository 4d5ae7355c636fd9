"""`python -m igrpo_jax` and `igrpo-jax` list the commands.

`igrpo-jax COMMAND ...` does what `python -m igrpo_jax.COMMAND ...` does.
"""

import difflib
import os
import runpy
import sys

from igrpo_jax.cli import exits

COMMANDS = {
    "main": "trains, or resumes, the run of a configuration file",
    "sft": "trains a model on solutions before reinforcement learning",
    "evaluate": "evaluates a model on benchmarks, and compares two evaluations",
    "probe": "measures before training whether drafts will pay for a model and its data",
    "generate": "answers questions, to try a model by hand",
    "export": "writes a checkpoint as a Hugging Face directory",
    "report": "makes pages of a run's curves and samples",
    "aot": "compiles a configuration for a TPU slice that is not there: does it fit, and what bounds it",
    "rewards.grade": "grades answers in a file",
}


def main() -> int:
    """Runs the command that the command line names, or lists them; returns the exit code."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "-help", "-V", "--version"):
        exits.run(lambda _: _list())
        return 0
    name, *arguments = sys.argv[1:]
    if name not in COMMANDS:
        (near,) = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)
        print(f"igrpo_jax: error: {name}: no such command; the nearest is {near}", file=sys.stderr)
        return 2
    # As `python -m` does: a reward may be a module in the current folder.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    sys.argv = [f"igrpo_jax.{name}", *arguments]
    # It becomes the main module, which the workers of the verifier import again.
    runpy.run_module(f"igrpo_jax.{name}", run_name="__main__", alter_sys=True)
    return 0


def _list() -> None:
    for name, purpose in COMMANDS.items():
        print(f"python -m igrpo_jax.{name:<14} {purpose}")
    print(
        "\nEach of them explains its flags with --help, and prints the version with --version. igrpo-jax COMMAND is "
        "python -m igrpo_jax.COMMAND."
    )


if __name__ == "__main__":
    sys.exit(main())
