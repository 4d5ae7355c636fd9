"""The programs of the sampler that settings ask for, checked against the model and the devices; nothing is compiled."""

from dataclasses import replace
from functools import partial

import jax

from igrpo_jax.config import Config
from igrpo_jax.distributed import cluster, teams
from igrpo_jax.distributed.sharding import batch_shards
from igrpo_jax.errors import InputError
from igrpo_jax.models import heads
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.costs import ModelCosts
from igrpo_jax.models.paged_splash import holds_table
from igrpo_jax.sampling import page_count
from igrpo_jax.sampling.layout import choose_tensor, reads_pages, sampler_mesh
from igrpo_jax.sampling.pages import pages_for
from igrpo_jax.sampling.programs import SamplerPrograms
from igrpo_jax.sampling.shapes import LANES, Sizes

PAGE_SIZE = {"cpu": 16}  # positions of a page by platform: a kernel reads larger ones faster, smaller ones waste less
OTHER_PAGE_SIZE = 64


def open_programs(
    config: Config,
    cfg: DecoderConfig,
    mesh: jax.sharding.Mesh,
    eos_ids: tuple[int, ...],
    memory: float | None,
    *,
    longest_prompt: int,
    max_completion: int,
    length: int,
) -> SamplerPrograms:
    """Returns programs with the settings of `config`, of the sizes that `make_programs` describes.

    Args:
        memory: bytes of each device that sampling may use; None = any.
    """
    return make_programs(
        cfg,
        mesh,
        eos_ids,
        tensor=config.rollout.mesh.tensor,
        slots=config.rollout.slots,
        longest_prompt=longest_prompt,
        max_completion=max_completion,
        length=length,
        dtype=config.model.dtype,
        steps_per_dispatch=config.rollout.steps_per_dispatch,
        pages=config.rollout.pages,
        page_size=config.rollout.page_size,
        memory=memory,
    )


def make_programs(
    cfg: DecoderConfig,
    mesh: jax.sharding.Mesh,
    eos_ids: tuple[int, ...],
    *,
    tensor: int | None = None,
    slots: int,
    longest_prompt: int,
    max_completion: int,
    length: int | None = None,
    dtype: str,
    steps_per_dispatch: int,
    pages: int = 0,
    page_size: int = 0,
    memory: float | None = None,
    prefill_chunk: int = 2048,
) -> SamplerPrograms:
    """Returns the programs of this process's team, for an `Engine`.

    Args:
        mesh: the mesh of the run, which the weights come from.
        tensor: devices that share one copy of the weights; None = those of `choose_tensor`.
        slots: completions decoded at once, over all processes.
        longest_prompt: longest prompt in tokens.
        max_completion: most tokens of a completion (M).
        length: most tokens of the two together; None = their sum.
        steps_per_dispatch: decode steps of one call at most (K).
        pages: pages of the cache on each device; 0 = as many as all slots can need, if `memory` is estimated to hold
            them (`page_count.fitted` counts them).
        page_size: positions of a page; 0 = 16 on a CPU, 64 elsewhere.
        memory: bytes of each device that sampling may use; None = any.
        prefill_chunk: tokens of each shard that are prefilled at once, at most.

    Raises:
        InputError: the slots don't divide over the groups of devices, a group does not divide the model, or the pages
            don't hold one sequence, or the kernel that reads pages cannot hold the page numbers of a group's slots.
    """
    length = length or longest_prompt + max_completion
    page_size = page_size or PAGE_SIZE.get(mesh.devices.flat[0].platform, OTHER_PAGE_SIZE)
    if tensor is None:
        chosen = partial(choose_tensor, cfg, mesh, dtype, slots=slots, length=length, lanes=LANES, page_size=page_size)
        tensor = cluster.from_first(partial(chosen, memory=memory))
    whole_mesh = sampler_mesh(cfg, mesh, tensor, slots)
    sampler_cfg = heads.spread_config(cfg, tensor)
    sizes = Sizes(
        shard_slots=slots // (batch_shards(whole_mesh) * sampler_cfg.row_parts),
        pages=pages,
        page_size=page_size,
        length=length,
        longest_prompt=longest_prompt,
        max_completion=max_completion,
        steps_per_dispatch=steps_per_dispatch,
        prefill_chunk=prefill_chunk,
        parts=sampler_cfg.row_parts,
        memory=None if pages else memory,
    )
    if not pages:
        sizes = replace(sizes, pages=page_count.estimated_pages(sizes, ModelCosts(sampler_cfg, dtype, tensor)))
    _check_sizes(sizes, sampler_cfg, tensor, slots)
    return SamplerPrograms(sampler_cfg, teams.team_mesh(whole_mesh, teams.team_of(whole_mesh)), eos_ids, dtype, sizes)


def _check_sizes(sizes: Sizes, cfg: DecoderConfig, tensor: int, slots: int) -> None:
    """Raises InputError if the longest sequence does not fit in the pages next to its prompt's last page, or if the
    page numbers do not fit in the memory of the TPU's kernel."""
    if sizes.pages < sizes.least_pages:
        need = f"{sizes.least_pages} page{'s' * (sizes.least_pages != 1)} of {sizes.page_size}"
        raise InputError(
            f"config.rollout.pages = {sizes.pages}: a prompt and its completion may take {sizes.length} tokens, which "
            f"need {need}; set it to at least that, or to 0 for what memory holds"
        )
    if cfg.attention.startswith("splash") and reads_pages(cfg, tensor):
        _check_table(sizes, slots)


def _check_table(sizes: Sizes, slots: int) -> None:
    """Raises InputError if the TPU's kernel cannot hold the page numbers of all slots of a group."""
    rows = sizes.shard_slots * sizes.parts
    if holds_table(rows, sizes.slot_pages):
        return
    larger = [sizes.page_size << i for i in range(1, 4)]
    enough = [size for size in larger if holds_table(rows, pages_for(sizes.length, size))]
    raise InputError(
        f"config.rollout.slots = {slots}: the TPU's kernel cannot hold the page numbers of the {rows:,} slots of each "
        f"group, up to {sizes.slot_pages:,} pages of {sizes.page_size} tokens for each; lower it or the length of "
        f"completions{f', or set config.rollout.page_size to {enough[0]}' if enough else ''}"
    )


def with_slots_for(config: Config, mesh: jax.sharding.Mesh, samples: int) -> Config:
    """Returns `config` with no more slots than `samples` need, rounded up to a multiple of the devices.

    Groups of devices, and the parts of a group that hold different sequences, divide the devices in every layout.
    """
    slots = min(config.rollout.slots, -(-samples // mesh.size) * mesh.size)
    return replace(config, rollout=replace(config.rollout, slots=slots))
