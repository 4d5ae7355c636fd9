"""`python -m igrpo_jax.sft --config configs/X.py --workdir DIR [--config.field=value ...]`: imitates solutions.

Supervised fine-tuning (SFT) of a model from files, on the problems and solutions of config.data.train; the same command
resumes it. `python -m igrpo_jax.export` writes its checkpoint, which reinforcement learning takes as model.path.
"""

from igrpo_jax.cli import exits, parsing
from igrpo_jax.errors import InputError

USAGE = "python -m igrpo_jax.sft --config FILE --workdir DIR [--config.FIELD=VALUE ...]"


def main(argv: list[str]) -> None:
    config, values = parsing.parse_config(argv, USAGE, {"workdir": "folder of the SFT run"} | parsing.CLUSTER)
    if not values["workdir"]:
        raise InputError("--workdir: missing; give a folder")
    from igrpo_jax.distributed import cluster
    from igrpo_jax.session.sft import train_sft

    with cluster.joined(config.cluster, parsing.cluster_arguments(argv)):
        train_sft(config, values["workdir"])


if __name__ == "__main__":
    exits.run(main, resumes=True)
