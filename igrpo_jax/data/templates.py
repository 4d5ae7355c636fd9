"""The chat template in token space: the user's words and what the template writes around them, as token ids.

    frame = open_frame(tokenizer, config.data)
    q = frame.ids(words)                                          # as apply_chat_template gives them
    left, right = frame.ids_before(start), frame.ids_after(end)   # around a draft between `start` and `end`

The text of a chat template is always encoded in one piece. In pieces, the tokenizers of Llama 2 and its relatives would
put a space before each piece, and others would split the text at a seam into tokens that the model has not seen there.

Questions are text: a special token written in a question does not become one. Marks of a turn count as special even
where the tokenizer does not list them (R1's <｜User｜>), so a question can't open a turn. The tags of an answer never
count as special, even where the tokenizer does list them.
"""

import re
from typing import Protocol

import numpy as np
from absl import logging
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
    after: str  # with `reply`
    reply: str  # what the template itself writes for the assistant
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
        frame = ChatTemplate(tokenizer, text, data.system_prompt)
        frame.check_ids(user_words(data.instruction, PROBE))
        return frame
    if data.system_prompt:
        fix = "the model has no chat template and so no system turn; put the text into data.instruction"
        raise refusal("data.system_prompt", data.system_prompt, fix)
    return PlainText(tokenizer)


def user_words(instruction: str, question: str) -> str:
    """Returns what the user says: the question, after config.data.instruction where there is one."""
    return f"{instruction}\n\n{question}" if instruction else question


class PlainText:
    """The frame of a base model: BOS before the user's words, a line end after them, each encoded separately."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self.before, self.after, self.reply = tokenizer.bos_token or "", "\n", ""
        self.marks = _array(control_ids(tokenizer) - {*tokenizer.all_special_ids})

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
        InputError: the template fails, or does not show the words of the user or of the system once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, system_prompt: str):
        self._tokenizer = tokenizer
        self._template = template
        self._system_prompt = ""
        if system_prompt:
            self._check_system_turn(system_prompt)
        self._system_prompt = system_prompt
        self.before, self.after = self._around()
        self.reply = self._begun_reply()
        # The unknown token stands for a character of the question, and nobody wrote it there as a token.
        controls = _marks(tokenizer, self.before + self.after) | control_ids(tokenizer)
        self._controls = controls - {tokenizer.unk_token_id}
        self.marks = _array(self._controls - {*tokenizer.all_special_ids})
        contents = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, contents)) or r"(?!)")
        # The special tokens that the template itself writes into a prompt, by the template's text after the words.
        self._own = {
            "": self._controls_in(_ids(tokenizer, self.before)),
            self.after: self._controls_in(_ids(tokenizer, self._render(PROBE))),
        }

    def _check_system_turn(self, system_prompt: str) -> None:
        """Raises InputError if the template has no place for the words of a system turn; warns if it changes them."""
        user = {"role": "user", "content": PROBE}
        shown = lambda words: self._apply([{"role": "system", "content": words}, user])
        try:
            before, _, after = shown(SENTINEL).partition(SENTINEL)
            is_shown, text = bool(after) and SENTINEL not in after, shown(system_prompt)
        except Exception:  # some templates raise for a role that they don't know, others leave its words out
            is_shown = False
        if not is_shown:
            fix = "the chat template of the model has no system turn; put the text into data.instruction"
            raise refusal("data.system_prompt", system_prompt, fix)
        if change := _change(text, before, system_prompt, after):
            logging.warning(
                "config.data.system_prompt = %r: the chat template of the model shows it changed: %s. That is right "
                "for a word that switches its thinking on or off.",
                system_prompt,
                change,
            )

    def check_ids(self, words: str) -> None:
        """Raises InputError if transformers gives other ids for the prompt with these words than `ids` does."""
        messages = self._messages(words)
        options = {"chat_template": self._template, "add_generation_prompt": True, "return_dict": True}
        theirs = self._tokenizer.apply_chat_template(messages, **options)["input_ids"]
        if list(theirs) != self.ids(words).tolist():
            raise InputError(
                "config.model.path: its tokenizer encodes the text of its chat template differently from "
                "apply_chat_template; give the directory a tokenizer.json that agrees with it"
            )

    def _messages(self, words: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self._system_prompt}] if self._system_prompt else []
        return [*system, {"role": "user", "content": words}]

    def _apply(self, messages: list[dict[str, str]], reply: bool = True) -> str:
        options = {"chat_template": self._template, "add_generation_prompt": reply, "tokenize": False}
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

    def _around(self) -> tuple[str, str]:
        """Returns the text on both sides of the user's words."""
        text = self._render(SENTINEL)
        if text.count(SENTINEL) != 1:
            raise InputError(
                "config.model.path: its chat template does not show the user's message once and unchanged; give the "
                "model a template that does"
            )
        before, _, after = text.partition(SENTINEL)
        return before, after

    def _begun_reply(self) -> str:
        """Returns the end of `after` that is there only where a reply is asked for, or all of `after`."""
        try:
            turn = self._apply(self._messages(SENTINEL), reply=False).rpartition(SENTINEL)[2]
        except Exception:  # Jinja runs whatever the template contains
            turn = ""
        return self.after.removeprefix(turn)

    def _prompt(self, words: str) -> str:
        """Returns the text of the prompt with these words of the user.

        Raises:
            InputError: the template changes them, or what surrounds them, by more than blanks at their ends.
        """
        text = self._render(words)
        if change := _change(text, self.before, words, self.after):
            raise InputError(
                f"config.model.path: its chat template changes what the user says or what surrounds it: {change}; "
                "leave that out of data.instruction, refine.instruction and the questions, or give the model a "
                "template that keeps it"
            )
        return text

    def ids(self, words: str) -> np.ndarray:
        return self._encode(self._prompt(words), self.after)

    def ids_before(self, start: str) -> np.ndarray:
        text, _, _ = self._prompt(start + SENTINEL).rpartition(SENTINEL)  # the last one: `start` may contain another
        alone, followed = self._encode(text, ""), self._encode(text + STAND_IN, "")[:-1]
        # Prefers the encoding with more text behind, unless the stand-in's token absorbed a space at the end of `text`.
        is_complete = np.array_equal(followed, alone) or self._text(followed) == self._text(alone)
        return followed if is_complete else alone

    def ids_after(self, end: str) -> np.ndarray:
        """Returns what `Frame` says.

        Raises:
            InputError: the tokenizer joins the text after a draft with the draft.
        """
        before, _, after = self._prompt(PROBE + SENTINEL + end).partition(SENTINEL)
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
        begin = max((match.end() for match in self._added.finditer(self.before)), default=0)
        first = self._added.search(after)
        stop = len(text) - len(after) + (first.start() if first else len(after))
        words = text_ids(self._tokenizer, text[begin:stop], self.marks)
        return np.concatenate([_ids(self._tokenizer, text[:begin]), words, _ids(self._tokenizer, text[stop:])])


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, marks: np.ndarray) -> np.ndarray:
    """Returns the ids of `text` on its own, [L] int32. Special tokens in it stay text, except for tags of an answer.

    Marks, which a tokenizer never splits, are left out.
    """
    tags = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tags = [content for content in tags if content in TAGS]
    # As for any added token, the text on each side of a tag is encoded independently.
    pieces = re.split(f"({'|'.join(tags)})", text) if tags else [text]
    ids = np.concatenate([_ids(tokenizer, piece, as_text=piece not in tags) for piece in pieces])
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


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns ids of the tokens that are no text: those the tokenizer calls special, even if transformers doesn't.

    The tags of an answer and byte tokens such as <0x0A> are text.
    """
    is_text = lambda content: content in TAGS or re.fullmatch(r"<0x[0-9A-F]{2}>", content)
    added = tokenizer.added_tokens_decoder
    texts = {id for id, token in added.items() if is_text(token.content)}
    return {*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)} - texts


def _change(text: str, before: str, words: str, after: str) -> str | None:
    """Returns how `text` differs from `words` between `before` and `after`, None if only by blanks at their ends."""
    middle = text[len(before) : len(text) - len(after)]
    if text == before + middle + after and middle.strip() == words.strip():
        return None
    if text.startswith(before) and text.endswith(after):
        wanted, found = words.strip(), middle.strip()
    else:
        wanted, found = before + words + after, text
    wanted, found = (text.replace(SENTINEL, "{draft}") for text in (wanted, found))
    is_same = [one == other for one, other in zip(wanted, found, strict=False)]
    first = is_same.index(False) if False in is_same else len(is_same)
    part = slice(max(first - 20, 0), first + 20)
    return f"{wanted[part]!r} becomes {found[part]!r}"


def _array(ids: set[int]) -> np.ndarray:
    return np.array(sorted(ids), np.int32)
