"""Prompts in token space: q, and q' = q with a draft inside the user's turn; with all wording and the chat template.

The chat template is rendered once, with a sentinel in place of the user's words. The text before and after it is kept
as token ids, and a prompt is before + words + after. A draft enters q' as the ids that were sampled (q' = Concat(q, d)
in arXiv 2602.09000) and is never decoded. Questions are encoded as text: a special token written in a question does not
become one. Marks of a turn count as special even where the tokenizer does not list them (R1's <｜User｜>), so neither a
draft nor a question can open a turn.

R1 templates open <think> for the assistant and remove the thinking of its earlier turns. A draft is not such a turn: it
is part of the user's words, so q' contains all of it as it was sampled, including its reasoning. It begins inside the
<think> that the template had opened for it, and so shows only the closing tag. A draft longer than
refine.max_draft_length lacks its beginning as well. With a template that opens nothing (Qwen3, the Nemotrons), both
tags are shown.
"""

import re

import numpy as np
from transformers import PreTrainedTokenizerBase

from igrpo_jax.config import DataConfig, RefineConfig
from igrpo_jax.errors import InputError
from igrpo_jax.rewards.format import TAGS

SENTINEL = "[[ here go the words of the user ]]"


class Renderer:
    """Turns questions, and questions with drafts, into token ids.

    Attributes:
        opening: text that the template itself writes for the assistant ("<think>\\n" for R1 templates, usually "").
            Rewards read it before the completion.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        refine: RefineConfig,
        max_draft_length: int,
        eos_ids: tuple[int, ...],
    ):
        self._tokenizer = tokenizer
        self._instruction = data.instruction
        self._max_draft_length = max_draft_length
        self._special = np.array(sorted({*tokenizer.all_special_ids, *eos_ids}), np.int32)
        before, after = self._template()
        self._marks = np.array(_marks(tokenizer, before + after), np.int32)
        self._before = self._ids(before, special=True)
        self._after = self._ids(after, special=True)
        self.opening = after[after.rindex("<think>") :] if "<think>" in after else ""
        lead, tail = refine.instruction.split("{draft}")
        self._lead = "\n\n" + lead
        self._tail = tail

    def _template(self) -> tuple[str, str]:
        """Returns the text before and after the user's words."""
        if not self._tokenizer.chat_template:  # a base model
            return self._tokenizer.bos_token or "", "\n"
        message = [{"role": "user", "content": SENTINEL}]
        text = self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        if text.count(SENTINEL) != 1:
            raise InputError(
                "config.model.path: its chat template does not show the user's message once and unchanged; give the "
                "model a template that does"
            )
        before, _, after = text.partition(SENTINEL)
        return before, after

    def _ids(self, text: str, special: bool) -> np.ndarray:
        if not text:
            return np.zeros((0,), np.int32)
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=not special)
        ids = np.asarray(encoded["input_ids"], np.int32)
        return ids if special else ids[~np.isin(ids, self._marks)]  # marks are never split, so they are removed

    def _words(self, question: str) -> str:
        return f"{self._instruction}\n\n{question}" if self._instruction else question

    def plain(self, question: str) -> np.ndarray:
        """Returns q: [L] int32, including the generation prompt."""
        return np.concatenate([self._before, self._ids(self._words(question), special=False), self._after])

    def with_draft(self, question: str, draft: np.ndarray) -> np.ndarray:
        """Returns q': [L'] int32.

        Args:
            draft: [T] int32 sampled ids. EOS and other special tokens are removed. A draft longer than max_draft_length
                is cut to its tail, where the answer is.
        """
        kept = self.kept_draft(draft)
        words = self._ids(self._words(question) + self._lead, special=False)
        tail = self._ids(self._tail, special=False)
        return np.concatenate([self._before, words, kept, tail, self._after])

    def kept_draft(self, draft: np.ndarray) -> np.ndarray:
        """Returns the ids of `draft` that q' contains."""
        clean = draft[~np.isin(draft, [*self._special, *self._marks])]
        return clean[-self._max_draft_length :]

    def draft_overhead(self, longest: int) -> int:
        """Returns the most tokens that q' has beyond q: the wording and a draft of at most `longest` tokens."""
        wording = len(self._ids(self._lead, special=False)) + len(self._ids(self._tail, special=False))
        # The lead is encoded together with the question, so it may split into other tokens than it does alone.
        return wording + min(longest, self._max_draft_length) + 8

    def text(self, tokens: np.ndarray) -> str:
        """Returns the text that people and verifiers read, without special tokens."""
        return self._tokenizer.decode(tokens[~np.isin(tokens, self._special)].tolist(), skip_special_tokens=True)


def most_overhead(refine: RefineConfig, max_draft_length: int) -> int:
    """Returns `Renderer.draft_overhead` without a tokenizer, with one token for each word or mark of the wording."""
    wording = re.findall(r"\w+|[^\w\s]|\n+", "\n\n" + refine.instruction.replace("{draft}", ""))
    return len(wording) + max_draft_length + 8


def _marks(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Returns ids of added tokens that mark turns in the template although the tokenizer does not call them special."""
    added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if not token.special}
    return [id for content, id in added.items() if content.strip() and content not in TAGS and content in template]
