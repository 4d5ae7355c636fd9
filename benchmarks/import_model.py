"""Reading weights from Hugging Face files: how long it takes, and how much host memory beyond the parameters.

    python benchmarks/import_model.py --shape qwen2-3b --shard 2GB --dtype float32
    python benchmarks/import_model.py --model DIR

With --shape a directory of bfloat16 weights, all of them 1, is first written into a temporary folder. Its files are
then still in the file system's cache, so the disk is not measured. The import runs on one device, in a process of its
own. The last line is one JSON object:

    seconds               from opening the first file to the last parameter on the device; cpu_seconds of the process
                          are more reliable on a busy machine
    file_bytes            of all files; `largest_file_bytes` is the largest of the `files`
    parameter_bytes       on the device, in --dtype
    extra_memory_bytes    resident memory of the process at its peak, beyond that before and, on a CPU, the parameters,
                          which are host memory too (Linux)
    extra_over_file       extra_memory_bytes over largest_file_bytes
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import models


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models.add_model(parser)
    parser.add_argument("--shard", default="5GB", help="the most that one file of --shape holds")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the parameters")
    return parser.parse_args()


def write(folder: Path, raw: dict, shard: str) -> None:
    """Writes a model directory without a tokenizer, with one file in memory at a time."""
    import huggingface_hub
    import ml_dtypes
    import numpy as np
    import safetensors.numpy

    from igrpo_jax.models import decoder, hf_tables, hf_tensors
    from igrpo_jax.models.config import from_hf

    cfg = from_hf(raw, "the shape")
    shapes = hf_tables.tensor_shapes(hf_tables.table(raw["model_type"], cfg), decoder.shapes(cfg))
    split = huggingface_hub.split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: 2 * math.prod(shape),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {name: np.ones(shapes[name], ml_dtypes.bfloat16) for name in names}
        safetensors.numpy.save_file(tensors, folder / file)
    (folder / "config.json").write_text(json.dumps(raw))
    if split.is_sharded:
        (folder / hf_tensors.INDEX).write_text(json.dumps({"weight_map": split.tensor_to_filename}))


def measure(args: argparse.Namespace) -> dict:
    """Returns the figures of importing args.model in this process."""
    import jax

    from igrpo_jax import config
    from igrpo_jax.distributed import sharding
    from igrpo_jax.models import hf_files, hf_paths, hf_read

    model = hf_files.load_config(args.model)
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=1), jax.devices()[:1])
    jax.block_until_ready(jax.numpy.ones((64, 64), device=jax.devices()[0]))  # the first array has a one-time cost
    memory = models.PeakMemory()
    memory.reset()
    before, began, worked = memory.now(), time.perf_counter(), time.process_time()
    params = jax.block_until_ready(hf_read.load_params(args.model, model, mesh, args.dtype))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    size = sum(x.nbytes for x in params.values())
    extra = memory.peak() - before - (size if jax.default_backend() == "cpu" else 0)
    files = [file.stat().st_size for file in hf_paths.resolve(args.model).glob("*.safetensors")]
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "file_bytes": sum(files),
        "files": len(files),
        "largest_file_bytes": max(files),
        "parameter_bytes": size,
        "extra_memory_bytes": extra,
        "extra_over_file": round(extra / max(files), 3),
    }


def main() -> None:
    args = parse()
    if args.model:
        models.finish(vars(args) | measure(args) | models.machine("safetensors"))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), models.SHAPES[args.shape], args.shard)
        command = [sys.executable, __file__, "--model", folder, "--dtype", args.dtype]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    models.finish(figures | vars(args))


if __name__ == "__main__":
    main()
