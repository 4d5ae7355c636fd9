"""The weights of a run: those with which it starts, those that LoRA adapts, and those of one of its checkpoints."""

import functools
import json
from pathlib import Path

import jax

from igrpo_jax.config import Config
from igrpo_jax.distributed import cluster, sharding
from igrpo_jax.errors import InputError
from igrpo_jax.models import decoder, lora
from igrpo_jax.models.policy import Policy
from igrpo_jax.outputs.checkpoint import Checkpointer
from igrpo_jax.outputs.checkpoint_reading import Removed, read_params, saved_step
from igrpo_jax.outputs.console import Console
from igrpo_jax.outputs.files import write_atomically, writing
from igrpo_jax.storage.addresses import make_folder, names
from igrpo_jax.storage.reading import read_bytes
from igrpo_jax.storage.writing import remove_tree

FIRST = Path("reference", "weights.json")  # file in a workdir: hashes of the model's files that its run began with


def load(policy: Policy, mesh: jax.sharding.Mesh, seed: int, dtype: str, console: Console) -> decoder.Params:
    """Loads the weights of the model that a run is given, in `dtype`, each in its sharding of `mesh`.

    While the files of a Hugging Face model are read, the console shows a bar that counts bytes. The built-in model gets
    random weights from `seed`.
    """
    if not policy.path:
        return policy.load(mesh, seed, dtype)
    with console.phase("reading weights", policy.file_bytes >> 20, unit="MiB") as update:
        return policy.load(mesh, seed, dtype, lambda done: update(done >> 20))


def record_first(policy: Policy, workdir: Path) -> None:
    """Writes hashes of the weights, chat template and tokenizer that a new run in `workdir` begins with.

    `first` and `check_tokenizer` compare them. The built-in model has none, because `first` keeps its weights
    themselves.

    Raises:
        RunError: the file cannot be written.
    """
    if policy.path and jax.process_index() == 0:
        with writing(file := workdir / FIRST):
            make_folder(file.parent)
        record = {"path": policy.path, "fingerprint": policy.fingerprint, **policy.prompt_hashes}
        write_atomically(file, json.dumps(record) + "\n")


def _check_first(policy: Policy, workdir: Path) -> None:
    """Raises InputError if the files of the policy hold other weights than those that the run began with."""
    if _recorded(workdir).get("fingerprint", policy.fingerprint) != policy.fingerprint:
        raise InputError(
            f"config.model.path = {policy.path!r}: the weights differ from those that the run in {workdir} started "
            "with, which LoRA and algorithm.beta need; restore them (for a hub id: the same revision) or use another "
            "--workdir"
        )


def check_tokenizer(policy: Policy, workdir: Path) -> None:
    """Raises InputError if the policy's chat template or tokenizer is not the one that the run began with."""
    recorded = _recorded(workdir)
    for name, value in policy.prompt_hashes.items():
        if recorded.get(name, value) != value:
            what = name.replace("_", " ")
            raise InputError(
                f"config.model.path = {policy.path!r}: the {what} differs from the one that the run in {workdir} "
                "started with, so it would get other prompts than those that it was trained on; restore it (for a hub "
                "id: the same revision)"
            )


def _recorded(workdir: Path) -> dict[str, str]:
    """Returns what `record_first` has written; runs of older versions lack some of it, or all."""
    file = workdir / FIRST
    return cluster.from_first(lambda: json.loads(read_bytes(file)) if file.name in names(file.parent) else {})


def first(
    config: Config,
    policy: Policy,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    dtype: str,
    console: Console,
    params: decoder.Params | None = None,
) -> decoder.Params:
    """Returns the policy before the first update: it is pi_ref, and it is what LoRA adapts.

    A Hugging Face model is read again from its files. The built-in model, which its warm start has trained, is kept in
    workdir/reference.

    Args:
        dtype: the dtype of the result; its shardings are those of training.
        params: the built-in model after its warm start, float32, to be kept in place of what was; None to read that.

    Raises:
        InputError: the files hold other weights than those that `record_first` has recorded.
    """
    if policy.path:
        _check_first(policy, workdir)
        return load(policy, mesh, config.seed, dtype, console)
    kept = workdir / "reference"
    if params is not None:  # a launch that ended before its first checkpoint may have left those of its own warm start
        cluster.from_first(functools.partial(remove_tree, kept / "checkpoints"))
    with Checkpointer(kept, config.checkpoint) as store:
        if params is not None:
            store.save(0, params, {}, force=True)
        _, params, _ = store.restore(sharding.abstract_params(mesh, decoder.shapes(policy.cfg), "float32"))
    return decoder.cast(params, dtype)


def adapters(config: Config, policy: Policy, mesh: jax.sharding.Mesh) -> decoder.Params:
    """Returns the adapters with which a LoRA run starts. They change nothing yet: with them the policy is pi_ref."""
    return lora.init(config.model.lora, decoder.shapes(policy.cfg), jax.random.key(config.seed), mesh)


def saved(
    config: Config,
    policy: Policy,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    console: Console,
    step: int | None = None,
    dtype: str | None = None,
) -> tuple[decoder.Params, int]:
    """Reads the policy of a checkpoint of the run in `workdir`. The run may be under way.

    Args:
        config: the configuration of that run.
        step: the step of the checkpoint; None for the newest, also where the run replaces it while it is read.
        dtype: that of the parameters without LoRA; None for model.dtype, in which the run samples.

    Returns:
        The parameters, and the step of the checkpoint. Those of a LoRA run are adapters in float32 on weights in
        model.dtype.

    Raises:
        InputError: there is no such checkpoint.
    """
    shapes = decoder.shapes(policy.cfg)
    if not config.model.lora.rank:
        return _read(workdir, step, sharding.abstract_params(mesh, shapes, dtype or config.model.dtype))
    adapted = sharding.abstract_params(mesh, lora.shapes(config.model.lora, shapes), "float32")
    trained, step = _read(workdir, step, adapted)
    frozen = first(config, policy, workdir, mesh, config.model.dtype, console)
    return lora.attach(frozen, trained, config.model.lora.scaling), step


def _read(
    workdir: Path, step: int | None, abstract: dict[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, jax.Array], int]:
    """Returns the parameters of a checkpoint and its step, the newest where `step` is None."""
    removed: set[int] = set()
    while True:
        chosen = saved_step(workdir, step)
        try:
            return read_params(workdir, chosen, abstract), chosen
        except Removed:
            if step is not None or chosen in removed:
                raise
            removed.add(chosen)
