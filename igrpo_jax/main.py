"""`python -m igrpo_jax.main --config configs/X.py [--workdir DIR] [--config.field=value ...]`: trains, or resumes.

On several machines, run the same command on each. Outside Slurm, Open MPI and TPU pods, also give
--coordinator HOST:PORT (an address of process 0), --processes N and --process I.

jax is imported inside `main` only: the verifier's worker processes import this module too.
"""

from igrpo_jax.cli import exits, parsing


def main(argv: list[str]) -> None:
    config, workdir = parsing.parse(argv)
    from igrpo_jax.distributed import cluster
    from igrpo_jax.train import train

    with cluster.joined(config.cluster, parsing.cluster_arguments(argv)):
        train(config, workdir)


if __name__ == "__main__":
    exits.run(main, resumes=True)
