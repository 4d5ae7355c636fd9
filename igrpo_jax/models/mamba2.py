"""Mamba-2 (Dao and Gu, arXiv 2405.21060) as in Nemotron-H: a mixer with a state of fixed size per head.

1. Projections of each token give z (the gate), x, B, C and dt. Each projection is a separate parameter, so that heads
   shard over `tensor`.
2. x, B and C pass through a short causal convolution, per channel, and SiLU.
3. With dt = softplus(dt + bias), clipped, and A = -exp(a_log), the state of a head follows
       state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T,    y_t = state_t C_t + skip x_t
   where B and C are those of the head's group. `step` computes one token. `scan` computes chunks: inside a chunk, y is
   a masked product over all pairs of its tokens (the paper's dual form), and the state passes from one chunk to the
   next, under jax.checkpoint.
4. y silu(z) is normalised per group of heads and projected to the model's width.

A padded position has dt = 0, so that the state decays by exp(0) = 1 and nothing is added. The recurrence and the state
are float32.

In a packed sequence only 2 and 3 need to know which token follows which. They run chunk by chunk: each chunk is a row
that continues the state after another chunk, the inputs of the convolution included (`tree_scan`). Prompts that are
read one after another in a packed sequence are computed in the same way, each from the state in its lane (`lane_scan`).

Legend: B batch (rows, or packed sequences), T query, F tokens of a packed sequence, L and S positions of a chunk, D
model, N heads, G groups, R heads of a group (N = G R), H head dim, P state, W tokens that the convolution sees.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from igrpo_jax.distributed.sharding import constrain, logical_axes, spec
from igrpo_jax.models import cache as caches
from igrpo_jax.models.cache import MambaState
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.lane_scan import Lanes, lane_scan
from igrpo_jax.models.layers import normal, zeros
from igrpo_jax.models.products import product
from igrpo_jax.models.rotary import Positions
from igrpo_jax.models.segments import Chain, Segments
from igrpo_jax.models.tree_scan import tree_scan

HEADS = ("batch", "time", "heads", "head_dim")
# The parameters of what mixes positions: the convolution, and the recurrence with its skip.
MIXED = ("x_conv", "b_conv", "c_conv", "x_conv_bias", "b_conv_bias", "c_conv_bias", "a_log", "skip")


class Mamba2(nnx.Module):
    """The Mamba-2 mixer: [B, T, D] to [B, T, D], and the states after the tokens."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        mamba, d = cfg.mamba, cfg.hidden_size
        heads, groups = (mamba.num_heads, mamba.head_dim), (mamba.num_groups, mamba.state_size)
        self.x_proj = normal(rngs, (d, *heads), d)
        self.z_proj = normal(rngs, (d, *heads), d)
        self.b_proj = normal(rngs, (d, *groups), d)
        self.c_proj = normal(rngs, (d, *groups), d)
        self.dt_proj = normal(rngs, (d, mamba.num_heads), d)
        self.x_conv = normal(rngs, (mamba.conv_size, *heads), mamba.conv_size)
        self.b_conv = normal(rngs, (mamba.conv_size, *groups), mamba.conv_size)
        self.c_conv = normal(rngs, (mamba.conv_size, *groups), mamba.conv_size)
        self.x_conv_bias = zeros(heads)
        self.b_conv_bias = zeros(groups)
        self.c_conv_bias = zeros(groups)
        # The paper's code has these start values: decays of exp(-1) to exp(-16) per unit of dt, and dt between 0.001
        # and 0.1.
        dt = jnp.exp(jnp.linspace(jnp.log(0.001), jnp.log(0.1), mamba.num_heads))
        self.dt_bias = nnx.Param(jnp.log(jnp.expm1(dt)))
        self.a_log = nnx.Param(jnp.log(jnp.linspace(1.0, 16.0, mamba.num_heads)))
        self.skip = nnx.Param(jnp.ones((mamba.num_heads,), jnp.float32))
        self.gated_scale = nnx.Param(jnp.ones(heads, jnp.float32))
        self.o_proj = zeros((*heads, d))  # with the residual, a sublayer starts as the identity
        self.cfg = cfg

    def __call__(self, x: jax.Array, positions: Positions, entry: MambaState | Lanes | Segments | None):
        """Returns the output [B, T, D], and what the states of `entry` become; None if it has no states.

        Args:
            x: [B, T, D].
            entry: the states that the rows continue; lanes, with states of type MambaState, where the only row packs
                their sequences; segments where each row is a packed sequence; None where rows begin with their first
                tokens.
        """
        inputs = self._project(x)
        z = constrain(product("BTD,DNH->BTNH", x, self.z_proj), *HEADS)
        dt = product("BTD,DN->BTN", x, self.dt_proj).astype(jnp.float32)
        dt = jax.nn.softplus(dt + self.dt_bias[...].astype(jnp.float32))
        dt = jnp.clip(dt, *self.cfg.mamba.time_step_limit)
        weights = {name: getattr(self, name)[...].astype(jnp.float32) for name in MIXED}
        if isinstance(entry, Segments):
            y, kept = _packed(self.cfg, weights, inputs, dt, entry.chain), None
        elif isinstance(entry, Lanes):
            y, kept = _in_lanes(self.cfg.mamba.chunk_size, weights, inputs, dt, entry)
        else:
            before = caches.empty_state(self.cfg, x.shape[0], x.dtype) if entry is None else entry
            after, y = _mixed(weights, before, inputs, dt, None, self.cfg.mamba.chunk_size)
            kept = None if entry is None else after
        y = self._gated_norm(y, z).astype(x.dtype) * self.gated_scale[...]
        return product("BTNH,NHD->BTD", y, self.o_proj), kept

    def _project(self, x: jax.Array) -> list[jax.Array]:
        """Returns x [B, T, N, H], B and C [B, T, G, P], the inputs of the convolution."""
        inputs = [
            product("BTD,DNH->BTNH", x, self.x_proj),
            product("BTD,DGP->BTGP", x, self.b_proj),
            product("BTD,DGP->BTGP", x, self.c_proj),
        ]
        return [constrain(y, *axes) for y, axes in zip(inputs, caches.MAMBA_AXES, strict=False)]

    def _gated_norm(self, y: jax.Array, z: jax.Array) -> jax.Array:
        """Returns the RMSNorm of y * silu(z) over the channels of each group of heads: [B, T, N, H] float32."""
        gated = y * jax.nn.silu(z.astype(jnp.float32))
        groups = gated.reshape(*y.shape[:2], self.cfg.mamba.num_groups, -1)
        return (groups * jax.lax.rsqrt(jnp.mean(groups**2, axis=-1, keepdims=True) + self.cfg.rms_norm_eps)).reshape(
            y.shape
        )


def _packed(
    cfg: DecoderConfig, weights: dict[str, jax.Array], inputs: list[jax.Array], dt: jax.Array, chain: Chain
) -> jax.Array:
    """Returns y [B, F, N, H] float32 of packed sequences, in which a completion continues the state of its prefix.

    Each shard of the batch and of the heads runs its own loop over chunks, because under `shard_map` the compiler needs
    no collective to take the tokens of a chunk.

    Args:
        weights: those of MIXED.
        inputs: x [B, F, N, H], B and C [B, F, G, P], before the convolution.
        dt: [B, F, N] float32.
    """

    def run(weights, tokens, chain):
        heads, groups = tokens[0].shape[2:], tokens[1].shape[2:]
        tails = [(1, cfg.mamba.conv_size - 1, *inner) for inner in (heads, groups, groups)]

        def body(weights, before, tokens, count):
            *flat, state = before
            before = MambaState(*(x.reshape(shape) for x, shape in zip(flat, tails, strict=True)), state)
            *inputs, dt = jax.tree.map(lambda x: x[None], tokens)
            (*last, state), y = _mixed(weights, before, inputs, dt, count[None], dt.shape[1])
            return [*map(jnp.ravel, last), state], y[0]

        # All are float32, because the gradients of all completions of a prefix add up in them. Those of the convolution
        # are flat: a TPU pads an axis of 3 tokens to 128.
        empty = [*(jnp.zeros(math.prod(shape)) for shape in tails), jnp.zeros((1, *heads, groups[1]))]
        return tree_scan(body, weights, empty, tokens, chain)

    tokens, chain = (*inputs, dt), jax.tree.map(jnp.asarray, chain)
    if jax.sharding.get_abstract_mesh().empty:
        return run(weights, tokens, chain)
    in_specs = (
        {name: spec(logical_axes(name)) for name in weights},
        tuple(spec(axes) for axes in (*caches.MAMBA_AXES[:3], HEADS[:3])),
        jax.tree.map(lambda _: spec(("batch",)), chain),
    )
    # check_vma is off because a loop would need its first values marked with the axes over which they vary.
    return jax.shard_map(run, in_specs=in_specs, out_specs=spec(HEADS), check_vma=False)(weights, tokens, chain)


def _in_lanes(
    chunk: int, weights: dict[str, jax.Array], inputs: list[jax.Array], dt: jax.Array, lanes: Lanes
) -> tuple[jax.Array, MambaState]:
    """Returns y [1, F, N, H] float32 of the packed sequence, and the states of the lanes after their last tokens.

    Where the batch is sharded, this runs under a `shard_map` of the caller, by which a shard has its tokens and lanes.

    Args:
        chunk: tokens that are computed at once.
        weights: those of MIXED.
        inputs: x [1, F, N, H], B and C [1, F, G, P], before the convolution.
        dt: [1, F, N] float32.
    """

    def body(before, tokens, count):
        *inputs, dt = jax.tree.map(lambda x: x[None], tokens)
        state, y = _mixed(weights, before, inputs, dt, count[None], dt.shape[1])
        return state, y[0]

    states, y = lane_scan(body, jax.tree.map(lambda x: x[0], (*inputs, dt)), lanes, chunk)
    return y[None], states


def _mixed(
    weights: dict[str, jax.Array],
    before: MambaState,
    inputs: list[jax.Array],
    dt: jax.Array,
    length: jax.Array | None,
    chunk: int,
) -> tuple[MambaState, jax.Array]:
    """Applies the convolution and the recurrence to rows: returns the state after them, and y [B, T, N, H] float32.

    Args:
        weights: those of MIXED, float32.
        before: the states that the rows continue.
        inputs: x [B, T, N, H], B and C [B, T, G, P], before the convolution.
        dt: [B, T, N] float32; 0 if the position is padding.
        length: [B] int32, real tokens of each row; None = all.
        chunk: positions that are computed at once.
    """
    seen = [jnp.concatenate(pair, axis=1) for pair in zip(before[:3], inputs, strict=True)]  # [B, W - 1 + T, ...]
    kernels = ((weights[f"{name}_conv"], weights[f"{name}_conv_bias"]) for name in "xbc")
    hidden, b, c = (_convolved(y, *kernel) for y, kernel in zip(seen, kernels, strict=True))
    run = step if dt.shape[1] == 1 else functools.partial(scan, chunk=chunk)
    y, state = run(hidden, dt, -jnp.exp(weights["a_log"]), b, c, before.state)
    last = [_ending_at(part, length, weights["x_conv"].shape[0] - 1) for part in seen]
    return MambaState(*last, state), y + weights["skip"][:, None] * hidden


def _convolved(seen: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns silu(causal convolution): `seen` [B, W - 1 + T, ...] with kernel [W, ...] gives [B, T, ...] float32."""
    width = kernel.shape[0]
    time = seen.shape[1] - (width - 1)
    taps = (seen[:, i : i + time].astype(jnp.float32) * kernel[i] for i in range(width))
    return jax.nn.silu(sum(taps) + bias)


def _ending_at(seen: jax.Array, length: jax.Array | None, count: int) -> jax.Array:
    """Returns the last `count` inputs of each row.

    Args:
        seen: [B, count + T, ...], `count` inputs before the row and then those of its T tokens.
        length: [B] int32, real tokens of each row; None = all.

    Returns:
        [B, count, ...].
    """
    if length is None:
        return seen[:, seen.shape[1] - count :]
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, count, axis=0))(seen, length)


def step(x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, state: jax.Array):
    """Does what `scan` does for T = 1, and reads and writes the state only once."""
    shape, groups = x.shape, b.shape[2]
    x, dt, a, state = (_grouped(y, axis, groups) for y, axis in ((x[:, 0], 1), (dt[:, 0], 1), (a, 0), (state, 1)))
    state = jnp.exp(dt * a)[..., None, None] * state + jnp.einsum("BGRH,BGP->BGRHP", x * dt[..., None], b[:, 0])
    y = jnp.einsum("BGRHP,BGP->BGRH", state, c[:, 0])
    return y.reshape(shape), state.reshape(shape[0], *shape[2:], -1)


def scan(x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, state: jax.Array, chunk: int):
    """Computes the recurrence over T positions: y without the skip, and the state after the last position.

    Args:
        x: [B, T, N, H] float32.
        dt: [B, T, N] float32, not negative; 0 if the position is padding.
        a: [N] float32, negative.
        b, c: [B, T, G, P] float32; head n belongs to group n // (N / G).
        state: [B, N, H, P] float32, before the first position.
        chunk: positions that are computed at once, which needs [B, N, chunk, chunk] float32 of memory.

    Returns:
        y [B, T, N, H] and the state [B, N, H, P], float32.
    """
    (batch, time, heads, head_dim), groups = x.shape, b.shape[2]
    chunk = min(chunk, time)
    xs = [_chunks(y, chunk) for y in (_grouped(x, 2, groups), _grouped(dt, 2, groups), b, c)]
    body = jax.checkpoint(functools.partial(_chunk, _grouped(a, 0, groups)))
    state, y = jax.lax.scan(body, _grouped(state, 1, groups), tuple(xs))
    y = jnp.moveaxis(y, 0, 1).reshape(batch, -1, heads, head_dim)[:, :time]
    return y, state.reshape(batch, heads, head_dim, -1)


def _grouped(x: jax.Array, axis: int, groups: int) -> jax.Array:
    """Returns `x` with its axis `axis`, N, split into G and R."""
    return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """Returns `x` [B, T, ...] as [chunks, B, size, ...], with zeros (and so dt = 0) at the end."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _chunk(a: jax.Array, state: jax.Array, xs: tuple[jax.Array, ...]):
    """Computes one chunk: returns the state after it [B, G, R, H, P], and y [B, L, G, R, H]."""
    x, dt, b, c = xs  # [B, L, G, R, H], [B, L, G, R], [B, L, G, P] twice
    decay = jnp.cumsum(dt * a, axis=1)  # [B, L, G, R]: log of the fraction that is left of the state before the chunk
    pairs = decay.transpose(0, 2, 3, 1)
    pairs = pairs[..., :, None] - pairs[..., None, :]  # [B, G, R, L, S]
    pairs = jnp.where(jnp.tri(pairs.shape[-1], dtype=bool), pairs, -jnp.inf)
    weights = jnp.einsum("BLGP,BSGP->BGLS", c, b)[:, :, None] * jnp.exp(pairs)
    inputs = x * dt[..., None]
    y = jnp.einsum("BGRLS,BSGRH->BLGRH", weights, inputs)
    y += jnp.einsum("BLGP,BGRHP->BLGRH", c, state) * jnp.exp(decay)[..., None]
    kept = inputs * jnp.exp(decay[:, -1:] - decay)[..., None]  # what is left of the inputs at the end of the chunk
    return jnp.exp(decay[:, -1])[..., None, None] * state + jnp.einsum("BSGRH,BSGP->BGRHP", kept, b), y
