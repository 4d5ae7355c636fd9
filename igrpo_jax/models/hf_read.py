"""Hugging Face directories: config.json, tokenizer and safetensors, read into our layouts and shardings.

One table per family (`FAMILIES`) pairs each of our parameters with a tensor of the files and says how the two are laid
out; it reads both ways (`hf_write` is the other one). Parameters that name one tensor lie in it one after the other,
along its first axis, in the order of the table. Every tensor is used exactly once: a missing, extra or misshapen one is
an error that names it. A process reads only the slices that its devices hold, straight from the file into their
sharding: no process ever holds the whole model, no device a second copy, and host memory what few tensors need.

A layout is a string of one letter per axis. The file's `(NH)D` and our `DNH` say: take the file's [N*H, D] as [N, H, D]
and transpose it to [D, N, H]. A `1` in the file's is an axis of size 1 that ours has not.

Legend: N heads, K kv heads, H head dim, D model, F ffn, V vocab; of Mamba-2 G groups, P state, W convolution.
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import ml_dtypes  # noqa: F401  (teaches numpy bfloat16, without which safetensors cannot hand it over)
import numpy as np
import safetensors

from igrpo_jax.distributed import sharding
from igrpo_jax.errors import InputError
from igrpo_jax.models import config, decoder
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.decoder import Params

Index = tuple[slice, ...]

BYTES = {"F32": 4, "BF16": 2, "F16": 2}  # safetensors' dtypes that are read, and their size
WANTED = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "merges.txt", "vocab.txt")
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json")
PIECE = 1 << 20  # numbers that are read at once: copied and turned within the processor's cache
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and one tensor of the files, or a part of one."""

    name: str  # of the tensor; {layer} stands for the layer's number
    stored: str  # the tensor's axes; letters in brackets share one
    ours: str  # the same letters in the order of our parameter
    start: int = 0  # along the tensor's first axis, of the part that is this parameter's; filled in by `table`

    @property
    def axes(self) -> list[str]:
        """The letters of each stored axis: `(NH)D` gives ["NH", "D"]."""
        return [letters.strip("()") for letters in re.findall(r"\(\w+\)|\w", self.stored)]

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor, or part of one, that belongs to our parameter of this shape."""
        size = {"1": 1, **dict(zip(self.ours, shape, strict=True))}
        return tuple(math.prod(size[letter] for letter in letters) for letters in self.axes)

    def read(self, tensor: Any, shape: tuple[int, ...], index: Index, dtype: str = "float32") -> np.ndarray:
        """Our parameter's `index` in `dtype`, from a tensor that is sliced lazily, a piece of its rows at a time."""
        parts = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
        found = np.empty([len(part) for part in parts], np.dtype(dtype))
        axis = self.ours.index(self.axes[0][0])
        rows, step = parts[axis], max(1, PIECE * len(parts[axis]) // max(1, found.size))
        for at in range(0, len(rows), step):
            parts[axis] = rows[at : at + step]
            found[(slice(None),) * axis + (slice(at, at + step),)] = self._block(tensor, shape, parts)
        return found

    def _block(self, tensor: Any, shape: tuple[int, ...], parts: list[range]) -> np.ndarray:
        """Of our parameter what `parts` say of each axis, in the tensor's dtype.

        A shared axis is cut at its first letter: of the others the whole is read, and cut in memory.
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
        """The tensor, or the part of one, that belongs to our parameter `value`; undoes `read`."""
        letters = [letter for letter in "".join(self.axes) if letter in self.ours]
        tensor = value.transpose([self.ours.index(letter) for letter in letters])
        return np.ascontiguousarray(tensor.reshape(self.stored_shape(value.shape)))


@dataclass(frozen=True)
class Stored:
    """A tensor of the files, by their headers."""

    file: Path
    name: str  # in it
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


@dataclass(frozen=True)
class Family:
    """The table of a model family."""

    sublayers: int  # letters of the pattern per numbered layer of the files
    entries: dict[str, Entry]  # by our path, with the letter of a block in place of its number
    # Files may name their tensors with the second in place of the first. Exports have the first: NVIDIA's own code
    # reads no other, and transformers reads both and writes the first.
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
# By model_type; which biases, norms and heads exist is the DecoderConfig's say.
FAMILIES = {"llama": _DENSE, "qwen2": _DENSE, "qwen3": _DENSE, "nemotron_h": _NEMOTRON_H}


def table(model_type: str, cfg: DecoderConfig) -> dict[str, Entry]:
    """The entry of every parameter by its path, layer numbers and starts filled in."""
    family, shapes, result = FAMILIES[model_type], decoder.shapes(cfg), {}
    ends: dict[str, int] = {}  # of the parts of each tensor so far, along its first axis
    order = {key: place for place, key in enumerate(family.entries)}
    for path in sorted(shapes, key=lambda path: order[_key(cfg, path)]):
        entry = family.entries[_key(cfg, path)]
        name = entry.name.format(layer=_block(path) // family.sublayers)
        result[path] = Entry(name, entry.stored, entry.ours, start=ends.get(name, 0))
        ends[name] = ends.get(name, 0) + entry.stored_shape(shapes[path])[0]
    return result


def _block(path: str) -> int:
    """Number of the block that holds the parameter; 0 outside of blocks."""
    match = re.match(r"blocks/(\d+)/", path)
    return int(match[1]) if match else 0


def _key(cfg: DecoderConfig, path: str) -> str:
    """Of the parameter in Family.entries."""
    return re.sub(r"^blocks/(\d+)", lambda match: cfg.pattern[int(match[1])], path)


def tensor_shapes(entries: dict[str, Entry], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the files by name, its parts put together."""
    result: dict[str, tuple[int, ...]] = {}
    for path, entry in entries.items():
        first, *rest = entry.stored_shape(shapes[path])
        result[entry.name] = (max(entry.start + first, result.get(entry.name, (0,))[0]), *rest)
    return result


def resolve(path: str) -> Path:
    """`path` itself where it is a directory, else the local copy of the hub's repository of that name.

    Raises:
        InputError: neither is there, or the hub can't be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise _bad(path, "no such directory; give a Hugging Face model directory or a hub id such as owner/name")
    return _download(path)


@functools.cache
def _download(name: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(WANTED)))
    except Exception as error:  # its errors have no common base: HTTP, validation, offline, file system
        said = f"{type(error).__name__}: {_first_line(error)}"
        fix = "give a local directory with config.json, the safetensors files and the tokenizer"
        raise _bad(name, f"no such directory, and the hub did not give it ({said}); {fix}") from error


def load_config(path: str) -> DecoderConfig:
    """DecoderConfig of the directory or hub id `path`.

    Raises:
        InputError: no config.json, or one that the decoder can't follow.
    """
    return config.from_hf(config_json(path), f"config.model.path = {path!r}: config.json")


def check_weights(path: str, cfg: DecoderConfig) -> int:
    """Bytes that reading the model takes from its files, whose headers alone are read here.

    Raises:
        InputError: the files don't hold exactly the tensors of the model, or one of them is damaged.
    """
    shapes = decoder.shapes(cfg)
    return sum(_sizes(shapes, *_checked(path, cfg)).values())


def weight_files(path: str) -> list[Path]:
    """The files that hold the weights."""
    return sorted({stored.file for stored in _stored(path).values()})


def load_params(
    path: str,
    cfg: DecoderConfig,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    report: Callable[[int], None] = lambda done: None,
) -> Params:
    """Parameters of the directory or hub id `path` in `dtype`, each in its sharding on `mesh`.

    Beyond them a process needs host memory for a copy of its part of the largest tensor in `dtype`, and for that tensor
    as it is in the file.

    Args:
        report: is given the bytes read so far, of those that `check_weights` gives.

    Raises:
        InputError: a mesh that doesn't divide the model; files that are missing, damaged or of another model.
    """
    shapes = decoder.shapes(cfg)
    sharding.check_divides(mesh, shapes)
    return _load(path, shapes, *_checked(path, cfg), mesh, dtype, report)


def load_adapters(path: str, entries: dict[str, Entry], like: Params) -> Params:
    """LoRA's adapters from the peft directory `path`, in shapes, dtypes and shardings of `like`."""
    stored = _headers(path, ["adapter_model.safetensors"])
    first = next(iter(like.values()))
    shapes = {own: x.shape for own, x in like.items()}
    return _load(path, shapes, entries, stored, first.sharding.mesh, str(first.dtype), lambda done: None)


def _load(
    path: str,
    shapes: dict[str, tuple[int, ...]],
    entries: dict[str, Entry],
    stored: dict[str, Stored],
    mesh: jax.sharding.Mesh,
    dtype: str,
    report: Callable[[int], None],
) -> Params:
    sizes = _sizes(shapes, entries, stored)
    params, done = {}, 0
    for own, shape in shapes.items():
        entry, tensor = entries[own], stored[entries[own].name]
        # Pages of an open file count as this process's memory once they are read: each tensor opens it anew.
        with _opened(path, tensor.file) as file:
            read = functools.partial(entry.read, file.get_slice(tensor.name), shape, dtype=dtype)
            params[own] = _read_once(read, shape, sharding.param_sharding(mesh, own))
        done += sizes[own]
        report(done)
    return params


def _sizes(shapes: dict, entries: dict[str, Entry], stored: dict[str, Stored]) -> dict[str, int]:
    """Bytes in the files of each parameter of ours."""
    return {own: math.prod(shape) * BYTES[stored[entries[own].name].dtype] for own, shape in shapes.items()}


def _read_once(
    read: Callable[[Index], np.ndarray], shape: tuple[int, ...], place: jax.sharding.NamedSharding
) -> jax.Array:
    """The array of `shape` whose parts `read` gives; what several devices hold is read once."""
    blocks = {}

    def block(index: Index) -> np.ndarray:
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        if key not in blocks:
            blocks[key] = read(index)
        return blocks[key]

    # Copies to the device run in the background: without the wait those of many tensors would be under way at once.
    return jax.block_until_ready(jax.make_array_from_callback(shape, place, block))


@contextlib.contextmanager
def _opened(path: str, file: Path) -> Iterator[Any]:
    """A safetensors file of the model at `path`."""
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            yield opened
    except (safetensors.SafetensorError, OSError) as error:
        fix = "it is damaged or cut short; copy or download it again"
        raise _bad(path, f"{file.name} can't be read ({_first_line(error)}); {fix}") from error


def _stored(path: str) -> dict[str, Stored]:
    """Every tensor of the files by name."""
    root = resolve(path)
    if (root / SINGLE).is_file():
        files = [SINGLE]
    elif (root / INDEX).is_file():
        places = _json(path, root / INDEX).get("weight_map")
        if not (isinstance(places, dict) and places and all(isinstance(name, str) for name in places.values())):
            raise _bad(path, f"{INDEX} has no weight_map from tensors to files; copy or download it again")
        files = sorted(set(places.values()))
    else:
        raise _bad(path, f"no {SINGLE} and no {INDEX}; only weights in the safetensors format are read")
    return _headers(path, files)


def _headers(path: str, files: list[str]) -> dict[str, Stored]:
    root, tensors = resolve(path), {}
    for name in files:
        if not (root / name).is_file():
            raise _bad(path, f"{INDEX} names {name}, which is not there; copy or download the directory again")
        with _opened(path, root / name) as opened:
            for key in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                if key in tensors:
                    raise _bad(path, f"tensor {key} is in two files; keep one set of weights in the directory")
                header = opened.get_slice(key)
                tensors[key] = Stored(root / name, key, tuple(header.get_shape()), header.get_dtype())
    return tensors


def _checked(path: str, cfg: DecoderConfig) -> tuple[dict[str, Entry], dict[str, Stored]]:
    """The entry of each parameter, and every tensor of the files, known to fit."""
    kind = config_json(path)["model_type"]
    entries, stored = table(kind, cfg), _stored(path)
    if FAMILIES[kind].prefixes:
        ours, theirs = FAMILIES[kind].prefixes
        stored = {re.sub(f"^{re.escape(theirs)}", ours, name): tensor for name, tensor in stored.items()}
    _check(path, cfg, tensor_shapes(entries, decoder.shapes(cfg)), stored)
    return entries, stored


def _check(path: str, cfg: DecoderConfig, expected: dict[str, tuple[int, ...]], tensors: dict[str, Stored]) -> None:
    """Raises InputError unless `tensors` are those expected, each once, in the right shape and a dtype we read."""
    optional = {"lm_head.weight"} if cfg.tie_embeddings else set()
    extra = [x for x in tensors if x not in expected and x not in optional and not x.endswith("rotary_emb.inv_freq")]
    shape = {name: tensors[name].shape for name in expected if name in tensors}
    other = [f"{name} is {shape[name]}, not {expected[name]}" for name in shape if shape[name] != expected[name]]
    dtypes = [f"{name} is {tensors[name].dtype}" for name in shape if tensors[name].dtype not in BYTES]
    fix = "use the config.json that belongs to these weights, or download the directory again"
    for found, what, advice in (
        ([name for name in expected if name not in tensors], "missing from the files", fix),
        (extra, "in the files that the model has no place for", fix),
        (other, "of another shape than config.json says", fix),
        (dtypes, "of a dtype that is not read", "save the model in " + ", ".join(BYTES)),
    ):
        if found:
            names = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
            raise _bad(path, f"{len(found)} of {len(expected)} tensors {what}: {names}; {advice}")


def load_tokenizer(path: str):
    """The tokenizer of the directory or hub id `path`, fast or sentencepiece; never runs code from it.

    A tokenizer.json is taken as it stands. AutoTokenizer of transformers 5 goes by config.json's model_type instead: of
    a qwen2 directory it keeps the vocabulary and puts Qwen's own rules for splitting words in place of the file's.

    Raises:
        InputError: no tokenizer files, or ones that transformers can't read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # seconds to import, and weights don't need it

    root = resolve(path)
    fix = "the directory needs tokenizer.json, or tokenizer.model with tokenizer_config.json"
    # Without its files some tokenizer classes come up with an empty vocabulary, without a word.
    if not any(file for pattern in VOCABULARIES for file in root.glob(pattern)):
        raise _bad(path, f"no tokenizer in it; {fix}")
    kind = PreTrainedTokenizerFast if (root / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(str(root), trust_remote_code=False)
    except Exception as error:  # whatever a broken file makes the many tokenizer classes raise
        raise _bad(path, f"the tokenizer can't be read ({_first_line(error)}); {fix}") from error


def eos_ids(path: str, tokenizer) -> tuple[int, ...]:
    """Every token id that ends a completion, sorted: of generation_config.json, config.json, tokenizer and template.

    Raises:
        InputError: none of them names one.
    """
    root, found = resolve(path), {tokenizer.eos_token_id, _end_of_turn(path, tokenizer)}
    for name in ("generation_config.json", "config.json"):
        named = _json(path, root / name).get("eos_token_id") if (root / name).is_file() else None
        found.update(named if isinstance(named, list) else [named])
    ids = tuple(sorted(x for x in found if x is not None))
    if not ids:
        raise _bad(path, "no end-of-sequence token; set eos_token_id in generation_config.json")
    return ids


def _end_of_turn(path: str, tokenizer) -> int | None:
    """Id of the special token that the chat template puts after an assistant's words, if there is one."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # jinja runs what the template says
        raise _bad(path, f"the chat template fails ({_first_line(error)}); repair it in the directory") from error
    after = text.rpartition("answer")[2].lstrip()
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    matches = [content for content in special if content and after.startswith(content)]
    return special[max(matches, key=len)] if matches else None


def config_json(path: str) -> dict:
    """The config.json of the directory or hub id `path`, parsed."""
    file = resolve(path) / "config.json"
    if not file.is_file():
        raise _bad(path, "no config.json in it; give the directory of a Hugging Face model")
    return _json(path, file)


def _json(path: str, file: Path) -> dict:
    try:
        value = json.loads(file.read_text("utf-8"))
    except ValueError as error:  # bad JSON and bad utf-8 both
        raise _bad(path, f"{file.name} is not JSON ({_first_line(error)}); copy or download it again") from error
    if not isinstance(value, dict):
        raise _bad(path, f"{file.name} must hold a JSON object; copy or download it again")
    return value


def _bad(path: str, what: str) -> InputError:
    return InputError(f"config.model.path = {path!r}: {what}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
