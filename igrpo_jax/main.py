"""`python -m igrpo_jax.main --config configs/X.py [--workdir DIR] [--config.field=value ...]`: trains, or resumes.

jax is imported inside `main` only: the verifier's worker processes import this module too.
"""

from igrpo_jax import runtime


def main(argv: list[str]) -> None:
    config, workdir = runtime.parse(argv)
    from igrpo_jax.train import train

    train(config, workdir)


if __name__ == "__main__":
    runtime.run(main)
