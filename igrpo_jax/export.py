"""`python -m igrpo_jax.export --workdir DIR --out HF_DIR [--push OWNER/NAME] [--step N] [--dtype DTYPE] [--adapter]`:
writes a checkpoint as a Hugging Face directory that `transformers` loads; with --adapter only the adapters of a LoRA
run, as `peft` loads them.

--push puts it into a repository of the hub too, with a model card; --out may then be left out. A new repository is
private, unless --public is given. The token is HF_TOKEN, or that of `hf auth login`.

DTYPE is bfloat16 or float32. Where it is not given, it is the run's model.dtype; with LoRA bfloat16, unless rounding
would lose more than a tenth of the change. At the end a line says by how much the logits differ from those of the
trained policy.

It runs on the CPU, so that it does not disturb a training that uses the accelerator. It needs memory for the policy in
model.dtype and two copies in DTYPE, because it reads back what it has written and compares the three.
"""

import tempfile
from pathlib import Path

import jax
from absl import flags

from igrpo_jax.cli import exits, parsing
from igrpo_jax.config import MeshConfig
from igrpo_jax.distributed import sharding
from igrpo_jax.errors import InputError
from igrpo_jax.models import decoder, hf_write
from igrpo_jax.models.policy import Policy, export_dtype, open_policy
from igrpo_jax.outputs import hub, weights
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.workdir import read_config
from igrpo_jax.storage.addresses import path_of
from igrpo_jax.storage.reading import local

DTYPES = ("bfloat16", "float32")


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_string("out", None, "folder to write; it must be new or empty", flag_values=values)
    flags.DEFINE_integer("step", None, "step of the checkpoint; default: the newest", flag_values=values)
    flags.DEFINE_enum("dtype", None, DTYPES, "dtype of the weights; default: see above", flag_values=values)
    flags.DEFINE_string("push", None, "repository of the hub, OWNER/NAME", flag_values=values)
    flags.DEFINE_bool("public", False, "make the repository of --push public, if it is new", flag_values=values)
    flags.DEFINE_bool("adapter", False, "write only LoRA's adapters, in the form that peft loads", flag_values=values)
    parsing.read_flags(argv, values, __doc__, "--out=HF_DIR")
    for name in ["workdir", *["out"] * (not values.push)]:
        if not values[name].value:
            raise InputError(f"--{name}: missing; give --workdir DIR --out HF_DIR")
    if values.public and not values.push:
        raise InputError("--public: applies to the repository of --push; give --push too, or leave --public out")
    jax.config.update("jax_platforms", "cpu")
    export(values.workdir, values.out, values.step, values.adapter, values.dtype, values.push, not values.public)


def export(
    workdir: str | Path,
    out: str | Path | None,
    step: int | None = None,
    adapter: bool = False,
    dtype: str | None = None,
    push: str | None = None,
    private: bool = True,
) -> None:
    """Writes the policy of a checkpoint of the run in `workdir`, the newest or that of `step`, to `out`.

    Args:
        out: a folder that is new or empty; None, with `push`, for one that is removed at the end.
        adapter: write only LoRA's adapters, in float32.
        dtype: one of DTYPES; None for `export_dtype` of the policy.
        push: repository of the hub that `out` is put into, with a model card; None for none.
        private: whether that is made private, if it is new.

    Raises:
        InputError: no such run or checkpoint; a chat template or tokenizer that the run did not begin with; `out` is
            neither new nor empty; `adapter` without LoRA, with `dtype`, or for the built-in model; a repository that
            may not be written to.
        RunError: the hub can't be reached.
    """
    workdir = path_of(f"--workdir {workdir}", workdir)
    place = path_of(f"--out {out}", out) if out else None
    config = read_config(workdir)
    if adapter and not config.model.lora.rank:
        raise InputError(
            f"--adapter: the run in {workdir} trained all weights (config.model.lora.rank = 0); leave it out"
        )
    if adapter and dtype:
        raise InputError(f"--dtype {dtype}: adapters are always written in float32; leave it out")
    if adapter and not config.model.path:
        raise InputError(
            f"--adapter: the run in {workdir} adapts the built-in model (config.model.path = ''), which has no files "
            "onto which peft could load the adapters; leave it out, and the merged model is written"
        )
    if place:
        try:
            hf_write.check_free(place)
            hf_write.try_out(place)
        except InputError as error:
            raise InputError(f"--out {error}") from error
    policy = open_policy(config.model, config.data)
    weights.check_tokenizer(policy, workdir)
    repository = hub.open_repository(push, "--push", config, private) if push else None
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with Console() as console, jax.set_mesh(mesh), tempfile.TemporaryDirectory(prefix="igrpo-export-") as temporary:
        folder = place or Path(temporary, "model")
        trained = "float32" if dtype == "float32" else None
        params, step = weights.saved(config, policy, workdir, mesh, console, step, trained)
        if adapter:
            policy.save_adapter(folder, config.model.lora, params)
            written = "adapters in float32; read back, they give the trained policy's logits"
        else:
            written = _write_model(folder, policy, params, dtype or export_dtype(params), console)
        console.message(f"step {step} is in {place}, {written}" if place else f"step {step}, {written}")
        if repository:
            console.message(hub.upload(repository, local(f"--out {out}", folder), config, workdir, step, place))


def _write_model(folder: Path, policy: Policy, params: decoder.Params, dtype: str, console: Console) -> str:
    """Writes a complete model, and returns its dtype and how it compares when it is read back."""
    with console.phase("writing weights", hf_write.model_bytes(policy.cfg, dtype) >> 20, unit="MiB") as update:
        compared = policy.save(folder, params, lambda done: update(done >> 20), dtype)
    return f"{dtype}; read back, {compared}"


if __name__ == "__main__":
    exits.run(main)
