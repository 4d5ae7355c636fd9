"""Mamba-2 (Dao and Gu, arXiv 2405.21060) as Nemotron-H has it: a mixer with a state of fixed size per head.

1. Projections of a token give z (gate), x, B, C and dt; each a parameter of its own, so that heads shard over `tensor`.
2. A short causal convolution, per channel, and SiLU over x, B and C.
3. With dt = softplus(dt + bias), clipped, and A = -exp(a_log), the state of a head goes
       state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T,    y_t = state_t C_t + skip x_t
   B and C are those of the head's group. `step` does one token. `scan` does chunks: inside one, y is a masked product
   of all pairs of its tokens (the paper's dual form); from chunk to chunk goes the state, under jax.checkpoint.
4. y silu(z) is normalised per group of heads, and projected back.

A padded position has dt = 0: the state decays by exp(0) and nothing is added. The recurrence and the state are float32.

Legend: B batch, T query, L and S positions of a chunk, D model, N heads, G groups, R heads of a group (N = G R),
H head dim, P state, W tokens that the convolution sees.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from igrpo_jax.distributed.sharding import constrain
from igrpo_jax.models import cache as caches
from igrpo_jax.models.cache import MambaState
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.layers import normal, zeros


class Mamba2(nnx.Module):
    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        m, d = cfg.mamba, cfg.hidden_size
        heads, groups = (m.num_heads, m.head_dim), (m.num_groups, m.state_size)
        self.x_proj, self.z_proj = normal(rngs, (d, *heads), d), normal(rngs, (d, *heads), d)
        self.b_proj, self.c_proj = normal(rngs, (d, *groups), d), normal(rngs, (d, *groups), d)
        self.dt_proj = normal(rngs, (d, m.num_heads), d)
        self.x_conv = normal(rngs, (m.conv_size, *heads), m.conv_size)
        self.b_conv = normal(rngs, (m.conv_size, *groups), m.conv_size)
        self.c_conv = normal(rngs, (m.conv_size, *groups), m.conv_size)
        self.x_conv_bias, self.b_conv_bias, self.c_conv_bias = zeros(heads), zeros(groups), zeros(groups)
        # Of the paper's code: decays of exp(-1) to exp(-16) per unit of dt, which starts between 0.001 and 0.1.
        dt = jnp.exp(jnp.linspace(jnp.log(0.001), jnp.log(0.1), m.num_heads))
        self.dt_bias = nnx.Param(jnp.log(jnp.expm1(dt)))
        self.a_log = nnx.Param(jnp.log(jnp.linspace(1.0, 16.0, m.num_heads)))
        self.skip = nnx.Param(jnp.ones((m.num_heads,), jnp.float32))
        self.gated_scale = nnx.Param(jnp.ones(heads, jnp.float32))
        self.o_proj = zeros((*heads, d))  # a sublayer starts as the identity
        self.config, self.eps = cfg, cfg.rms_norm_eps

    def __call__(self, x: jax.Array, positions: jax.Array, entry: MambaState | None, length: jax.Array | None):
        """Output [B, T, D] and the state after each row's `length` tokens.

        The rows continue the states of `entry`, each that of one row or of several; None = they are the first tokens.
        """
        m, (batch, time) = self.config.mamba, x.shape[:2]
        before = caches.empty_state(self.config, batch, x.dtype) if entry is None else entry
        if before.state.shape[0] != batch:
            before = jax.tree.map(lambda y: jnp.repeat(y, batch // y.shape[0], axis=0), before)
        inputs = self._project(x)
        z = constrain(jnp.einsum("BTD,DNH->BTNH", x, self.z_proj[...]), "batch", "time", "heads", "head_dim")
        dt = jnp.einsum("BTD,DN->BTN", x, self.dt_proj[...]).astype(jnp.float32)
        dt = jnp.clip(jax.nn.softplus(dt + self.dt_bias[...].astype(jnp.float32)), *m.time_step_limit)
        if length is not None:
            dt = jnp.where((jnp.arange(time) < length[:, None])[..., None], dt, 0.0)
        seen = [jnp.concatenate(pair, axis=1) for pair in zip(before[:3], inputs, strict=True)]  # [B, W - 1 + T, ...]
        kernels = (self.x_conv, self.x_conv_bias), (self.b_conv, self.b_conv_bias), (self.c_conv, self.c_conv_bias)
        hidden, b, c = (_convolved(y, *(w[...] for w in kernel)) for y, kernel in zip(seen, kernels, strict=True))
        a = -jnp.exp(self.a_log[...].astype(jnp.float32))
        run = step if time == 1 else functools.partial(scan, chunk=m.chunk_size)
        y, state = run(hidden, dt, a, b, c, before.state)
        y += self.skip[...].astype(jnp.float32)[:, None] * hidden
        y = self._gated_norm(y, z).astype(x.dtype) * self.gated_scale[...]
        last = [_ending_at(part, length, m.conv_size - 1) for part in seen]
        return jnp.einsum("BTNH,NHD->BTD", y, self.o_proj[...]), MambaState(*last, state)

    def _project(self, x: jax.Array) -> list[jax.Array]:
        """x [B, T, N, H], B and C [B, T, G, P], as the convolution takes them."""
        found = [
            jnp.einsum("BTD,DNH->BTNH", x, self.x_proj[...]),
            jnp.einsum("BTD,DGP->BTGP", x, self.b_proj[...]),
            jnp.einsum("BTD,DGP->BTGP", x, self.c_proj[...]),
        ]
        return [constrain(y, *axes) for y, axes in zip(found, caches.MAMBA_AXES, strict=False)]

    def _gated_norm(self, y: jax.Array, z: jax.Array) -> jax.Array:
        """RMSNorm of y * silu(z) over the channels of each group of heads, float32."""
        gated = y * jax.nn.silu(z.astype(jnp.float32))
        groups = gated.reshape(*y.shape[:2], self.config.mamba.num_groups, -1)
        return (groups * jax.lax.rsqrt(jnp.mean(groups**2, axis=-1, keepdims=True) + self.eps)).reshape(y.shape)


def _convolved(seen: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """silu of the causal convolution: seen [B, W - 1 + T, ...] with kernel [W, ...] to [B, T, ...] float32."""
    width = kernel.shape[0]
    time = seen.shape[1] - (width - 1)
    taps = (seen[:, i : i + time].astype(jnp.float32) * kernel[i].astype(jnp.float32) for i in range(width))
    return jax.nn.silu(sum(taps) + bias.astype(jnp.float32))


def _ending_at(seen: jax.Array, length: jax.Array | None, count: int) -> jax.Array:
    """The `count` inputs before each row's end: of `seen` [B, count + T, ...] those from `length` [B] on."""
    if length is None:
        return seen[:, seen.shape[1] - count :]
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, count, axis=0))(seen, length)


def step(x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, state: jax.Array):
    """One token of each row: `scan` for T = 1, which reads and writes the state once."""
    shape, groups = x.shape, b.shape[2]
    x, dt, a, state = (_grouped(y, axis, groups) for y, axis in ((x[:, 0], 1), (dt[:, 0], 1), (a, 0), (state, 1)))
    state = jnp.exp(dt * a)[..., None, None] * state + jnp.einsum("BGRH,BGP->BGRHP", x * dt[..., None], b[:, 0])
    y = jnp.einsum("BGRHP,BGP->BGRH", state, c[:, 0])
    return y.reshape(shape), state.reshape(shape[0], *shape[2:], -1)


def scan(x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, state: jax.Array, chunk: int):
    """y without the skip, and the state after the last position.

    Args:
        x: [B, T, N, H] float32.
        dt: [B, T, N] float32, not negative; 0 where the position is padding.
        a: [N] float32, negative.
        b, c: [B, T, G, P] float32; head n belongs to group n // (N / G).
        state: [B, N, H, P] float32, before the first position.
        chunk: positions that are worked on at once. It holds [B, N, chunk, chunk] float32.

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
    """The axis N of `x` as G, R."""
    return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] to [chunks, B, size, ...], zeros (and so dt = 0) at the end."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _chunk(a: jax.Array, state: jax.Array, xs: tuple[jax.Array, ...]):
    """One chunk: the state after it [B, G, R, H, P], and y [B, L, G, R, H]."""
    x, dt, b, c = xs  # [B, L, G, R, H], [B, L, G, R], [B, L, G, P] twice
    decay = jnp.cumsum(dt * a, axis=1)  # [B, L, G, R]: log of what is left of the state before the chunk
    pairs = decay.transpose(0, 2, 3, 1)
    pairs = pairs[..., :, None] - pairs[..., None, :]  # [B, G, R, L, S]
    pairs = jnp.where(jnp.tri(pairs.shape[-1], dtype=bool), pairs, -jnp.inf)
    weights = jnp.einsum("BLGP,BSGP->BGLS", c, b)[:, :, None] * jnp.exp(pairs)
    inputs = x * dt[..., None]
    y = jnp.einsum("BGRLS,BSGRH->BLGRH", weights, inputs)
    y += jnp.einsum("BLGP,BGRHP->BLGRH", c, state) * jnp.exp(decay)[..., None]
    kept = inputs * jnp.exp(decay[:, -1:] - decay)[..., None]  # at the end of the chunk
    return jnp.exp(decay[:, -1])[..., None, None] * state + jnp.einsum("BSGRH,BSGP->BGRHP", kept, b), y
