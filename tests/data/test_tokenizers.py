"""Kinds of tokenizers with kinds of chat templates: q is what transformers gives, and q' has the draft as sampled."""

import itertools
import random

import chat_templates
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from igrpo_jax import config
from igrpo_jax.data.prompts import Renderer

TEXTS = [
    f"How many apples does Tom have if he has {i} and gets {j}?\n\nA draft: {i * j}" for i in range(9) for j in "abc"
]
TEXTS += ["[INST] USER: ASSISTANT: user assistant system <draft>\n</draft> <think>", *chat_templates.ALL.values()]
SPECIAL = ["<unk>", "<s>", "</s>", "[CLS]", "[SEP]"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
# The rules of Qwen2.5 and Llama 3 for splitting text: newlines stay together, digits are alone.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(split=None, trim_offsets=False):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split:
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), bytes_only])
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return raw


def sentencepiece(*steps, metaspace=None):
    """Llama 2's kind with Prepend, Gemma's without; with `metaspace` the kind that transformers writes today."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    else:
        raw.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL + BYTES, show_progress=False)
    raw.train_from_iterator(TEXTS, trainer)
    return raw


def unigram():
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace()
    raw.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    return raw


def wordpiece():
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=False)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    raw.train_from_iterator(TEXTS, trainer)
    return raw


KINDS = {
    "byte-level, GPT-2's split": byte_level,
    "byte-level, Qwen's split": lambda: byte_level(SPLIT),
    "SentencePiece with Prepend": lambda: sentencepiece(normalizers.Prepend("▁")),
    "SentencePiece without Prepend": sentencepiece,
    "Metaspace, first": lambda: sentencepiece(metaspace="first"),
    "Metaspace, always": lambda: sentencepiece(metaspace="always"),
    "Unigram": unigram,
    "WordPiece": wordpiece,
}
POST = {
    "adds nothing": None,
    "adds BOS": "<s> $A",
    "adds both": "<s> $A </s>",
}


def tokenizer_of(kind, post):
    raw = KINDS[kind]()
    if POST[post]:
        special = [(token, raw.token_to_id(token)) for token in ("<s>", "</s>")]
        raw.post_processor = processors.TemplateProcessing(single=POST[post], special_tokens=special)
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **tokens)
    tokenizer.add_tokens(chat_templates.MARKS, special_tokens=True)
    return tokenizer


def prompt_of(tokenizer, words, **kwargs):
    """The ids of the complete prompt by transformers."""
    turns = [{"role": "user", "content": words}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, **kwargs)["input_ids"]


def questions(random_of):
    """Some questions by hand, and some of random characters and blanks."""
    yield from (
        "How many apples does Tom have?",
        " two  blanks ",
        "\n\nlines\n" + " \n" * 20,
        "é → $\\frac{1}{2}$ 12,345",
        "0",
    )
    for _ in range(4):
        yield "".join(random_of.choices("ab Z0 9.\n\n<>|[]/_▁é\t", k=random_of.randrange(1, 25))) + "?"


WORDINGS = {"default": config.RefineConfig().instruction, "lines": "A draft:\n\n{draft}\n\nImprove."}


@pytest.mark.parametrize(("kind", "post"), itertools.product(KINDS, POST))
def test_prompts_are_those_of_the_chat_template(kind, post):
    """Broken up at the seams of the question, SentencePiece would put a space before each piece, and byte-level
    tokenizers would join other line ends."""
    tokenizer, random_of = tokenizer_of(kind, post), random.Random(kind + post)
    taken = {*tokenizer.convert_tokens_to_ids([*SPECIAL, *chat_templates.MARKS])}  # drafts don't have these
    plain = [id for id in range(len(tokenizer)) if id not in taken]
    for name, (wording, refine) in itertools.product(chat_templates.ALL, WORDINGS.items()):
        tokenizer.chat_template = chat_templates.ALL[name]
        kwargs = {"Llama 3.2": {"date_string": "26 Jul 2024"}, "Qwen3": {"enable_thinking": False}}.get(name, {})
        parts = config.DataConfig(instruction="", template_kwargs=kwargs), config.RefineConfig(instruction=refine)
        renderer = Renderer(tokenizer, *parts, 50, (tokenizer.eos_token_id,))
        for question in questions(random_of):
            what = f"{name}, {wording}: {question!r}"
            q = renderer.plain(question)
            assert q.dtype == np.int32 and q.tolist() == prompt_of(tokenizer, question, **kwargs), what
            draft = np.array(random_of.choices(plain, k=random_of.randrange(1, 12)), np.int32)
            refined = renderer.with_draft(question, draft).tolist()
            assert len(refined) - len(q) <= renderer.draft_overhead(len(draft), [question]), what
            # What stands beside the draft is what stands beside a number there.
            words = f"{question}\n\n" + refine.replace("{draft}", "7")
            whole, shared = prompt_of(tokenizer, words, **kwargs), len(refined) - len(draft)
            lefts = [n for n in range(shared + 1) if refined[n : n + len(draft)] == draft.tolist()]
            assert any(
                whole[:n] + whole[n + len(whole) - shared :] == refined[:n] + refined[n + len(draft) :] for n in lefts
            ), what
            assert 0 < len(whole) - shared <= 2, what
