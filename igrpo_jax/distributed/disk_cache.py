"""The folder in which JAX keeps compiled programs from one run to the next."""

import functools
import itertools
import os
import uuid
from pathlib import Path

import jax
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

from igrpo_jax.distributed import abort
from igrpo_jax.storage.addresses import is_remote, path_of

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_PATIENCE = 300_000  # ms that one process waits for another
_questions = itertools.count()  # that `is_shared` has asked the others


def use_disk_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` ("" = nowhere); the JAX_COMPILATION_CACHE_DIR of the environment wins.

    Where several processes with GPUs do not share the folder, no programs are kept, with a warning.
    """
    named = _VARIABLE if os.environ.get(_VARIABLE) else "config.compilation_cache"
    folder = jax.config.jax_compilation_cache_dir or folder
    if not folder:
        return
    path = path_of(f"{named} = {folder!r}", folder)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(path))
        # JAX's own threshold of 1 s leaves out the many small programs of a small model.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if is_remote(path):
        # XLA keeps caches of its own below the folder, for GPUs, with code that cannot reach a bucket.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    elif jax.distributed.is_initialized() and jax.default_backend() == "gpu" and not is_shared(path):
        # JAX writes programs on process 0 only. It would read them, while XLA's compilers of the others waited for it,
        # because those of GPUs try out kernels together.
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        logging.warning(
            "%s = %r: is not the same folder on all hosts, so compiled programs are not kept; give one that all share",
            named,
            folder,
        )


@functools.cache
def is_shared(folder: Path) -> bool:
    """Returns whether all processes see the same local folder. All call it; it compiles nothing."""
    client, process, key = abort.client(), jax.process_index(), f"igrpo_jax/shared/{next(_questions)}"
    if process == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token = folder / f"shared_{uuid.uuid4().hex}"
            token.touch()
        except OSError:
            token = None
        client.key_value_set(f"{key}/name", token.name if token else "")
    name = client.blocking_key_value_get(f"{key}/name", _PATIENCE)
    client.key_value_set(f"{key}/seen/{process}", "yes" if name and (folder / name).exists() else "no")
    client.wait_at_barrier(key, _PATIENCE)
    if process == 0 and token:
        token.unlink(missing_ok=True)
    return all(seen == "yes" for _, seen in client.key_value_dir_get(f"{key}/seen/"))
