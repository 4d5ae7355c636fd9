"""How many pages of the KV cache a device holds: by a formula before anything is compiled, then by the compiler.

If memory allows, there are as many pages as all slots can need. Otherwise the pages get the memory that is left once
the compiler has counted the temporaries and the code of the sampler's programs. Neither depends on the number of pages,
so programs with the fewest pages are compiled for the count.
"""

from dataclasses import replace

from igrpo_jax.distributed import chips, cluster
from igrpo_jax.models.costs import ModelCosts
from igrpo_jax.sampling.layout import pages_in, reads_pages
from igrpo_jax.sampling.programs import SamplerPrograms
from igrpo_jax.sampling.shapes import Sizes


def estimated_pages(sizes: Sizes, costs: ModelCosts) -> int:
    """Returns how many pages there are to be, with a tenth of the memory left to temporaries and code.

    Args:
        sizes: its field `pages` is ignored.
    """
    if sizes.memory is None or not costs.token_bytes:  # without attention pages have no bytes
        return sizes.most_pages
    held = pages_in(sizes.memory, costs, sizes.parts * (sizes.shard_slots + sizes.lanes), sizes.page_size)
    if not reads_pages(costs.cfg, costs.tensor):  # decoding copies the pages of all slots
        held -= sizes.shard_slots * sizes.slot_pages
    return max(sizes.least_pages, min(sizes.most_pages, held))


def fitted(programs: SamplerPrograms) -> SamplerPrograms:
    """Returns `programs` with as many pages as memory holds by the compiler's count; themselves where it is no bound.

    It compiles programs for the count. Those with the fewest pages are returned where no more fit.
    """
    sizes = programs.sizes
    if sizes.memory is None or sizes.pages == sizes.most_pages:
        return programs
    fewest = programs.resized(replace(sizes, pages=sizes.least_pages))
    # Compilers of several processes may talk to each other: all of them count, and the first one's count is taken.
    counted = counted_pages(fewest, sizes.memory)
    pages = cluster.from_first(lambda: counted)
    return fewest if pages == sizes.least_pages else programs.resized(replace(sizes, pages=pages))


def counted_pages(programs: SamplerPrograms, memory: float) -> int:
    """Returns how many pages fit in `chips.FILL_FRACTION` of `memory` besides everything that the compiler counts.

    The rest of the memory also holds the code of the update.

    Args:
        programs: those with the fewest pages, which are compiled for the count.
    """
    sizes, compiled = programs.sizes, (programs.decode, programs.prefill, programs.fork)
    for program in compiled:
        program.compiled(*program.largest[0])
    code = sum(len(program.shapes) * program.code_bytes for program in compiled)
    left = chips.FILL_FRACTION * memory - programs.predicted_bytes - code
    more = int(left / (sizes.page_size * programs.costs.token_bytes))
    return max(sizes.least_pages, min(sizes.most_pages, sizes.least_pages + more))
