"""What a Hugging Face directory says of its model besides the weights: config.json, the tokenizer, the EOS ids.

A directory may be given as a path or as a hub id; `resolve` downloads the latter. Not here: the weights (`hf_read`).
"""

import functools
import json
import re
from pathlib import Path

import huggingface_hub

from igrpo_jax.errors import InputError
from igrpo_jax.models import config
from igrpo_jax.models.config import DecoderConfig

WANTED = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "merges.txt", "vocab.txt")
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json")


def resolve(path: str) -> Path:
    """Returns `path` itself where it is a directory, else the local copy of the hub's repository of that name.

    Raises:
        InputError: neither exists, or the hub can't be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise path_error(path, "no such directory; give a Hugging Face model directory or a hub id such as owner/name")
    return _download(path)


@functools.cache
def _download(name: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(WANTED)))
    except Exception as error:  # its errors have no common base: HTTP, validation, offline, file system
        reason = f"{type(error).__name__}: {first_line(error)}"
        fix = "give a local directory with config.json, the safetensors files and the tokenizer"
        raise path_error(name, f"no such directory, and the hub did not give it ({reason}); {fix}") from error


def load_config(path: str) -> DecoderConfig:
    """Returns the DecoderConfig of the directory or hub id `path`.

    Raises:
        InputError: no config.json, or one that the decoder can't follow.
    """
    return config.from_hf(config_json(path), f"config.model.path = {path!r}: config.json")


def config_json(path: str) -> dict:
    """Returns the config.json of the directory or hub id `path`, parsed."""
    file = resolve(path) / "config.json"
    if not file.is_file():
        raise path_error(path, "no config.json in it; give the directory of a Hugging Face model")
    return read_json(path, file)


def load_tokenizer(path: str):
    """Returns the tokenizer of the directory or hub id `path`, fast or sentencepiece; never runs code from it.

    A tokenizer.json is used unchanged. AutoTokenizer of transformers 5 follows config.json's model_type instead: for a
    qwen2 directory it keeps the vocabulary but replaces the file's rules for splitting words with Qwen's own.

    Raises:
        InputError: no tokenizer files, or files that transformers can't read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # takes seconds to import; weights don't need it

    root = resolve(path)
    fix = "the directory needs tokenizer.json, or tokenizer.model with tokenizer_config.json"
    # Without its files some tokenizer classes silently start with an empty vocabulary.
    if not any(file for pattern in VOCABULARIES for file in root.glob(pattern)):
        raise path_error(path, f"no tokenizer in it; {fix}")
    kind = PreTrainedTokenizerFast if (root / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(str(root), trust_remote_code=False)
    except Exception as error:  # whatever a broken file makes the many tokenizer classes raise
        raise path_error(path, f"the tokenizer can't be read ({first_line(error)}); {fix}") from error


def eos_ids(path: str, tokenizer) -> tuple[int, ...]:
    """Returns every token id that ends a completion, sorted.

    The ids come from generation_config.json, config.json, the tokenizer and the chat template.

    Raises:
        InputError: none of them names one.
    """
    root = resolve(path)
    ids = {tokenizer.eos_token_id, _end_of_turn(path, tokenizer)}
    for name in ("generation_config.json", "config.json"):
        named = read_json(path, root / name).get("eos_token_id") if (root / name).is_file() else None
        ids.update(named if isinstance(named, list) else [named])
    ids.discard(None)
    if not ids:
        raise path_error(path, "no end-of-sequence token; set eos_token_id in generation_config.json")
    return tuple(sorted(ids))


def _end_of_turn(path: str, tokenizer) -> int | None:
    """Returns the id of the special token that the chat template puts after an assistant's words, None without one."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # jinja runs whatever the template contains
        message = f"the chat template fails ({first_line(error)}); repair it in the directory"
        raise path_error(path, message) from error
    after = text.rpartition("answer")[2].lstrip()
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    matches = [content for content in special if content and after.startswith(content)]
    return special[max(matches, key=len)] if matches else None


def read_json(path: str, file: Path) -> dict:
    """Returns the JSON object in `file`, which belongs to the model at `path`."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except ValueError as error:  # bad JSON and bad utf-8 both
        message = f"{file.name} is not JSON ({first_line(error)}); copy or download it again"
        raise path_error(path, message) from error
    if not isinstance(value, dict):
        raise path_error(path, f"{file.name} must hold a JSON object; copy or download it again")
    return value


def path_error(path: str, message: str) -> InputError:
    """Returns the error of a wrong `config.model.path`."""
    return InputError(f"config.model.path = {path!r}: {message}")


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or the name of its type where the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
