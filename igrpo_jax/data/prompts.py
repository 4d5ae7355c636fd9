"""Prompts in token space: q, and q' = q with a draft inside the user's turn; with all wording and the chat template.

The text around a draft is that of the chat template (`templates`), encoded in one piece. A draft enters q' as the ids
that were sampled (q' = Concat(q, d) in arXiv 2602.09000) and is never decoded. Special tokens and marks of a turn are
removed from it, so a draft can't open a turn. Neither can a question (`templates`).

R1 templates open <think> for the assistant and remove the thinking of its earlier turns. A draft is not such a turn: it
is part of the user's words, so q' contains all of it as it was sampled, including its reasoning. It begins inside the
<think> that the template had opened for it, and so shows only the closing tag. A draft longer than
refine.max_draft_length lacks its beginning as well. With a template that opens nothing (Qwen3, the Nemotrons), both
tags are shown.
"""

import re
from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedTokenizerBase

from igrpo_jax.config import DataConfig, RefineConfig
from igrpo_jax.data import templates

# What replaces {verdict}, by whether the draft's answer is right; None = not verified.
VERDICT_WORDS = {True: "correct", False: "incorrect", None: "unverified"}


def _with_verdict(text: str, is_right: bool | None) -> str:
    return text.replace("{verdict}", VERDICT_WORDS[is_right])


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
        self._special = templates.control_ids(tokenizer).union(eos_ids)
        self._frame = templates.open_frame(tokenizer, data)
        self._not_kept = self._special.union(self._frame.marks.tolist())  # of a draft
        reply = self._frame.reply
        self.opening = reply[reply.rindex("<think>") :] if "<think>" in reply else ""
        lead, tail = refine.instruction.split("{draft}")
        self._lead = "\n\n" + lead
        self._tail = tail
        self._after_draft = {known: self._frame.ids_after(_with_verdict(tail, known)) for known in VERDICT_WORDS}

    def _words(self, question: str) -> str:
        return templates.user_words(self._instruction, question)

    def plain(self, question: str) -> np.ndarray:
        """Returns q: [L] int32, including the generation prompt."""
        return self._frame.ids(self._words(question))

    def with_draft(self, question: str, draft: np.ndarray, is_right: bool | None = None) -> np.ndarray:
        """Returns q': [L'] int32.

        Args:
            draft: [T] int32 sampled ids. EOS and other special tokens are removed. A draft longer than max_draft_length
                is cut to its tail, where the answer is.
            is_right: what {verdict} in refine.instruction says of the draft; None = it was not verified.
        """
        before = self._frame.ids_before(self._words(question) + _with_verdict(self._lead, is_right))
        return np.concatenate([before, self.kept_draft(draft), self._after_draft[is_right]])

    def kept_draft(self, draft: np.ndarray) -> np.ndarray:
        """Returns the ids of `draft` that q' contains."""
        clean = [token for token in draft.tolist() if token not in self._not_kept]
        return np.array(clean[-self._max_draft_length :], np.int32)

    def draft_overhead(self, longest: int, questions: Iterable[str] = ()) -> int:
        """Returns the most tokens that q' has beyond q: the wording and a draft of at most `longest` tokens.

        Blanks at the end of one of the `questions` count too: q lacks those that the chat template strips.
        """
        marks = self._frame.marks
        length = lambda text, known: len(templates.text_ids(self._tokenizer, _with_verdict(text, known), marks))
        wording = max(length(self._lead, known) + length(self._tail, known) for known in VERDICT_WORDS)
        blanks = max((len(text.encode()) - len(text.rstrip().encode()) for text in questions), default=0)
        # The lead is encoded together with the question, so it may split into other tokens than it does alone.
        return wording + blanks + min(longest, self._max_draft_length) + 8

    def text(self, tokens: np.ndarray) -> str:
        """Returns the text that people and verifiers read, without special tokens."""
        seen = [token for token in tokens.tolist() if token not in self._special]
        return self._tokenizer.decode(seen, skip_special_tokens=False)


def most_overhead(refine: RefineConfig, max_draft_length: int) -> int:
    """Returns `Renderer.draft_overhead` without a tokenizer, with one token for each word or mark of the wording."""
    wording = re.findall(r"\w+|[^\w\s]|\n+", "\n\n" + refine.instruction.replace("{draft}", ""))
    return len(wording) + max_draft_length + 8
