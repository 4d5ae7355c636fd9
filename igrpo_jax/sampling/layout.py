"""How many neighbouring devices share a copy of the weights while completions are sampled, chosen by formula.

The more devices a group has, the smaller the part of the weights that each reads for a token, and the more rows it
decodes. The price is the reductions that a group waits for and, where it has more devices than the model has key and
value heads, copies of heads or exchanges between devices that hold the same head for different sequences
(`models.heads`).
"""

import dataclasses

import jax

from igrpo_jax.distributed import sharding, teams
from igrpo_jax.distributed.chips import CHIPS
from igrpo_jax.errors import InputError
from igrpo_jax.models import decoder
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.costs import ModelCosts
from igrpo_jax.models.heads import spread_config
from igrpo_jax.models.paged import page_layout
from igrpo_jax.sampling.pages import pages_for

SIZES = (1, 2, 4, 8)  # of a group
TIME_TOLERANCE = 1.05  # a smaller group may take this multiple of the least time: fewer devices wait for each other
MEMORY_FRACTION = 0.9  # of the memory that sampling may use; the rest is for the code and the temporaries of programs


def choose_tensor(
    cfg: DecoderConfig,
    mesh: jax.sharding.Mesh,
    dtype: str,
    *,
    slots: int,
    length: int,
    lanes: int,
    page_size: int,
    memory: float | None,
) -> int:
    """Returns the smallest group whose time per token is at most TIME_TOLERANCE times the least.

    The time is that of `ModelCosts.decode_seconds`. Rows are assumed to hold half of the longest sequence on average.
    Only as many slots of a group decode at once as its memory has pages for. A group lies within a slice (of GPUs: a
    node), and its size divides the model. Sizes with which attention reads pages in place come before all others. If no
    size fits, and on devices whose figures are not known, such as CPUs, the size is that of `mesh`.

    Args:
        mesh: mesh of the training.
        slots: completions decoded at once, over all devices.
        length: most tokens of a prompt and its completion.
        lanes: prompts that a group prefills at once.
        page_size: positions of a page.
        memory: bytes of each device that sampling may use; None = any.
    """
    chip, given = CHIPS.get(mesh.devices.flat[0].device_kind), mesh.shape["tensor"]
    if chip is None:
        return given
    seconds: dict[int, tuple[bool, float]] = {}
    for tensor in sorted({*SIZES, given} & set(teams.tensors(mesh))):
        groups, sampler_cfg = mesh.size // tensor, spread_config(cfg, tensor)
        if slots % (groups * sampler_cfg.row_parts) or not divides(sampler_cfg, tensor):
            continue
        rows, costs, read = slots // groups, ModelCosts(sampler_cfg, dtype, tensor), length // 2
        held, in_place = rows, reads_pages(sampler_cfg, tensor)
        if memory is not None:
            pages = pages_in(memory, costs, rows + lanes, page_size)
            of_row = pages_for(read, page_size) * (1 if in_place else 2)  # decoding copies what it cannot read in place
            held = min(rows, sampler_cfg.row_parts * (pages // of_row)) if pages > pages_for(length, page_size) else 0
        if held:
            seconds[tensor] = not in_place, costs.decode_seconds(chip, held, read) * rows / held
    if not seconds:
        return given
    copies, least = min(seconds.values())
    return min(tensor for tensor, time in seconds.items() if time <= (copies, TIME_TOLERANCE * least))


def sampler_mesh(cfg: DecoderConfig, mesh: jax.sharding.Mesh, tensor: int, slots: int) -> jax.sharding.Mesh:
    """Returns the mesh that all processes sample on, with groups of `tensor` devices.

    Raises:
        InputError: `tensor` divides the devices or the model not evenly, or the groups the slots; or devices of several
            slices would be in a group.
    """
    whole = teams.sampler_mesh(mesh, tensor)
    if tensor not in (allowed := teams.tensors(mesh)):
        raise InputError(
            f"config.rollout.mesh.tensor = {tensor}: devices that share weights lie within a slice (of GPUs: a node); "
            f"set it to {' or '.join(map(str, allowed))}"
        )
    sampler_cfg = spread_config(cfg, tensor)
    sharding.check_divides(whole, decoder.shapes(sampler_cfg), "config.rollout.mesh", only="tensor")
    groups, parts = sharding.batch_shards(whole), sampler_cfg.row_parts
    if slots % (groups * parts):
        of_parts = f" times {parts} devices with the same key and value head = {groups * parts}" if parts > 1 else ""
        raise InputError(
            f"config.rollout.slots = {slots}: must be a multiple of {mesh.size} devices / {tensor} that share weights "
            f"(rollout.mesh.tensor) = {groups}{of_parts}, over which the slots are split"
        )
    return whole


def reads_pages(cfg: DecoderConfig, tensor: int) -> bool:
    """Returns whether decoding reads pages where they lie, with the heads of `cfg` split over `tensor` devices."""
    return page_layout(cfg.attention, cfg.head_dim, cfg.num_kv_heads // tensor) is not None


def uses_output_major(mesh: jax.sharding.Mesh) -> bool:
    """Returns whether the rollout copy of the weights on `mesh` is output-major (`models.products`): on CPUs."""
    return mesh.devices.flat[0].platform == "cpu"


def shares_weights(mesh: jax.sharding.Mesh, tensor: int | None) -> bool:
    """Returns whether weights on `mesh` are sure to lie as the sampler takes them, so that it needs no copy.

    Args:
        tensor: config.rollout.mesh.tensor, None if it is chosen.
    """
    as_given = mesh.size == 1 or tensor == mesh.shape["tensor"]
    return mesh.shape["fsdp"] == 1 and as_given and not uses_output_major(mesh)


def divides(cfg: DecoderConfig, tensor: int) -> bool:
    """Returns whether all that is split over `tensor` devices can be split evenly."""
    # Each kind of sublayer once has the same sizes, in a tenth of the time.
    each_kind_once = dataclasses.replace(cfg, pattern="".join(dict.fromkeys(cfg.pattern)))
    split = {size for path, shape in decoder.shapes(each_kind_once).items() for size in _split(path, shape)}
    return all(size % tensor == 0 for size in split)


def _split(path: str, shape: tuple[int, ...]) -> list[int]:
    """Returns the sizes of the dimensions of a parameter that the axis `tensor` splits."""
    axes = sharding.spec(sharding.logical_axes(path))
    return [size for axis, size in zip(axes, shape, strict=True) if axis == "tensor"]


def pages_in(memory: float, costs: ModelCosts, states: int, page_size: int) -> int:
    """Returns how many pages MEMORY_FRACTION of `memory` holds in addition to the weights and `states` states of
    Mamba-2.

    The number is not positive where these alone do not fit. Without attention pages have no bytes, and 2**31 fit.
    """
    weights = costs.item_bytes * costs.cfg.num_params / costs.tensor
    free = MEMORY_FRACTION * memory - weights - states * costs.state_bytes
    if not costs.token_bytes:
        return 2**31 if free > 0 else 0
    return int(free / (costs.token_bytes * page_size))
