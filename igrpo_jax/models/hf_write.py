"""Hugging Face directories, written: safetensors in shards with their index, the small files next to them.

`hf_tables` says which tensor holds which parameter and how both are laid out. Host memory needs to hold one file. A
directory is written under a temporary name and gets its own name once it is complete. One in a bucket is written on
the local disk and uploaded then, config.json last, without which nothing reads it.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils

from igrpo_jax.config import LoraConfig
from igrpo_jax.distributed import sharding
from igrpo_jax.errors import InputError
from igrpo_jax.models import decoder, hf_files, hf_paths
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.decoder import Params
from igrpo_jax.models.hf_tables import Entry
from igrpo_jax.storage import addresses, writing
from igrpo_jax.storage.addresses import failures, is_remote, reason, resolved
from igrpo_jax.storage.reading import kept_in
from igrpo_jax.storage.writing import upload_folder

SMALLEST_STEP = 1e-30  # in place of 0 in config.json: transformers takes the logarithm where it draws new weights
SHARD = "5GB"  # the most that one file holds; transformers has the same default
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    hf_paths.TEMPLATES,
    *hf_files.VOCABULARIES,
    "merges.txt",
)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `out` when the block succeeds and is removed when it fails.

    It lies next to `out`, or on the local disk where `out` is in a bucket. Replaces an empty folder `out`.

    Raises:
        InputError: `out` exists and is not empty, or can't be written.
    """
    out = resolved(out)
    check_free(out)
    first = jax.process_index() == 0
    # Left behind only by a process that was killed.
    temporary = kept_in("exports", out) if is_remote(out) else out.with_name(f".{out.name}.partial")
    try:
        with _naming_refusals(out):
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            multihost_utils.sync_global_devices("the folder exists")
            yield temporary
            multihost_utils.sync_global_devices("the folder is complete")
            if first and is_remote(out):
                upload_folder(temporary, out, last=("adapter_config.json", "config.json"))
            elif first:
                temporary.replace(out)
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _naming_refusals(out: Path) -> Iterator[None]:
    """Turns an error of a disk or a bucket into an InputError that names `out`."""
    try:
        yield
    except failures(safetensors.SafetensorError) as error:
        raise _out_error(out, f"can't be written ({reason(error)})", "give a folder that can") from error


def check_free(out: Path) -> None:
    """Raises InputError if `out` is a file, holds anything, or is a mount point, which no folder can replace."""
    if addresses.names(out) or (not is_remote(out) and out.exists() and not out.is_dir()):
        raise _out_error(out, "already exists", "give a new folder")
    if not is_remote(out) and os.path.ismount(resolved(out)):
        raise _out_error(out, "is a mount point", "give a folder below it")
    check_place(out)


def try_out(out: Path) -> None:
    """Raises InputError if no folder can be made at `out`. Leaves nothing behind."""
    with _naming_refusals(out):
        writing.try_out(out)


def check_place(out: Path) -> None:
    """Raises InputError if several processes would write into a bucket: all must read back what one has written."""
    if is_remote(out) and jax.process_count() > 1:
        fix = "export afterwards: python -m igrpo_jax.export --workdir DIR --out DIR"
        raise _out_error(out, "several processes can't export into a bucket", fix)


def write_tensors(
    folder: Path,
    params: Params,
    entries: Mapping[str, Entry],
    stem: str = "model",
    *,
    dtype: str,
    report: Callable[[int], None] = lambda bytes_written: None,
) -> None:
    """Writes `params` in `dtype` as STEM.safetensors, or as numbered files with STEM.safetensors.index.json.

    Args:
        entries: the entry of every parameter. Those that share a tensor lie in it one after the other, in this order.
        report: receives the bytes written so far.
    """
    sharers: dict[str, list[str]] = {}
    for own, entry in entries.items():
        sharers.setdefault(entry.name, []).append(own)
    width = np.dtype(dtype).itemsize
    sizes = {name: width * sum(math.prod(params[own].shape) for own in owns) for name, owns in sharers.items()}
    split = huggingface_hub.split_state_dict_into_shards_factory(
        sizes, get_storage_size=lambda size: size, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=SHARD
    )
    # Every process needs the complete parameter, and with several processes none holds all of it.
    mesh = next(iter(params.values())).sharding.mesh
    gather = jax.jit(lambda x: x.astype(dtype), out_shardings=sharding.replicated(mesh))
    bytes_written = 0
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            parts = [entries[own].write(sharding.to_host(gather(params[own]))) for own in sharers[name]]
            tensors[name] = np.concatenate(parts) if len(parts) > 1 else parts[0]
            bytes_written += sizes[name]
            report(bytes_written)
        if jax.process_index() == 0:
            safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors lets only the owner read it
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def model_bytes(cfg: DecoderConfig, dtype: str) -> int:
    """Returns the bytes of the files of an export in `dtype`, without their headers."""
    return np.dtype(dtype).itemsize * sum(math.prod(shape) for shape in decoder.shapes(cfg).values())


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Writes `value` as JSON, only on the first process."""
    if jax.process_index() == 0:
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(path: str, folder: Path, template: str = "") -> None:
    """Copies the tokenizer's files and the chat template of the directory or hub id `path`, byte for byte.

    A `template` is written instead of the model's own: transformers reads chat_template.jinja first.
    """
    root = hf_paths.resolve(path)
    for file in [file for pattern in TOKENIZER for file in root.glob(pattern) if file.is_file()]:
        if jax.process_index() == 0:
            copy = folder / file.relative_to(root)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    if template and jax.process_index() == 0:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def exported_config(path: str, cfg: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Returns the config.json of an export in `dtype`.

    It is that of the model at `path`, except for the dtype, for references to code, which is not copied, for embeddings
    that it ties although `cfg` has a head, and for the least time step of Mamba-2, which transformers reads from
    time_step_min and NVIDIA's code from time_step_limit. The built-in model ("") is exported as a Llama.
    """
    raw = hf_files.config_json(path) if path else _llama(cfg)
    keys_of_dtype = [key for key in ("dtype", "torch_dtype") if key in raw] or ["dtype"]
    if "tie_word_embeddings" in raw:
        raw["tie_word_embeddings"] = cfg.tie_embeddings
    if cfg.mamba:
        raw.pop("mamba_dt_min", None)  # another name of time_step_min, which transformers prefers
        raw["time_step_min"] = cfg.mamba.time_step_limit[0] or SMALLEST_STEP
    return {key: value for key, value in raw.items() if key != "auto_map"} | dict.fromkeys(keys_of_dtype, dtype)


def _llama(cfg: DecoderConfig) -> dict[str, Any]:
    """Returns config.json of the built-in model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "num_hidden_layers": cfg.pattern.count("*"),
        "hidden_act": "silu",
        "rope_theta": cfg.rope_theta,
        "rms_norm_eps": cfg.rms_norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "max_position_embeddings": cfg.max_position_embeddings,
    }


def generation_config(path: str, eos_ids: tuple[int, ...]) -> dict[str, Any]:
    """Returns generation_config.json of the model at `path` ("" = none), with the EOS ids that the policy learned."""
    file = hf_paths.resolve(path) / "generation_config.json" if path else None
    raw = json.loads(file.read_text("utf-8")) if file and file.is_file() else {}
    return raw | {"eos_token_id": list(eos_ids) if len(eos_ids) > 1 else eos_ids[0]}


def adapter_entries(entries: Mapping[str, Entry], adapters: Params) -> dict[str, Entry]:
    """Returns the entries of peft's adapter file: [R, inputs] and [outputs, R] where the weight is [outputs, inputs].

    Raises:
        InputError: adapters of weights that are parts of one tensor, or of Mamba-2's output projection, which peft
            refuses.
    """
    names = [entry.name for entry in entries.values()]
    result = {}
    for path in adapters:
        own, _, factor = path.rpartition("/")
        entry, cut = entries[own], sharding.input_axes(own)
        if names.count(entry.name) > 1 or entry.name.endswith(".out_proj.weight"):
            raise InputError(
                f"config.model.lora.targets: peft takes no adapter for {own}, in the files {entry.name} or a part of "
                "it; export the merged model instead"
            )
        inputs, outputs = entry.ours[:cut], entry.ours[cut:]
        name = f"base_model.model.{entry.name.removesuffix('.weight')}."
        result[path] = (
            Entry(f"{name}lora_A.weight", f"R({inputs})", f"{inputs}R")
            if factor == "lora_a"
            else Entry(f"{name}lora_B.weight", f"({outputs})R", f"R{outputs}")
        )
    return result


def adapter_config(settings: LoraConfig, base: str, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Returns adapter_config.json for adapters with these `entries` of the model at `base`."""
    targets = sorted({entry.name.split(".")[-3] for entry in entries.values()})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _out_error(out: Path, what: str, fix: str) -> InputError:
    return InputError(f"{out}: {what}; {fix}")
