"""How each parameter of ours lies in the tensors of Hugging Face files: one table per model family (`FAMILIES`).

An entry pairs a parameter with a tensor and describes the layout of both; `hf_read` and `hf_write` follow it in the two
directions. Several parameters may name the same tensor. They then lie in it one after the other, along its first axis,
in the order of the table. Every tensor of the files must belong to exactly one entry or group of entries.

A layout is a string with one letter per axis. The file's `(NH)D` and our `DNH` mean: read the file's [N*H, D] as
[N, H, D] and transpose it to [D, N, H]. A `1` in the file's layout is an axis of size 1 that our parameter lacks.

Legend: N heads, K kv heads, H head dim, D model, F ffn, V vocab; for Mamba-2 G groups, P state, W convolution.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from igrpo_jax.models import decoder
from igrpo_jax.models.config import DecoderConfig

Index = tuple[slice, ...]

PIECE = 1 << 20  # numbers that are read at once, so that they are copied and transposed in the processor's cache


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and the tensor of the files, or the part of a tensor, that holds it."""

    name: str  # of the tensor; {layer} stands for the layer's number
    stored: str  # the tensor's axes; letters in brackets share one axis
    ours: str  # the same letters in the order of our parameter
    start: int = 0  # where this parameter's part begins along the tensor's first axis; `table` fills it in

    @property
    def axes(self) -> list[str]:
        """The letters of each stored axis: `(NH)D` gives ["NH", "D"]."""
        return [letters.strip("()") for letters in re.findall(r"\(\w+\)|\w", self.stored)]

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the tensor, or part of one, that belongs to our parameter of this shape."""
        size = {"1": 1, **dict(zip(self.ours, shape, strict=True))}
        return tuple(math.prod(size[letter] for letter in letters) for letters in self.axes)

    def read(self, tensor: Any, shape: tuple[int, ...], index: Index, dtype: str = "float32") -> np.ndarray:
        """Returns the slice `index` of our parameter in `dtype`.

        Args:
            tensor: a tensor of the file that is sliced lazily; a piece of its rows is read at a time.
            shape: shape of our whole parameter.
        """
        parts = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
        result = np.empty([len(part) for part in parts], np.dtype(dtype))
        axis = self.ours.index(self.axes[0][0])
        rows, step = parts[axis], max(1, PIECE * len(parts[axis]) // max(1, result.size))
        for at in range(0, len(rows), step):
            parts[axis] = rows[at : at + step]
            result[(slice(None),) * axis + (slice(at, at + step),)] = self._block(tensor, shape, parts)
        return result

    def _block(self, tensor: Any, shape: tuple[int, ...], parts: list[range]) -> np.ndarray:
        """Returns the block of our parameter that `parts` select along each axis, in the tensor's dtype.

        An axis that several letters share is sliced in the file by its first letter only; the other letters are read
        completely and sliced in memory.
        """
        size = {"1": 1, **dict(zip(self.ours, shape, strict=True))}
        cut = {"1": range(1), **dict(zip(self.ours, parts, strict=True))}
        wanted, read_shape = [], []
        for first, *rest in self.axes:
            inner = math.prod(size[letter] for letter in rest)
            wanted.append(slice(cut[first].start * inner, cut[first].stop * inner))
            read_shape += [len(cut[first]), *(size[letter] for letter in rest)]
        wanted[0] = slice(self.start + wanted[0].start, self.start + wanted[0].stop)
        letters = "".join(self.axes)
        firsts = {first for first, *_ in self.axes}
        block = tensor[tuple(wanted)].reshape(read_shape)
        block = block[tuple(slice(None) if x in firsts else slice(cut[x].start, cut[x].stop) for x in letters)]
        ones = [i for i, letter in enumerate(letters) if letter not in self.ours]
        block = block.transpose([*ones, *(letters.index(letter) for letter in self.ours)])
        return block.reshape(block.shape[len(ones) :])

    def write(self, value: np.ndarray) -> np.ndarray:
        """Returns the tensor, or the part of one, that holds our parameter `value`; the inverse of `read`."""
        letters = [letter for letter in "".join(self.axes) if letter in self.ours]
        tensor = value.transpose([self.ours.index(letter) for letter in letters])
        return np.ascontiguousarray(tensor.reshape(self.stored_shape(value.shape)))


@dataclass(frozen=True)
class Family:
    """The table of a model family."""

    sublayers: int  # letters of the pattern per numbered layer of the files
    entries: dict[str, Entry]  # by our path, with the letter of a block instead of its number
    # Files may use the second prefix instead of the first. Exports use the first: NVIDIA's own code reads no other,
    # and transformers reads both and writes the first.
    prefixes: tuple[str, str] | None = None


_LAYER = "model.layers.{layer}."
_ATTENTION, _MLP = _LAYER + "self_attn.", _LAYER + "mlp."
_DENSE = Family(
    sublayers=2,
    entries={
        "embedding": Entry("model.embed_tokens.weight", "VD", "VD"),
        "*/norm/scale": Entry(_LAYER + "input_layernorm.weight", "D", "D"),
        "*/mixer/q_proj": Entry(_ATTENTION + "q_proj.weight", "(NH)D", "DNH"),
        "*/mixer/k_proj": Entry(_ATTENTION + "k_proj.weight", "(KH)D", "DKH"),
        "*/mixer/v_proj": Entry(_ATTENTION + "v_proj.weight", "(KH)D", "DKH"),
        "*/mixer/q_bias": Entry(_ATTENTION + "q_proj.bias", "(NH)", "NH"),
        "*/mixer/k_bias": Entry(_ATTENTION + "k_proj.bias", "(KH)", "KH"),
        "*/mixer/v_bias": Entry(_ATTENTION + "v_proj.bias", "(KH)", "KH"),
        "*/mixer/o_proj": Entry(_ATTENTION + "o_proj.weight", "D(NH)", "NHD"),
        "*/mixer/q_norm/scale": Entry(_ATTENTION + "q_norm.weight", "H", "H"),
        "*/mixer/k_norm/scale": Entry(_ATTENTION + "k_norm.weight", "H", "H"),
        "-/norm/scale": Entry(_LAYER + "post_attention_layernorm.weight", "D", "D"),
        "-/mixer/gate_proj": Entry(_MLP + "gate_proj.weight", "FD", "DF"),
        "-/mixer/up_proj": Entry(_MLP + "up_proj.weight", "FD", "DF"),
        "-/mixer/down_proj": Entry(_MLP + "down_proj.weight", "DF", "FD"),
        "norm/scale": Entry("model.norm.weight", "D", "D"),
        "lm_head": Entry("lm_head.weight", "VD", "DV"),
    },
)
_BACKBONE = "backbone.layers.{layer}."
_MIXER = _BACKBONE + "mixer."
_NEMOTRON_H = Family(
    sublayers=1,
    prefixes=("backbone.", "model."),
    entries={
        "embedding": Entry("backbone.embeddings.weight", "VD", "VD"),
        **{f"{kind}/norm/scale": Entry(_BACKBONE + "norm.weight", "D", "D") for kind in "M*-"},
        "M/mixer/z_proj": Entry(_MIXER + "in_proj.weight", "(NH)D", "DNH"),
        "M/mixer/x_proj": Entry(_MIXER + "in_proj.weight", "(NH)D", "DNH"),
        "M/mixer/b_proj": Entry(_MIXER + "in_proj.weight", "(GP)D", "DGP"),
        "M/mixer/c_proj": Entry(_MIXER + "in_proj.weight", "(GP)D", "DGP"),
        "M/mixer/dt_proj": Entry(_MIXER + "in_proj.weight", "ND", "DN"),
        "M/mixer/x_conv": Entry(_MIXER + "conv1d.weight", "(NH)1W", "WNH"),
        "M/mixer/b_conv": Entry(_MIXER + "conv1d.weight", "(GP)1W", "WGP"),
        "M/mixer/c_conv": Entry(_MIXER + "conv1d.weight", "(GP)1W", "WGP"),
        "M/mixer/x_conv_bias": Entry(_MIXER + "conv1d.bias", "(NH)", "NH"),
        "M/mixer/b_conv_bias": Entry(_MIXER + "conv1d.bias", "(GP)", "GP"),
        "M/mixer/c_conv_bias": Entry(_MIXER + "conv1d.bias", "(GP)", "GP"),
        "M/mixer/dt_bias": Entry(_MIXER + "dt_bias", "N", "N"),
        "M/mixer/a_log": Entry(_MIXER + "A_log", "N", "N"),
        "M/mixer/skip": Entry(_MIXER + "D", "N", "N"),
        "M/mixer/gated_scale": Entry(_MIXER + "norm.weight", "(NH)", "NH"),
        "M/mixer/o_proj": Entry(_MIXER + "out_proj.weight", "D(NH)", "NHD"),
        "*/mixer/q_proj": Entry(_MIXER + "q_proj.weight", "(NH)D", "DNH"),
        "*/mixer/k_proj": Entry(_MIXER + "k_proj.weight", "(KH)D", "DKH"),
        "*/mixer/v_proj": Entry(_MIXER + "v_proj.weight", "(KH)D", "DKH"),
        "*/mixer/o_proj": Entry(_MIXER + "o_proj.weight", "D(NH)", "NHD"),
        "-/mixer/up_proj": Entry(_MIXER + "up_proj.weight", "FD", "DF"),
        "-/mixer/down_proj": Entry(_MIXER + "down_proj.weight", "DF", "FD"),
        "norm/scale": Entry("backbone.norm_f.weight", "D", "D"),
        "lm_head": Entry("lm_head.weight", "VD", "DV"),
    },
)
# By model_type. The DecoderConfig decides which biases, norms and heads exist.
FAMILIES = {"llama": _DENSE, "qwen2": _DENSE, "qwen3": _DENSE, "nemotron_h": _NEMOTRON_H}


def table(model_type: str, cfg: DecoderConfig) -> dict[str, Entry]:
    """Returns the entry of every parameter by its path, with layer numbers and starts filled in."""
    family, shapes, result = FAMILIES[model_type], decoder.shapes(cfg), {}
    ends: dict[str, int] = {}  # name of a tensor -> where its parts so far end along its first axis
    order = {key: position for position, key in enumerate(family.entries)}
    for path in sorted(shapes, key=lambda path: order[_key(cfg, path)]):
        entry = family.entries[_key(cfg, path)]
        name = entry.name.format(layer=_block(path) // family.sublayers)
        result[path] = Entry(name, entry.stored, entry.ours, start=ends.get(name, 0))
        ends[name] = ends.get(name, 0) + entry.stored_shape(shapes[path])[0]
    return result


def _block(path: str) -> int:
    """Returns the number of the block that holds the parameter; 0 outside of blocks."""
    match = re.match(r"blocks/(\d+)/", path)
    return int(match[1]) if match else 0


def _key(cfg: DecoderConfig, path: str) -> str:
    """Returns the key of a parameter in `Family.entries`."""
    return re.sub(r"^blocks/(\d+)", lambda match: cfg.pattern[int(match[1])], path)


def tensor_shapes(entries: dict[str, Entry], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of the files by name, its parts put together."""
    result: dict[str, tuple[int, ...]] = {}
    for path, entry in entries.items():
        first, *rest = entry.stored_shape(shapes[path])
        result[entry.name] = (max(entry.start + first, result.get(entry.name, (0,))[0]), *rest)
    return result
