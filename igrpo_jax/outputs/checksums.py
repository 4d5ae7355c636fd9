"""Checksums of the arrays of a tree, by which a checkpoint that is read is compared with what was saved."""

import errno
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from igrpo_jax.distributed import sharding
from igrpo_jax.storage.addresses import failures

_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
# How the errors of tensorstore begin, which are ValueErrors; those of files that are missing, short or changed begin
# with NOT_FOUND, OUT_OF_RANGE, DATA_LOSS, INVALID_ARGUMENT or FAILED_PRECONDITION.
_SERVICE = re.compile(
    "UNAVAILABLE|UNKNOWN|RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|ABORTED|CANCELLED"
)


class Damaged(Exception):
    """A checkpoint does not hold what was saved. The message names the array."""


def is_of_storage(error: BaseException) -> bool:
    """Returns whether an error of a read says that the disk or the bucket failed, and not that a file is damaged.

    Orbax raises some errors of tensorstore as the cause of one of its own, which says nothing about that.
    """
    if isinstance(error, failures()):
        return getattr(error, "errno", None) not in _MISSING and not isinstance(error, FileNotFoundError)
    number = re.search(r"\bOS error (\d+)", str(error))
    if number:
        return int(number[1]) not in _MISSING
    return bool(_SERVICE.match(str(error))) or (error.__cause__ is not None and is_of_storage(error.__cause__))


@functools.cache
def _checksum(replicated: jax.sharding.NamedSharding) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns a compiled function of an array: its checksum, [] uint32, and whether all elements are finite, [] bool.

    The checksum is the sum, modulo 2**32, of the bits of every element times an odd number that follows from the
    element's index. Any change of one element changes it. A sum of integers does not depend on its order, so the
    checksum is the same on every mesh.

    Args:
        replicated: the sharding of the results.
    """

    def program(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            index = index * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32), jnp.all(jnp.isfinite(x))

    return jax.jit(program, out_shardings=replicated)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their path, such as "params.blocks/0/norm/scale"."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def fingerprint(tree: Any) -> tuple[dict[str, int], list[str]]:
    """Returns the checksums of a tree's arrays by path, and the paths of the arrays that are not all finite."""
    sums, bad = {}, []
    for name, x in named_leaves(tree).items():
        # The checksums are computed one after the other, because too many collectives in flight at once deadlock XLA's
        # CPU devices.
        value, finite = jax.device_get(_checksum(sharding.replicated(x.sharding.mesh))(x))
        sums[name] = int(value)
        bad += [name] * (not finite)
    return sums, bad


def check(tree: Any, expected: dict[str, int], prefix: str = "") -> None:
    """Raises Damaged if an array of `tree` has another checksum than it was saved with.

    Args:
        expected: checksums by path, as `fingerprint` returned them.
        prefix: what stands before the paths of `tree` in `expected`.
    """
    wrong = [name for name, value in fingerprint(tree)[0].items() if expected.get(prefix + name) != value]
    if wrong:
        raise Damaged(f"{prefix}{wrong[0]} is not as it was saved")
