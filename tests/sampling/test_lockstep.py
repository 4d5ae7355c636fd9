"""Every kind of call arrives as it was sent."""

import jax
import numpy as np
import pytest

from igrpo_jax.sampling import lockstep
from igrpo_jax.sampling.lockstep import Call
from igrpo_jax.sampling.programs import traced
from igrpo_jax.sampling.state import Chunk, Fork, Rows, Sampling


def arrays(kind):
    return kind(*(np.arange(2 * n).reshape(2, n).astype(np.int32) for n in range(1, len(kind._fields) + 1)))


@pytest.mark.parametrize(
    "call",
    [
        Call("prefill", (128,), arrays(Chunk), None),
        Call("fork", (), arrays(Fork), traced(Sampling(0.5, 0.9, 20))),
        Call("decode", (8, 64), arrays(Rows), traced(Sampling(1.0))),
        Call("harvest", (), None, np.arange(16, dtype=np.int32)),
    ],
    ids=lambda call: call.program,
)
def test_a_call_arrives_as_it_was_sent(call):
    heard = lockstep.from_bytes(lockstep.to_bytes(call))
    assert (heard.program, heard.shape, type(heard.split)) == (call.program, call.shape, type(call.split))
    for ours, theirs in ((heard.split, call.split), (heard.whole, call.whole)):
        assert type(ours) is type(theirs)
        leaves, sent = jax.tree.leaves(ours), jax.tree.leaves(theirs)
        assert [x.dtype for x in leaves] == [x.dtype for x in sent]
        jax.tree.map(np.testing.assert_array_equal, leaves, sent)


def test_the_end_is_no_call():
    assert lockstep.from_bytes(lockstep.to_bytes(None)) is None
