"""What a Hugging Face directory says of its model besides the weights: config.json, the tokenizer, the EOS ids.

Not here: where the directory is (`hf_paths`), and the weights (`hf_read`).
"""

import hashlib
from dataclasses import replace

from absl import logging

from igrpo_jax.loading import is_of_a_run
from igrpo_jax.models import config, hf_tensors
from igrpo_jax.models.config import DecoderConfig
from igrpo_jax.models.hf_paths import first_line, path_error, read_json, resolve

VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json")


def load_config(path: str) -> DecoderConfig:
    """Returns the DecoderConfig of the directory or hub id `path`.

    Where config.json ties the embeddings but the files hold a head that differs from them, the head is read, and a
    warning says so, as in transformers 5.

    Raises:
        InputError: no config.json, or one that the decoder can't follow.
    """
    raw = config_json(path)
    cfg = config.from_hf(raw, f"config.model.path = {path!r}: config.json")
    if cfg.tie_embeddings and hf_tensors.has_own_head(path, raw):
        logging.warning(
            "config.model.path = %r: config.json has tie_word_embeddings = true, but the files hold another "
            "lm_head.weight than the embeddings; the head of the files is used. Write tie_word_embeddings = false into "
            "config.json, or take lm_head.weight out of the files.",
            path,
        )
        return replace(cfg, tie_embeddings=False)
    return cfg


def config_json(path: str) -> dict:
    """Returns the config.json of the directory or hub id `path`, parsed."""
    file = resolve(path) / "config.json"
    if not file.is_file():
        _refuse_adapter(path)
        raise path_error(path, "no config.json in it; give the directory of a Hugging Face model")
    raw = read_json(path, file)
    if is_of_a_run(raw):
        fix = f"write its policy with `python -m igrpo_jax.export --workdir {path} --out DIR`, and give that DIR"
        raise path_error(path, f"is the folder of a run; {fix}")
    return raw


def _refuse_adapter(path: str) -> None:
    """Raises InputError if the directory or hub id `path` holds LoRA's adapters without the model they change."""
    file = resolve(path) / "adapter_config.json"
    if file.is_file():
        base = read_json(path, file).get("base_model_name_or_path")
        raise path_error(
            path,
            f"is a LoRA adapter (of {base!r}), not a whole model; write one with `python -m igrpo_jax.export --workdir "
            "RUN --out DIR`, without --adapter, or with peft's merge_and_unload, and give that DIR",
        )


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


def tokenizer_fingerprint(path: str) -> str:
    """Returns a hash of the files that decide the ids of the tokenizer at `path`."""
    root, digest = resolve(path), hashlib.sha256()
    # Where there is a tokenizer.json, `load_tokenizer` reads no other vocabulary.
    own = [root / "tokenizer.json"] if (root / "tokenizer.json").is_file() else []
    others = (*VOCABULARIES, "merges.txt", "added_tokens.json", "special_tokens_map.json")
    for file in own or sorted({file for pattern in others for file in root.glob(pattern)}):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def eos_ids(path: str, tokenizer) -> tuple[int, ...]:
    """Returns every token id that ends a completion, sorted.

    The ids come from the tokenizer, the chat template and `named_eos_ids`.

    Raises:
        InputError: none of them names one.
    """
    ids = {tokenizer.eos_token_id, _end_of_turn(path, tokenizer), *named_eos_ids(path)}
    ids.discard(None)
    if not ids:
        raise path_error(path, "no end-of-sequence token; set eos_token_id in generation_config.json")
    return tuple(sorted(ids))


def named_eos_ids(path: str) -> list[int]:
    """Returns the ids that generation_config.json names as ends of a completion, or config.json where that names none.

    As in transformers: config.json may hold the default of its class, which can be any token.

    Raises:
        InputError: what they name is no id.
    """
    root = resolve(path)
    for name in ("generation_config.json", "config.json"):
        raw = read_json(path, root / name) if (root / name).is_file() else {}
        named = config.value(raw, f"config.model.path = {path!r}: {name}", config.TOKENS, "eos_token_id", [])
        if ids := [id for id in (named if isinstance(named, list) else [named]) if id is not None]:
            return ids
    return []


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
