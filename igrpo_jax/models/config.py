"""What distinguishes one decoder from another, and how it is read from a Hugging Face config.json."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from igrpo_jax.config import BuiltinModelConfig
from igrpo_jax.errors import InputError, shown


@dataclass(frozen=True)
class RopeScaling:
    """The rope scaling of Llama 3.

    The number of turns that a frequency makes over the original positions decides whether it is kept, divided by
    `factor`, or interpolated between the two.
    """

    factor: float  # by which frequencies of few turns are divided
    low_freq_factor: float  # up to this many turns, a frequency is divided by the full factor
    high_freq_factor: float  # from this many turns on, a frequency is kept
    original_max_position_embeddings: int  # that of the model before it was extended


@dataclass(frozen=True)
class MambaConfig:
    """Shape of the Mamba-2 sublayers."""

    num_heads: int
    head_dim: int
    num_groups: int  # the heads of a group share what is written to the state (B) and read from it (C)
    state_size: int  # numbers of state per head and channel
    conv_size: int  # tokens that the short convolution sees, including the current one
    chunk_size: int  # tokens that prefill and training process at once; does not change results
    time_step_limit: tuple[float, float]  # the range to which the time step is clipped


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. `pattern` has one letter per sublayer: `*` attention, `-` MLP, `M` Mamba-2.

    A dense layer is `*-`.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    pattern: str
    rope_theta: float | None  # None = attention without positions
    rms_norm_eps: float
    qkv_bias: bool
    tie_embeddings: bool
    max_position_embeddings: int  # tokens of the longest sequence
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False  # whether each head of q and k is normalised before rotation
    mlp: str = "swiglu"  # or "relu2", which has no gate
    mamba: MambaConfig | None = None  # where the pattern has an M
    attention: str = "xla"  # of prefill and training, a key of attention.PACKED; `attention.choose` picks it
    row_parts: int = 1  # neighbours on the axis `tensor` that hold the same kv head, each for other sequences (`heads`)

    @property
    def num_params(self) -> int:
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        attention += self.qkv_bias * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        attention += self.qk_norm * 2 * self.head_dim
        products = {"swiglu": 3, "relu2": 2}[self.mlp]
        blocks = {"*": attention, "-": products * self.hidden_size * self.intermediate_size}
        if self.mamba:
            m = self.mamba
            inner, states = m.num_heads * m.head_dim, 2 * m.num_groups * m.state_size
            projections = self.hidden_size * (3 * inner + states + m.num_heads)
            blocks["M"] = projections + (inner + states) * (m.conv_size + 1) + inner + 3 * m.num_heads
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + sum(blocks[kind] + self.hidden_size for kind in self.pattern) + self.hidden_size


def builtin(shape: BuiltinModelConfig, vocab_size: int) -> DecoderConfig:
    """Returns the small decoder for the built-in task. Raises InputError for heads that do not fit."""
    if shape.hidden_size % (2 * shape.num_heads) or shape.num_heads % shape.num_kv_heads:
        raise InputError(
            f"config.model.builtin.num_heads = {shape.num_heads}: must divide hidden_size = {shape.hidden_size} into "
            f"heads of even width and be a multiple of num_kv_heads = {shape.num_kv_heads}"
        )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        pattern="*-" * shape.num_layers,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        qkv_bias=False,
        tie_embeddings=True,
        max_position_embeddings=shape.max_position_embeddings,
    )


def from_hf(raw: dict, source: str) -> DecoderConfig:
    """Returns the DecoderConfig of a parsed config.json, which errors call `source`.

    Raises:
        InputError: a model_type, activation, rope type, window, bias, dropout, quantization or kind of layer that the
            decoder lacks; a missing key; a value of another kind than its key has.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise InputError(f"{source}: model_type = {kind!r} is not supported; supported are {', '.join(READERS)}")
    _refuse_quantized(raw, source)
    _only(raw, source, attention_dropout=0.0, hidden_dropout=0.0)
    try:
        return READERS[kind](raw, source)
    except KeyError as error:
        raise InputError(f"{source}: has no {error.args[0]!r}; is it the config.json of a {kind} model?") from error


def _refuse_quantized(raw: dict, source: str) -> None:
    """Raises InputError for weights of 4 or 8 bits, whose scales lie in separate tensors."""
    quantized = raw.get("quantization_config")
    method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
    refuse(not quantized, source, "quantization_config of method", method, "weights in bfloat16, float16 or float32")


def _common(raw: dict, source: str) -> dict:
    """Returns the fields that every family gives the same name."""
    whole = functools.partial(value, raw, source, WHOLE)
    heads = whole("num_attention_heads")
    return {
        "vocab_size": whole("vocab_size"),
        "hidden_size": whole("hidden_size"),
        "intermediate_size": whole("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": whole("num_key_value_heads", heads),
        "tie_embeddings": value(raw, source, FLAG, "tie_word_embeddings", False),
        "max_position_embeddings": whole("max_position_embeddings"),
    }


def _dense(raw: dict, source: str) -> DecoderConfig:
    """Returns the DecoderConfig of a Llama, Qwen2 or Qwen3."""
    kind = raw["model_type"]
    _only(raw, source, hidden_act="silu", mlp_bias=False, use_sliding_window=False)
    if not kind.startswith("qwen"):  # where a window is in use only with use_sliding_window
        _only(raw, source, sliding_window=None)
    _only(raw, source, is_causal=True)
    for layer in value(raw, source, NAMES, "layer_types", []):
        refuse(layer == "full_attention", source, "layer_types", layer, "full_attention")
    if kind != "qwen2":  # its biases are not optional
        _only(raw, source, attention_bias=False)
    rope, common = _rope(raw, source), _common(raw, source)
    heads, width = common["num_heads"], common["hidden_size"]
    head_dim = value(raw, source, WHOLE, "head_dim", width // heads)
    refuse(head_dim > 0, source, "num_attention_heads", heads, f"at most hidden_size = {width}, or name head_dim")
    return DecoderConfig(
        **common,
        head_dim=head_dim,
        pattern="*-" * value(raw, source, WHOLE, "num_hidden_layers"),
        rope_theta=float(value(rope, source, NUMBER, "rope_theta", 10_000.0)),
        rope_scaling=_rope_scaling(rope, raw, source),
        rms_norm_eps=value(raw, source, NUMBER, "rms_norm_eps"),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )


def _rope(raw: dict, source: str) -> dict:
    """Returns the settings of rope: transformers 5 writes rope_parameters, earlier versions rope_scaling.

    Where there are both, as where a scaling was added by hand, transformers reads rope_scaling alone.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given = value(raw, source, OBJECT, key, {})
    for name, setting in given.items():
        fix = "one setting for all layers"
        refuse(not isinstance(setting, dict), source, key, f"{name}: {setting}", fix)
    for settings in (raw, given):
        if settings.get("partial_rotary_factor") is not None:
            _only(settings, source, partial_rotary_factor=1.0)
    return {"rope_theta": raw.get("rope_theta"), **given}


def _rope_scaling(rope: dict, raw: dict, source: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    refuse(kind in ("default", "llama3"), source, "rope type", kind, "default or llama3")
    if kind == "default":
        return None
    number = functools.partial(value, rope, source, NUMBER)
    name = "original_max_position_embeddings"  # as in transformers, first of all at the top level, then in rope
    original = value(raw if raw.get(name) else rope, source, WHOLE, name)
    low, high = number("low_freq_factor"), number("high_freq_factor")
    refuse(high > low, source, "high_freq_factor", high, f"above low_freq_factor = {low}")
    return RopeScaling(float(number("factor")), float(low), float(high), original)


# Newer versions of Nemotron-H's config.json have a list of names instead of the pattern.
_LETTERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-"}


def _nemotron_h(raw: dict, source: str) -> DecoderConfig:
    """Returns the DecoderConfig of a Nemotron-H.

    It is a hybrid of Mamba-2, attention without positions, and ungated MLPs; each layer has one sublayer.
    """
    _only(raw, source, mlp_hidden_act="relu2", mamba_hidden_act="silu", use_conv_bias=True, sliding_window=None)
    _only(raw, source, use_bias=False, mlp_bias=False, attention_bias=False, mamba_proj_bias=False)
    _only(raw, source, mamba_conv_bias=True, mamba_dt_limit=None, num_nextn_predict_layers=0)
    names = functools.partial(value, raw, source, NAMES)
    layers = names("layers_block_type", []) or names("layer_types", [])
    layers = layers or value(raw, source, PATTERN, "hybrid_override_pattern")
    letters = [_LETTERS.get(name, name) for name in layers]
    unknown = sorted({*letters} - {*"M*-"})
    refuse(not unknown, source, "kind of layer", ", ".join(unknown), "M (Mamba-2), * (attention) or - (MLP)")
    whole = functools.partial(value, raw, source, WHOLE)
    mamba = MambaConfig(
        num_heads=whole("mamba_num_heads"),
        head_dim=whole("mamba_head_dim"),
        num_groups=whole("n_groups"),
        state_size=whole("ssm_state_size"),
        conv_size=whole("conv_kernel"),
        chunk_size=whole("chunk_size"),
        # NVIDIA's code clips to this, whether it trains or samples. transformers 5.23 clips to time_step_min in prefill
        # alone, with which a model would sample from another distribution than it is trained on.
        time_step_limit=value(raw, source, LIMITS, "time_step_limit", (0.0, math.inf)),
    )
    refuse(mamba.num_heads % mamba.num_groups == 0, source, "n_groups", mamba.num_groups, "a divisor of the heads")
    return DecoderConfig(
        **_common(raw, source),
        head_dim=whole("head_dim", None) or whole("attention_head_dim"),
        pattern="".join(letters),
        rope_theta=None,
        rms_norm_eps=value(raw, source, NUMBER, "layer_norm_epsilon"),
        qkv_bias=False,
        mlp="relu2",
        mamba=mamba,
    )


READERS = {"llama": _dense, "qwen2": _dense, "qwen3": _dense, "nemotron_h": _nemotron_h}  # by model_type


def _limits(given: Any) -> tuple[float, float] | None:
    """Returns the two ends of a range; None if it has no such ends.

    JSON has no infinity: an end may be a text, or, as some transformers write it, {"__float__": "Infinity"}.
    """
    if not isinstance(given, list):
        return None
    try:
        low, high = (float(end["__float__"] if isinstance(end, dict) else end) for end in given)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(low) or math.isnan(high) else (low, high)


# Kinds of values, in the words of an error.
WHOLE, NUMBER, FLAG, PATTERN = "a whole number above 0", "a number above 0", "true or false", "a text or list of names"
NAMES, OBJECT, LIMITS = "a list of names", "an object", "a list of two numbers"
TOKENS = "a token id or a list of them"
_IS: dict[str, Callable[[Any], bool]] = {
    # Not bool, which is a kind of int. Some tools write whole numbers as floats.
    WHOLE: lambda x: type(x) in (int, float) and x > 0 and x % 1 == 0,
    NUMBER: lambda x: type(x) in (int, float) and 0 < x < math.inf,
    FLAG: lambda x: x in (True, False),  # 1 and 0 too
    PATTERN: lambda x: isinstance(x, str) or _IS[NAMES](x),
    NAMES: lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x),
    OBJECT: lambda x: isinstance(x, dict),
    LIMITS: lambda x: _limits(x) is not None,
    TOKENS: lambda x: all(type(id) is int or id is None for id in (x if isinstance(x, list) else [x])),
}
_AS: dict[str, Callable[[Any], Any]] = {WHOLE: int, FLAG: bool, LIMITS: _limits}  # others stay as they are


def value(raw: dict, source: str, kind: str, name: str, default: Any = ...) -> Any:
    """Returns the value of a key of a JSON file; `default` where it is missing, null, or a 0 that the kind lacks.

    Raises:
        InputError: it is not of the `kind`, or null without a default.
        KeyError: it is missing, without a default.
    """
    given = raw[name] if default is ... else raw.get(name)
    fits = _IS[kind](given)
    if default is not ... and (given is None or not (given or fits)):  # 0 is a token's id, but no number of heads
        return default
    refuse(fits, source, name, given, kind)
    return _AS[kind](given) if kind in _AS else given


def _only(raw: dict, source: str, **supported: object) -> None:
    """Raises InputError if a key of `raw` is set to another value than the one that is supported."""
    for name, only in supported.items():
        given = raw.get(name, only)
        refuse(given == only or (not given and not only), source, name, given, str(only).lower())


def refuse(ok: bool, source: str, name: str, value: object, supported: str) -> None:
    """Raises InputError unless `ok`."""
    if not ok:
        raise InputError(f"{source}: {name} = {shown(value)} is not supported; use {supported}")
