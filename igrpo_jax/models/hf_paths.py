"""Directories of models on Hugging Face's hub or on disk: where their files are, JSON that is in them, and errors.

A directory may be given as a path, as one in a bucket or as a hub id; `resolve` fetches the last two.
"""

import fnmatch
import functools
import json
import re
from pathlib import Path

import huggingface_hub

from igrpo_jax.errors import InputError
from igrpo_jax.storage import addresses, reading

WANTED = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "merges.txt", "vocab.txt")
TEMPLATES = "additional_chat_templates/*.jinja"  # chat templates besides the default one


def resolve(path: str) -> Path:
    """Returns `path` itself where it is a directory, else the local copy of a bucket's, or of the hub's of that name.

    Raises:
        InputError: none exists, or the bucket or the hub can't be reached.
    """
    if addresses.is_remote(path):
        return _copy(path)
    if (folder := addresses.path_of(f"config.model.path = {path!r}", path)).is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise path_error(path, "no such directory; give a Hugging Face model directory or a hub id such as owner/name")
    return _download(path)


@functools.cache
def _copy(address: str) -> Path:
    named = lambda name: "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in WANTED)
    wanted = lambda name: named(name) or fnmatch.fnmatch(name, TEMPLATES)
    return reading.local(f"config.model.path = {address!r}", address, wanted)


@functools.cache
def _download(name: str) -> Path:
    try:
        # Its patterns match in folders too, such as those of checkpoints or of weights in another format.
        folder = huggingface_hub.snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=["*/*"])
        huggingface_hub.snapshot_download(name, allow_patterns=[TEMPLATES])
        return Path(folder)
    except Exception as error:  # its errors have no common base: HTTP, validation, offline, file system
        reason = f"{type(error).__name__}: {first_line(error)}"
        fix = "give a local directory with config.json, the safetensors files and the tokenizer"
        raise path_error(name, f"no such directory, and the hub did not provide it ({reason}); {fix}") from error


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
