"""Which rows of a dispatch the slots take, over many dispatches, and which windows are copied."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_jax.sampling import inputs
from igrpo_jax.sampling.shapes import Sizes

SLOTS, PARTS = 6, 2
SIZES = Sizes(
    shard_slots=SLOTS, pages=20, page_size=4, length=16, longest_prompt=8, max_completion=8, steps_per_dispatch=2,
    prefill_chunk=8, parts=PARTS,
)  # fmt: skip
TABLES = [np.arange(SLOTS * 4, dtype=np.int32).reshape(SLOTS, 4) + 100 * shard for shard in range(2 * PARTS)]


@settings(deadline=None)
@given(
    st.sampled_from([4, SLOTS]),
    st.lists(st.tuples(*[st.sets(st.integers(0, SLOTS - 1), max_size=4)] * (2 * PARTS)), min_size=1, max_size=6),
)
def test_a_slot_that_goes_on_keeps_its_row_and_only_others_are_stale(width, dispatches):
    """In two groups of two parts each, where slots end and others come."""
    held = [{}, {}]
    for shards in dispatches:
        slots = [sorted(own) for own in shards]
        before = held
        rows, held = inputs.rows(SIZES, width, 16, slots, TABLES, [1] * len(slots), before)
        for group in range(2):
            own = {slot + part * SLOTS for part in range(PARTS) for slot in slots[group * PARTS + part]}
            taken = np.flatnonzero(rows.runs[group])
            assert dict(zip(rows.slot[group, taken].tolist(), taken.tolist(), strict=True)) == held[group]
            assert held[group].keys() == own
            # Of a part without slots 0: with its 1, a group with one active slot would never run.
            assert rows.min_active[group] == sum(map(bool, slots[group * PARTS : (group + 1) * PARTS]))
            stale = rows.stale[group, : rows.stale_count[group]].tolist()
            assert sorted(stale) == sorted(held[group][slot] for slot in own - before[group].keys())
            assert all(held[group][slot] == row for slot, row in before[group].items() if slot in own)
            for slot, row in held[group].items():
                part, local = divmod(slot, SLOTS)
                assert (rows.table[group, row] == TABLES[group * PARTS + part][local] + part * SIZES.pages).all()
