"""The chat template in token space: the user's words and what the template writes around them, as token ids.

    frame = open_frame(tokenizer, config.data)
    q = frame.ids(words)                                          # as apply_chat_template gives them
    left, right = frame.ids_before(start), frame.ids_after(end)   # around a draft between `start` and `end`

The text of a chat template is always encoded in one piece. In pieces, the tokenizers of Llama 2 and its relatives would
put a space before each piece, and others would split the text at a seam into tokens that the model has not seen there.

Questions are text: a special token written in a question does not become one. Marks of a turn count as special even
where the tokenizer does not list them (R1's <｜User｜>), so a question can't open a turn.
"""

import re
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from igrpo_jax.config import DataConfig
from igrpo_jax.data import pinning
from igrpo_jax.errors import InputError, one_line
from igrpo_jax.rewards.format import TAGS
from igrpo_jax.schema.fields import refusal

SENTINEL = "[[ here go the words of the user ]]"
STAND_IN = "0"  # encoded instead of a draft; tokenizers rarely join a digit with what stands next to it
PROBE = "How much is 12 + 34?"


class Frame(Protocol):
    """What stands around the user's words in a prompt."""

    before: str
    after: str  # with the beginning of the reply
    marks: np.ndarray  # ids of tokens that may mark turns, in addition to the special tokens that transformers lists

    def ids(self, words: str) -> np.ndarray:
        """Returns the prompt with these words of the user: [L] int32."""

    def ids_before(self, start: str) -> np.ndarray:
        """Returns what stands before a draft that follows `start` in the user's words: [L] int32."""

    def ids_after(self, end: str) -> np.ndarray:
        """Returns what stands after a draft that `end` follows in the user's words: [L] int32."""


def open_frame(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Frame:
    """Returns the frame of the tokenizer's chat template, or that of a base model, which has none.

    Raises:
        InputError: as `ChatTemplate`; a base model with settings of a template.
    """
    data = pinning.dated(data, tokenizer)
    if template := pinning.template_of(tokenizer):
        text = pinning.pinned(template, data.template_kwargs, data.template_date)
        return ChatTemplate(tokenizer, text, data.system_prompt)
    if data.system_prompt:
        fix = "the model has no chat template and so no system turn; put the text into data.instruction"
        raise refusal("data.system_prompt", data.system_prompt, fix)
    return PlainText(tokenizer)


class PlainText:
    """The frame of a base model: BOS before the user's words, a line end after them, each encoded separately."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self.before, self.after = tokenizer.bos_token or "", "\n"
        self.marks = _array(_marks(tokenizer, self.before + self.after))

    def ids(self, words: str) -> np.ndarray:
        return np.concatenate([self.ids_before(words), self.ids_after("")])

    def ids_before(self, start: str) -> np.ndarray:
        return np.concatenate([_ids(self._tokenizer, self.before), text_ids(self._tokenizer, start, self.marks)])

    def ids_after(self, end: str) -> np.ndarray:
        return np.concatenate([text_ids(self._tokenizer, end, self.marks), _ids(self._tokenizer, self.after)])


class ChatTemplate:
    """The frame of a chat template: the user's turn, after a system turn where that is wanted.

    Args:
        template: its text, with the run's values of its variables (`pinning.pinned`).
        system_prompt: text of the system turn; "" adds none, but the template may write its own.

    Raises:
        InputError: the template fails, does not show the words of the user or of the system once, or can't be encoded
            as transformers does it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, system_prompt: str):
        self._tokenizer = tokenizer
        self._template = template
        self._system_prompt = ""
        if system_prompt:
            self._check_system_turn(system_prompt)
        self._system_prompt = system_prompt
        self.before, self.after = self._around(SENTINEL)
        # The unknown token stands for a character of the question, and nobody wrote it there as a token.
        marks = (_marks(tokenizer, self.before + self.after) | _special(tokenizer)) - {tokenizer.unk_token_id}
        self.marks = _array(marks)
        self._controls = marks | {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        contents = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, contents)) or r"(?!)")
        # The special tokens that the template itself writes into a prompt, by the template's text after the words.
        self._own = {
            "": self._controls_in(_ids(tokenizer, self.before)),
            self.after: self._controls_in(_ids(tokenizer, self._render(PROBE))),
        }
        self._check_ids()

    def _check_system_turn(self, system_prompt: str) -> None:
        """Raises InputError if the template has no place for the words of a system turn."""
        messages = [{"role": "system", "content": SENTINEL}, {"role": "user", "content": PROBE}]
        try:
            shown = self._apply(messages).count(SENTINEL)
        except Exception:  # some templates raise for a role that they don't know, others leave its words out
            shown = 0
        if shown != 1:
            fix = "the chat template of the model has no system turn; put the text into data.instruction"
            raise refusal("data.system_prompt", system_prompt, fix)

    def _check_ids(self) -> None:
        """Raises InputError if transformers gives other ids for a prompt than `ids` does."""
        messages = self._messages(PROBE)
        options = {"chat_template": self._template, "add_generation_prompt": True, "return_dict": True}
        theirs = self._tokenizer.apply_chat_template(messages, **options)["input_ids"]
        if list(theirs) != self.ids(PROBE).tolist():
            raise InputError(
                "config.model.path: its tokenizer encodes the text of its chat template differently from "
                "apply_chat_template; give the directory a tokenizer.json that agrees with it"
            )

    def _messages(self, words: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self._system_prompt}] if self._system_prompt else []
        return [*system, {"role": "user", "content": words}]

    def _apply(self, messages: list[dict[str, str]]) -> str:
        options = {"chat_template": self._template, "add_generation_prompt": True, "tokenize": False}
        return self._tokenizer.apply_chat_template(messages, **options)

    def _render(self, words: str) -> str:
        """Returns the text of the prompt with these words of the user."""
        try:
            return self._apply(self._messages(words))
        except Exception as error:  # Jinja runs whatever the template contains
            message = (
                f"config.model.path: its chat template fails ({one_line(error)[:200]}); repair it in the directory"
            )
            raise InputError(message) from error

    def _around(self, words: str) -> tuple[str, str]:
        """Returns the text on both sides of the SENTINEL in `words`, in the prompt with these words."""
        text = self._render(words)
        if text.count(SENTINEL) != 1:
            raise InputError(
                "config.model.path: its chat template does not show the user's message once and unchanged; give the "
                "model a template that does"
            )
        before, _, after = text.partition(SENTINEL)
        return before, after

    def ids(self, words: str) -> np.ndarray:
        return self._encode(self._render(words), self.after)

    def ids_before(self, start: str) -> np.ndarray:
        text, _, _ = self._render(start + SENTINEL).rpartition(SENTINEL)  # the last one: `start` may contain another
        alone, followed = self._encode(text, ""), self._encode(text + STAND_IN, "")[:-1]
        # Prefers the encoding with more text behind, unless the stand-in's token absorbed a space at the end of `text`.
        is_complete = np.array_equal(followed, alone) or self._text(followed) == self._text(alone)
        return followed if is_complete else alone

    def ids_after(self, end: str) -> np.ndarray:
        """Returns what `Frame` says.

        Raises:
            InputError: the tokenizer joins the text after a draft with the draft.
        """
        before, after = self._around(PROBE + SENTINEL + end)
        shorter, longer = _ids(self._tokenizer, before + STAND_IN), _ids(self._tokenizer, before + STAND_IN + after)
        if shorter.tolist() != longer[: len(shorter)].tolist():
            raise InputError(
                "config.refine.instruction: the tokenizer joins the text after {draft} with the end of a draft; begin "
                "that text with a line end"
            )
        return longer[len(shorter) :]

    def _text(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _controls_in(self, ids: np.ndarray) -> list[int]:
        return [id for id in ids.tolist() if id in self._controls]

    def _encode(self, text: str, after: str) -> np.ndarray:
        """Returns the ids of a prompt or of its part up to a draft, [L] int32.

        Args:
            after: what the template writes after the words in `text`.
        """
        ids = _ids(self._tokenizer, text)
        return ids if self._controls_in(ids) == self._own[after] else self._encode_apart(text, after)

    def _encode_apart(self, text: str, after: str) -> np.ndarray:
        """Returns what `_encode` does for words that contain special tokens, which stay text here.

        The words are encoded with the template's text around them, up to the nearest added token on each side, because
        a tokenizer encodes the text between two added tokens independently.
        """
        if not (text.startswith(self.before) and text.endswith(after)):
            raise InputError(
                "config.model.path: its chat template changes what surrounds a question that contains special tokens; "
                "give the model a template that does not, or leave such questions out"
            )
        begin = max((match.end() for match in self._added.finditer(self.before)), default=0)
        first = self._added.search(after)
        stop = len(text) - len(after) + (first.start() if first else len(after))
        words = text_ids(self._tokenizer, text[begin:stop], self.marks)
        return np.concatenate([_ids(self._tokenizer, text[:begin]), words, _ids(self._tokenizer, text[stop:])])


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, marks: np.ndarray) -> np.ndarray:
    """Returns the ids of `text` on its own, [L] int32. Special tokens in it stay text.

    Marks, which a tokenizer never splits, are left out.
    """
    ids = _ids(tokenizer, text, as_text=True)
    return ids[~np.isin(ids, marks)]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, as_text: bool = False) -> np.ndarray:
    if not text:
        return np.zeros((0,), np.int32)
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=as_text)
    return np.asarray(encoded["input_ids"], np.int32)


def _marks(tokenizer: PreTrainedTokenizerBase, template: str) -> set[int]:
    """Returns ids of added tokens that mark turns in the template although the tokenizer does not call them special."""
    added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if not token.special}
    return {id for content, id in added.items() if content.strip() and content not in TAGS and content in template}


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns ids of the added tokens that the tokenizer calls special, even if transformers does not list them.

    The tags of an answer and byte tokens such as <0x0A> count as text.
    """
    is_text = lambda content: content in TAGS or re.fullmatch(r"<0x[0-9A-F]{2}>", content)
    return {id for id, token in tokenizer.added_tokens_decoder.items() if token.special and not is_text(token.content)}


def _array(ids: set[int]) -> np.ndarray:
    return np.array(sorted(ids), np.int32)
