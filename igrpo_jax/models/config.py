"""What distinguishes one decoder from another, and how it is read from a Hugging Face config.json."""

from dataclasses import dataclass

from igrpo_jax.config import BuiltinModel, InputError

SUPPORTED = ("llama", "qwen2")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder. `pattern` has one letter per sublayer: `*` attention, `-` MLP; a dense layer is `*-`."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    pattern: str
    rope_theta: float
    rms_norm_eps: float
    qkv_bias: bool
    tie_embeddings: bool
    max_position_embeddings: int  # tokens of context
    attention: str = "xla"  # of prefill and training, a key of attention.IMPLEMENTATIONS; `attention.choose` picks it

    @property
    def num_params(self) -> int:
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        attention += self.qkv_bias * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        blocks = {"*": attention, "-": 3 * self.hidden_size * self.intermediate_size}
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + sum(blocks[kind] + self.hidden_size for kind in self.pattern) + self.hidden_size


def builtin(shape: BuiltinModel, vocab_size: int) -> ModelConfig:
    """The small decoder for the built-in task."""
    if shape.hidden_size % (2 * shape.num_heads) or shape.num_heads % shape.num_kv_heads:
        raise InputError(
            f"config.model.builtin.num_heads = {shape.num_heads}: must divide hidden_size = {shape.hidden_size} into "
            f"heads of even width and be a multiple of num_kv_heads = {shape.num_kv_heads}"
        )
    return ModelConfig(
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


def from_hf(raw: dict, source: str) -> ModelConfig:
    """ModelConfig from a parsed config.json. `source` names it in errors.

    Raises:
        InputError: a model_type, activation, rope scaling or window that the decoder does not have; a missing key.
    """
    kind = raw.get("model_type")
    if kind not in SUPPORTED:
        raise InputError(f"{source}: model_type = {kind!r} is not supported; supported are {', '.join(SUPPORTED)}")
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
    rope = raw.get("rope_parameters") or {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta")}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refuse(rope_type == "default", source, "rope type", rope_type, "default")
    refuse(raw.get("hidden_act", "silu") == "silu", source, "hidden_act", raw.get("hidden_act"), "silu")
    refuse(not raw.get("mlp_bias"), source, "mlp_bias", raw.get("mlp_bias"), "false")
    refuse(not raw.get("use_sliding_window"), source, "use_sliding_window", raw.get("use_sliding_window"), "false")
    if kind == "llama":
        refuse(not raw.get("attention_bias"), source, "attention_bias", raw.get("attention_bias"), "false")
    try:
        heads = raw["num_attention_heads"]
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            pattern="*-" * raw["num_hidden_layers"],
            rope_theta=float(rope["rope_theta"] or 10_000.0),
            rms_norm_eps=raw["rms_norm_eps"],
            qkv_bias=kind == "qwen2",
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_position_embeddings=raw["max_position_embeddings"],
        )
    except KeyError as error:
        raise InputError(f"{source}: has no {error.args[0]!r}; is it the config.json of a {kind} model?") from error


def refuse(ok: bool, source: str, name: str, value: object, supported: str) -> None:
    if not ok:
        raise InputError(f"{source}: {name} = {value!r} is not supported; supported is {supported}")
