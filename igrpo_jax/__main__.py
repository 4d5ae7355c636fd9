"""`python -m igrpo_jax` lists the commands."""

COMMANDS = {
    "main": "trains, or resumes, the run of a configuration file",
    "evaluate": "evaluates a model on benchmarks, and compares two evaluations",
    "generate": "answers questions, to try a model by hand",
    "export": "writes a checkpoint as a Hugging Face directory",
    "report": "makes pages of a run's curves and samples",
    "aot": "compiles a configuration for a TPU slice that is not there: does it fit, and what bounds it",
    "rewards.grade": "grades answers in a file",
}


def main() -> None:
    for name, purpose in COMMANDS.items():
        print(f"python -m igrpo_jax.{name:<14} {purpose}")
    print("\nEach of them explains its flags with --help.")


if __name__ == "__main__":
    main()
