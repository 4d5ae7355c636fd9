"""`python -m igrpo_jax.export --workdir DIR --out HF_DIR [--step N] [--adapter]`: writes a checkpoint as a Hugging Face
directory, in bfloat16, that `transformers` loads; with --adapter only the adapters of a LoRA run, as `peft` loads them.

It runs on the CPU, so that it does not disturb a training that uses the accelerator. It needs memory for two copies of
the model in bfloat16, since it reads back what it has written and compares the two.
"""

from pathlib import Path

import jax
from absl import flags

from igrpo_jax import cli
from igrpo_jax.config import MeshConfig
from igrpo_jax.distributed import sharding
from igrpo_jax.errors import InputError
from igrpo_jax.models import hf_write
from igrpo_jax.models.policy import open_policy
from igrpo_jax.outputs import weights
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.files import local_folder
from igrpo_jax.outputs.workdir import read_config


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_string("out", None, "folder to write; it must be new or empty", flag_values=values)
    flags.DEFINE_integer("step", None, "step of the checkpoint; default: the newest", flag_values=values)
    flags.DEFINE_bool("adapter", False, "write LoRA's adapters alone, as peft loads them", flag_values=values)
    cli.read_flags(argv, values, __doc__, "--out=HF_DIR")
    for name in ("workdir", "out"):
        if not values[name].value:
            raise InputError(f"--{name}: missing; give --workdir DIR --out HF_DIR")
    jax.config.update("jax_platforms", "cpu")
    export(Path(values.workdir), Path(values.out), values.step, values.adapter)


def export(workdir: Path, out: Path, step: int | None = None, adapter: bool = False) -> None:
    """Writes the policy of a checkpoint of the run in `workdir`, the newest or that of `step`, to `out`.

    Raises:
        InputError: no such run or checkpoint; `out` is there already; `adapter` without LoRA.
    """
    workdir, out = local_folder("--workdir", workdir), local_folder("--out", out)
    config = read_config(workdir)
    if adapter and not config.model.lora.rank:
        raise InputError(
            f"--adapter: the run in {workdir} trained all weights (config.model.lora.rank = 0); leave it out"
        )
    hf_write.check_free(out)
    policy = open_policy(config.model, config.data)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with Console() as console, jax.set_mesh(mesh):
        params, step = weights.saved(config, policy, workdir, mesh, console, step)
        if adapter:
            policy.save_adapter(out, config.model.lora, params)
        else:
            with console.phase("writing weights (MB)", hf_write.model_bytes(policy.model) >> 20) as update:
                policy.save(out, params, lambda done: update(done >> 20))
        console.message(f"step {step} is in {out}; read back, it gives the same logits")


if __name__ == "__main__":
    cli.run(main)
