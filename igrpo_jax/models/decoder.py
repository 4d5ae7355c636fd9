"""One decoder for every model family: `x + mixer(norm(x))` for each letter of `DecoderConfig.pattern`.

The module is declared with nnx and split once per configuration. The rest of the package holds parameters as a flat
dict from path ("blocks/0/mixer/q_proj") to array, and calls the pure functions below under plain `jax.jit` and
`jax.grad`. `apply` does not include the head: logits exist only where they are asked for (`logits`, `logprobs`).

Legend: B batch, T query, R rows (R = B T), D model, V vocab.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from igrpo_jax.distributed import sharding
from igrpo_jax.models import lora, products
from igrpo_jax.models.cache import Cache
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.layers import MLP, Attention, RMSNorm
from igrpo_jax.models.mamba2 import Mamba2
from igrpo_jax.models.rotary import Positions, with_angles
from igrpo_jax.models.segments import Segments

Params = dict[str, jax.Array]
MIXERS: dict[str, Callable[..., nnx.Module]] = {"*": Attention, "-": MLP, "M": Mamba2}


# What remat keeps of a sublayer for the backward pass besides its input: nothing, or its products with weights.
KEPT = {"full": None, "dots": jax.checkpoint_policies.save_only_these_names(products.NAME)}


class Block(nnx.Module):
    """One sublayer with its norm and residual."""

    def __init__(self, kind: str, cfg: DecoderConfig, rngs: nnx.Rngs):
        self.kind = kind
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mixer = MIXERS[kind](cfg, rngs)

    def __call__(self, x, positions, entry):
        """Returns the sum of `x` [B, T, D] and the sublayer's output, and the entry of the cache that it keeps."""
        y, kept = self.mixer(self.norm(x), positions, entry)
        return sharding.constrain(x + y, "batch", "time", "features"), kept


class Decoder(nnx.Module):
    """The embedding, the sublayers of the pattern, the final norm and the head of a decoder."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        shape = (cfg.vocab_size, cfg.hidden_size)
        # The standard deviation is small because a tied embedding is also the head, and a token's own logit starts at
        # std * D.
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * 0.02)
        self.blocks = nnx.List([Block(kind, cfg, rngs) for kind in cfg.pattern])
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        if not cfg.tie_embeddings:
            self.lm_head = nnx.Param(jax.random.normal(rngs.params(), shape[::-1], jnp.float32) * cfg.hidden_size**-0.5)

    def __call__(self, tokens, positions, cache, remat):
        """Returns hidden states and cache; see `apply`."""
        # The embedding table is gathered along its width before the lookup: rows of a table whose width is sharded like
        # the batch cannot be resharded cheaply.
        table = sharding.constrain(self.embedding[...], "vocab", None)
        x = sharding.constrain(_lookup(table, tokens, self.cfg.vocab_size), "batch", "time", "features")
        places = positions if isinstance(positions, Positions) else with_angles(self.cfg, positions)
        segments = cache if isinstance(cache, Segments) else None
        entries = [None] * len(self.blocks) if cache is None or segments is not None else cache
        x, kept = _run_sublayers(self.blocks, x, places, entries, segments, remat)
        return self.norm(x), tuple(kept)


def _run_sublayers(blocks, x, places, entries, segments, remat) -> tuple[jax.Array, list]:
    """Runs all sublayers, repeated ones in loops; returns the last output, and the entries of the cache that they keep.

    Args:
        blocks: the sublayers, as Blocks.
        x: [B, T, D].
        places: the positions with their angles.
        entries: entries of the cache, one for each sublayer, or None if it reads none.
        segments: which all sublayers share where the rows are packed sequences, or None.
        remat: as for `apply`.
    """
    # `apply` has just merged these blocks, and they are split again here: `jax.lax.scan` and `jax.checkpoint` take the
    # states of sublayers as arguments.
    split = [nnx.split(block) for block in blocks]
    kinds = "".join(block.kind for block in blocks)
    kept: list = []
    for width, times in _repeats(kinds, x.dtype, remat):
        piece = slice(len(kept), len(kept) + width * times)
        graphs = [graph for graph, _ in split[piece]][:width]
        states = [state for _, state in split[piece]]
        run = _run_block if times == 1 else _run_constrained_block
        if remat != "none":
            run = jax.checkpoint(run, static_argnums=0, policy=KEPT[remat])
        group = functools.partial(_run_group, run, graphs, places, segments)
        own_entries = entries[piece]
        x, more = group(x, (states, own_entries)) if times == 1 else _loop(group, width, x, states, own_entries)
        kept += more
    return x, kept


def _repeats(kinds: str, dtype: jnp.dtype, remat: str) -> list[tuple[int, int]]:
    """Returns how the sublayers run, as (width, times) for each piece: `times` passes of a scan over `width` sublayers.

    Without scans it is one piece with all of them. A scan stacks its weights, so they exist twice. In a dtype narrower
    than float32 that costs no memory, because the weights were cast for this call anyway. LoRA's frozen weights are the
    exception: the update then needs a copy of them.
    """
    return stretches(kinds) if dtype != jnp.float32 and remat != "none" else [(len(kinds), 1)]


def stretches(pattern: str) -> list[tuple[int, int]]:
    """Cuts `pattern` into pieces that repeat: for each, how many sublayers it has and how often it occurs in a row.

    A loop over repeated sublayers is compiled once. It also bounds memory: without a loop, XLA's TPU compiler computes
    the gradients of all weights at the end, and keeps the factors of all these products until then.
    """
    pieces = []
    at = 0
    while at < len(pattern):
        best = (1, 1)
        for width in range(1, (len(pattern) - at) // 2 + 1):
            unit, times = pattern[at : at + width], 1
            while pattern.startswith(unit, at + width * times):
                times += 1
            if times > 1 and width * times > best[0] * best[1]:
                best = (width, times)
        pieces.append(best)
        at += best[0] * best[1]
    return pieces


def _loop(group, width: int, x: jax.Array, states: list, entries: list) -> tuple[jax.Array, list]:
    """Runs `group` on groups of `width` sublayers of the same kinds, as a loop over their stacked weights."""

    def stacked(parts: list) -> list:  # returns one stacked tree for each sublayer of a group
        return [jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts[i::width]) for i in range(width)]

    x, kept = jax.lax.scan(group, x, (stacked(states), stacked(entries)))
    times = len(states) // width
    return x, [jax.tree.map(lambda leaf, i=i: leaf[i], kept[j]) for i in range(times) for j in range(width)]


def _run_group(run, graphs, positions, segments, x, part):
    """Runs some sublayers one after the other by `run`; `part` holds their states and their entries of the cache.

    With `segments`, which all sublayers share, there is no cache.
    """
    kept = []
    for graph, state, entry in zip(graphs, *part, strict=True):
        x, new = run(graph, state, x, positions, entry if segments is None else segments)
        kept.append(new)
    return x, kept


def _run_constrained_block(graph, state, x, positions, entry):
    """Runs a sublayer of a loop with constraints on the shardings of its weights.

    Without them the compiler would not know how the weights of a loop, and so their gradients, are sharded.
    """

    def constrained(path: tuple, weight: nnx.Variable) -> nnx.Variable:
        constrain = lambda x, name: sharding.constrain(x, *sharding.logical_axes(name))
        return weight.replace(lora.each(constrain, "/".join(map(str, path)), weight.get_value()))

    return _run_block(graph, nnx.map_state(constrained, state), x, positions, entry)


def _run_block(graph, state, x, positions, entry):
    """Runs one sublayer, with its LoRA change merged into its weights."""
    x, state = lora.merge_after(x, state)
    return nnx.merge(graph, state)(x, positions, entry)


@functools.lru_cache
def _split(cfg: DecoderConfig):
    """Returns the module's static half and its abstract state, built once per configuration without any array."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(cfg, nnx.Rngs(0))))


def _named(state: nnx.State) -> dict:
    """Returns the values of a state by path, such as "blocks/0/mixer/q_proj"."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def shapes(cfg: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by path."""
    return {path: leaf.shape for path, leaf in _named(_split(cfg)[1]).items()}


def init(cfg: DecoderConfig, key: jax.Array, mesh: jax.sharding.Mesh) -> Params:
    """Returns random float32 parameters, each created in its sharding."""

    def build(key):
        return _named(nnx.state(Decoder(cfg, nnx.Rngs(params=key))))

    return jax.jit(build, out_shardings={path: sharding.param_sharding(mesh, path) for path in shapes(cfg)})(key)


def apply(
    cfg: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | Positions,
    cache: Cache | Segments | None = None,
    remat: str = "none",
) -> tuple[jax.Array, Cache]:
    """Runs the decoder up to its final norm.

    Args:
        params: arrays, or weights with their LoRA changes (`lora.Adapted`), by path.
        tokens, positions: [B, T] int32. Without `cache`, position t of a row is t: rows start at their first token.
            Positions may come with their angles.
        cache: an entry for each sublayer: for attention a Windowed (T = 1) or a Paged, for Mamba-2 the states of the
            rows (T = 1) or Lanes. With Segments instead, the rows are packed sequences. With neither, rows begin with
            their first token.
        remat: what the backward pass recomputes in each sublayer: all ("full"), all but products with weights ("dots"),
            or nothing ("none").

    Returns:
        Hidden states [B, T, D] in the dtype of `params`, and the new cache with one entry per sublayer:
        `Windowed.added`, the pool of a Paged, or the Mamba-2 states, each with the new tokens; None if no entry was
        given.
    """
    graph, state = _split(cfg)
    leaves = [(path, leaf.replace(params["/".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    values = nnx.from_flat_state(leaves)
    return nnx.merge(graph, values)(tokens, positions, cache, remat)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table: jax.Array, tokens: jax.Array, rows: int) -> jax.Array:
    """Returns rows [..., D] of a table [rows, D]. The gradients of a row's uses are added in float32, and rounded once.

    The gradient of `table[tokens]` would be added in the table's dtype: in bfloat16 the sum over a token that occurs
    hundreds of times in a micro-batch no longer changes with each of them.
    """
    return table[tokens]


def _lookup_forward(table, tokens, rows):
    return jnp.asarray(table)[tokens], tokens


def _lookup_backward(rows, tokens, grads):
    sums = jnp.zeros((rows, grads.shape[-1]), jnp.float32).at[tokens].add(grads.astype(jnp.float32))
    return sums.astype(grads.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def barrier_options(platform: str) -> dict[str, str]:
    """Returns compiler options for a program that differentiates on `platform` ("cpu", "gpu", "tpu"): barriers stay.

    XLA's CPU compiler removes barriers before it fuses and orders operations. Then all recomputations of jax.checkpoint
    run at the start, so that six attention sublayers of 4 x 512 tokens need 488 MB instead of 104 MB, as without
    remat; and sines and cosines are computed again in each sublayer. The compilers of the other platforms keep barriers
    by default. The sampler's programs do without this option, with which those of Mamba-2 do not compile in jax 0.12.
    """
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if platform == "cpu" else {}


def head(cfg: DecoderConfig, params: Params) -> jax.Array:
    """Returns the output projection [D, V], which is the transposed embedding where it is tied."""
    return params["embedding"].T if cfg.tie_embeddings else params["lm_head"]


def logits(cfg: DecoderConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Returns the logits [..., V] float32 of hidden states [..., D].

    They are always accumulated and kept in float32, so that sampler and trainer agree.
    """
    rows = hidden.size // hidden.shape[-1]
    # For a single row XLA's einsum is as fast as memory allows, and its sum of products a hundred times slower.
    if cfg.tie_embeddings and 1 < rows <= FEW_ROWS and hidden.dtype == jnp.float32:
        options = {"cpu": _logits_embedding_first, "default": _logits_hidden_first}
        return jax.lax.platform_dependent(hidden, params["embedding"], **options)
    return jnp.einsum("...D,DV->...V", hidden, head(cfg, params), preferred_element_type=jnp.float32)


# On a CPU, transposing the logits of more rows takes longer than the faster product saves.
FEW_ROWS = 32


def _logits_hidden_first(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
    return jnp.einsum("...D,VD->...V", hidden, embedding, preferred_element_type=jnp.float32)


def _logits_embedding_first(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
    """Returns `_logits_hidden_first` of float32 by a product whose left side is the embedding.

    On a CPU, with a vocabulary of 49,152, this takes 0.6 of the time for 8 rows and 0.75 for 32. An einsum in this
    order takes longer, and XLA may turn it round.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    product = jnp.sum(embedding[:, :, None] * rows.T, axis=1)  # [V, R]
    return jax.lax.optimization_barrier(product).T.reshape(*hidden.shape[:-1], -1)


def cast(params: Params, dtype: str) -> Params:
    """Returns the parameters in `dtype`."""
    return {path: value.astype(dtype) for path, value in params.items()}
