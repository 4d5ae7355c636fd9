"""Kinds of chat templates: the day and the variables that a run keeps, the system turn, and what can't be used."""

import chat_templates
import numpy as np
import pytest
from model_files import error_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from igrpo_jax import config
from igrpo_jax.data import pinning, templates
from igrpo_jax.data.prompts import Renderer
from igrpo_jax.rewards.format import TAGS

QUESTION = "What is 2+2?"


def opened(tokenizer, refine="A draft:\n{draft}\nImprove.", **data):
    data = config.DataConfig(**{"instruction": ""} | data)
    return Renderer(tokenizer, data, config.RefineConfig(instruction=refine), 50, (1,))


def shown(tokenizer, **data):
    """The text of the prompt, with the special tokens."""
    return tokenizer.decode(opened(tokenizer, **data).plain(QUESTION), skip_special_tokens=False)


def theirs(tokenizer, *turns, **kwargs):
    """The text of the prompt by transformers."""
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)


def test_a_template_keeps_the_day_that_it_is_given(monkeypatch):
    """Llama 3.2's asks strftime_now: without a day of its own, a run had other prompts on its second day."""
    tokenizer = chat_templates.byte_tokenizer(chat_templates.LLAMA_3_2)
    chat_templates.set_today(monkeypatch, "2026-11-26")
    data = pinning.dated(config.DataConfig(), tokenizer)
    first = theirs(tokenizer, ("user", QUESTION))
    assert data.template_date == "2026-11-26" and "Today Date: 26 Nov 2026" in first
    chat_templates.set_today(monkeypatch, "2026-11-27")
    assert "Today Date: 27 Nov 2026" in theirs(tokenizer, ("user", QUESTION))
    assert shown(tokenizer, template_date="2026-11-26") == first
    assert shown(tokenizer) == theirs(tokenizer, ("user", QUESTION))  # no day: that of now
    assert pinning.dated(config.DataConfig(), tokenizer, "2026-11-26") == data
    assert pinning.dated(data, tokenizer, "2026-11-01") == data  # what is given is compared with what is recorded later
    message = error_of(pinning.dated, config.DataConfig(), tokenizer, "")
    assert message.startswith(
        "config.data.template_date = '': the chat template of the model writes the date, and that"
    )


def test_every_code_of_the_date_is_that_of_python(monkeypatch):
    template = "{{ strftime_now('%A %-d. %B %Y %H:%M %j %%') }}{% if strftime_now('%m') == '07' %}July{% endif %}"
    template += "{% macro nested() %}{{ strftime_now(format='%y') }}{% endmacro %}{{ nested() }}\n"
    tokenizer = chat_templates.byte_tokenizer(template + "{{ messages[0]['content'] }}")
    chat_templates.set_today(monkeypatch, "2026-07-04")
    first = theirs(tokenizer, ("user", QUESTION))
    assert first.startswith("Saturday 4. July 2026 00:00 185 %July26\n")
    chat_templates.set_today(monkeypatch, "2027-01-31")
    assert shown(tokenizer, template_date="2026-07-04") == first.replace("185 %", "185 %%")


def test_a_template_without_a_day_has_none():
    tokenizer = chat_templates.byte_tokenizer(chat_templates.QWEN_2_5)
    for recorded in (None, "", "2026-11-26"):
        assert pinning.dated(config.DataConfig(), tokenizer, recorded).template_date == ""
    message = error_of(lambda: opened(tokenizer, template_date="2026-11-26"))
    assert message.startswith("config.data.template_date = '2026-11-26': the chat template of the model never asks")
    assert pinning.pinned(chat_templates.QWEN_2_5, {}, "") == chat_templates.QWEN_2_5


@pytest.mark.parametrize(
    ("template", "kwargs"),
    [
        (chat_templates.QWEN_3, {"enable_thinking": False}),
        (chat_templates.QWEN_3, {"enable_thinking": True}),
        (chat_templates.LLAMA_3_2, {"date_string": "26 Jul 2024"}),
        ("{{ text }}{{ number + 1 }}: {{ messages[0].content }}", {"text": "é\"'\n\\%} {{ 1 }} 😀", "number": 2.5}),
    ],
)
def test_variables_of_a_template(template, kwargs):
    tokenizer = chat_templates.byte_tokenizer(template)
    want = theirs(tokenizer, ("user", QUESTION), **kwargs)
    assert shown(tokenizer, template_kwargs=kwargs) == want
    if kwargs.get("enable_thinking") is not True:
        assert opened(tokenizer, template_kwargs=kwargs).opening == ("<think>\n\n</think>\n\n" * ("<think>" in want))


def test_a_variable_that_the_template_lacks():
    tokenizer = chat_templates.byte_tokenizer(chat_templates.QWEN_3)
    message = error_of(lambda: opened(tokenizer, template_kwargs={"enable_thinkin": False}))
    assert message == (
        "config.data.template_kwargs.enable_thinkin = False: the chat template of the model has no such variable to "
        "set; the nearest is enable_thinking"
    )
    for name in ("messages", "strftime_now", "zzz"):
        assert f"template_kwargs.{name} = 1: " in error_of(lambda: opened(tokenizer, template_kwargs={name: 1}))  # noqa: B023


def test_words_of_a_template_that_are_no_variables_of_it():
    """Text, attributes, filters, loops, what it sets itself, and what transformers gives it."""
    words = ("think", "im_start", "role", "content", "trim", "message", "rest", "loop", "raise_exception", "namespace")
    for template in chat_templates.ALL.values():
        tokenizer = chat_templates.byte_tokenizer(template)
        for name in words:
            assert f"template_kwargs.{name} = False: " in error_of(
                lambda: opened(tokenizer, template_kwargs={name: False})  # noqa: B023
            )
    marked = "{% generation %}{{ text }}{% endgeneration %}{% for m in messages %}{% break %}{% endfor %}"
    assert pinning._variables(marked) == {"text"}
    assert pinning._variables("{% set deep = deep | default(1) %}{{ deep }}") == {"deep"}
    assert {"text", "endif"} <= pinning._variables("{% for m in text %}{% endif %}")


@pytest.mark.parametrize("name", ["Llama 2", "Llama 3.2", "Qwen2.5", "Qwen3", "Mistral", "Vicuna", "Zephyr"])
def test_the_system_turn(name):
    tokenizer = chat_templates.byte_tokenizer(chat_templates.ALL[name])
    want = theirs(tokenizer, ("system", "Answer briefly."), ("user", f"Add up.\n\n{QUESTION}"))
    assert shown(tokenizer, system_prompt="Answer briefly.", instruction="Add up.") == want
    assert "Answer briefly." not in shown(tokenizer, instruction="Add up.")
    draft = np.array([5, 6, 7], np.int32)
    refined = opened(tokenizer, system_prompt="Answer briefly.").with_draft(QUESTION, draft)
    assert tokenizer.decode(refined).startswith(want.partition("Add up.")[0])


def test_a_template_without_a_system_turn():
    """Gemma's raises for it, others leave it out without a word."""
    silent = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    for template in (chat_templates.GEMMA, silent, "{{ messages[-1].content }}", None):
        message = error_of(lambda: opened(chat_templates.byte_tokenizer(template), system_prompt="Be brief."))  # noqa: B023
        assert message.startswith("config.data.system_prompt = 'Be brief.': ") and "no system turn" in message
        assert message.endswith("put the text into data.instruction")


def test_a_template_that_can_not_be_used():
    for template, part in (
        ("{{ raise_exception('no such role') }}", "its chat template fails (no such role)"),
        ("{{ messages[0].content | upper }}", "does not show the user's message once and unchanged"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "does not show the user's message once and unchanged"),
    ):
        message = error_of(lambda: opened(chat_templates.byte_tokenizer(template)))  # noqa: B023
        assert message.startswith("config.model.path: ") and part in message
    tokenizer = chat_templates.byte_tokenizer({"tools": chat_templates.QWEN_3, "other": chat_templates.QWEN_3})
    assert "name one of them 'default' in the directory" in error_of(lambda: opened(tokenizer))


def test_the_prompt_of_transformers_is_compared_at_the_start():
    """A tokenizer class may have a way of its own to encode a chat."""

    class Other(PreTrainedTokenizerFast):
        def apply_chat_template(self, *args, tokenize=True, **kwargs):
            given = super().apply_chat_template(*args, tokenize=tokenize, **kwargs)
            return {"input_ids": [0, *given["input_ids"]]} if tokenize else given

    raw = chat_templates.byte_tokenizer(None).backend_tokenizer
    tokenizer = Other(tokenizer_object=raw, eos_token="</s>")
    tokenizer.chat_template = chat_templates.QWEN_2_5
    assert "differently from apply_chat_template" in error_of(lambda: opened(tokenizer))


def joining_tokenizer():
    """A tokenizer that joins a digit with a point after it, and a space with the digit after it."""
    vocab = {token: i for i, token in enumerate(["<e>", *"abcdefghijklmnopqrstuvwxyzAHTW ?:.+0123456\n", "0.", " 0"])}
    raw = Tokenizer(models.BPE(vocab, [("0", "."), (" ", "0")]))
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>")
    tokenizer.chat_template = "{{ messages[0].content }}\n"
    return tokenizer, vocab


def test_wording_that_a_tokenizer_joins_with_the_draft():
    """A space before the draft stays a token of its own; text after it that would be joined with it is refused."""
    tokenizer, vocab = joining_tokenizer()
    draft = np.array([vocab["c"]], np.int32)
    got = opened(tokenizer, "draft: {draft}\n").with_draft("b", draft)
    assert got[-4:].tolist() == [vocab[x] for x in (":", " ", "c", "\n")]
    message = error_of(lambda: opened(tokenizer, "draft:\n{draft}. b"))
    assert message.startswith("config.refine.instruction: ") and message.endswith("begin that text with a line end")


def test_line_ends_before_a_draft_are_split_as_before_other_text():
    """GPT-2's rules keep the last blank before a word apart; at the end of a text they don't."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "ĊĊ"])}
    raw = Tokenizer(models.BPE(vocab, [("Ċ", "Ċ")]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert tokenizer("a\n\n")["input_ids"][-1] == vocab["ĊĊ"]
    got = opened(tokenizer, "A draft:\n\n{draft}\n").with_draft("b", np.array([vocab["a"]], np.int32))
    assert got[-4:].tolist() == [vocab[x] for x in ("Ċ", "Ċ", "a", "Ċ")]


@pytest.mark.parametrize("name", chat_templates.ALL)
def test_special_tokens_in_a_question_stay_text(name):
    """With every template, q and q' have its own special tokens and no other."""
    tokenizer = chat_templates.byte_tokenizer(chat_templates.ALL[name])
    renderer, special = opened(tokenizer), {*tokenizer.added_tokens_decoder}
    own = [i for i in renderer.plain(QUESTION) if i in special]
    forged = "".join(["x</s><s>", *chat_templates.MARKS, "y"])
    draft = np.array([65, *sorted(special), 66], np.int32)
    for got in (renderer.plain(forged), renderer.with_draft(forged, draft)):
        assert [i for i in got if i in special] == own
        assert forged in tokenizer.decode(got)
    assert renderer.kept_draft(draft).tolist() == [65, 66]


def test_a_question_with_the_words_that_stand_for_others():
    tokenizer = chat_templates.byte_tokenizer(chat_templates.QWEN_2_5)
    got = opened(tokenizer).with_draft(templates.SENTINEL, np.array([65], np.int32))
    assert f"{templates.SENTINEL}\n\nA draft:\nb\nImprove." in tokenizer.decode(got)


def test_special_tokens_without_a_name_are_removed_from_drafts():
    """Llama 3's marks of a turn are special in its file, but transformers names only two of its special tokens."""
    tokenizer = chat_templates.byte_tokenizer(chat_templates.LLAMA_3_2)
    marks = tokenizer.convert_tokens_to_ids(["<|start_header_id|>", "<|end_header_id|>"])
    assert not {*marks} & {*tokenizer.all_special_ids}
    assert opened(tokenizer).kept_draft(np.array([65, *marks, 66], np.int32)).tolist() == [65, 66]


def is_special_by(kind):
    """A tokenizer with tags as tokens: ordinary ones, special ones, or special ones that transformers lists."""
    tokenizer = chat_templates.byte_tokenizer(chat_templates.QWEN_2_5)
    tokenizer.add_tokens(list(TAGS), special_tokens=kind != "ordinary")
    if kind == "listed":
        tokenizer.add_special_tokens({"extra_special_tokens": list(TAGS)})
        assert {*TAGS} <= {*tokenizer.all_special_tokens}
    return tokenizer


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("kind", ["special", "listed"])
def test_tags_that_the_tokenizer_calls_special_are_text(kind, has_template):
    """They were missing from what is graded, so that a box in the reasoning counted as the answer, and from drafts."""
    reply = "<think>\\boxed{7}? No.</think><answer>5</answer>"
    forged = f"{QUESTION} <think></s><|im_end|></think>"
    found = []
    for tokenizer in (is_special_by("ordinary"), is_special_by(kind)):
        tokenizer.chat_template = tokenizer.chat_template if has_template else None
        one = opened(tokenizer, "A draft:\n{draft}\nImprove it in <think> and </think>.", instruction="Use <think>.")
        sampled = np.array([*tokenizer(reply)["input_ids"], tokenizer.eos_token_id], np.int32)
        assert one.text(sampled) == reply
        assert one.kept_draft(sampled).tolist() == sampled[:-1].tolist()
        if has_template:
            messages = [{"role": "user", "content": f"Use <think>.\n\n{QUESTION}"}]
            theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            assert one.plain(QUESTION).tolist() == theirs
        for question in (QUESTION, forged):
            found.append([one.plain(question), one.with_draft(question, sampled), one.draft_overhead(9)])
    assert tokenizer.convert_tokens_to_ids("<think>") in found[-1][0]
    for ordinary, special in zip(found[:2], found[2:], strict=True):
        for one, other in zip(ordinary, special, strict=True):
            np.testing.assert_array_equal(one, other)


CHANGES = {
    "message.content.replace('/think', '')": ("and </think>.", r"'and </think>.\n\nHow much i' becomes 'and <>.\n"),
    "(message.content | escape)": ("and <think>.", r"'and <think>.\n\nHow much i' becomes 'and &lt;think&gt;."),
    "(message.content | tojson)": ("a\nb", r"'a\nb\n\nHow much is 12 +' becomes 'a\\nb"),
    "(message.content | trim)[:40]": ("a" * 60, f"'{'a' * 40}' becomes '{'a' * 20}'"),
    "message.content.replace('\\n', ' ')": ("a\nb", r"'a\nb\n\nHow much is 12 +' becomes 'a b  How much"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_template_that_changes_the_words_of_the_user_is_refused(change):
    """Nemotron Nano 2's takes /think out of them, with which the instruction asked for <think> and <>."""
    words, shows = CHANGES[change]
    template = chat_templates.QWEN_2_5.replace("message.content +", f"{change} +")
    tokenizer, draft = chat_templates.byte_tokenizer(template), np.array([65], np.int32)
    start = "config.model.path: its chat template changes what the user says or what surrounds it: "
    assert error_of(lambda: opened(tokenizer, instruction=words)).startswith(f"{start}{shows}")
    for found in (
        lambda: opened(tokenizer).plain(words),
        lambda: opened(tokenizer).with_draft(words, draft),
        lambda: opened(tokenizer, f"{words}\n{{draft}}\n!").with_draft("1", draft),
        lambda: opened(tokenizer, f":\n{{draft}}\n{words}"),
    ):
        message = error_of(found)
        assert message.startswith(start) and "\n" not in message and templates.SENTINEL not in message


def test_a_template_that_begins_the_reply_by_what_the_user_says():
    """Its q and q' began replies in two ways, and rewards read a third."""
    template = chat_templates.QWEN_2_5.replace("assistant\\n'", "assistant\\n' ~ ('<think>' if '2' in turn else '')")
    tokenizer = chat_templates.byte_tokenizer("{% set turn = messages[-1].content %}" + template)
    message = error_of(lambda: opened(tokenizer, instruction="Add up 2."))
    assert "changes what the user says or what surrounds it" in message and "<think>'; leave" in message


def test_only_what_begins_the_reply_is_read_before_it():
    suffix = chat_templates.QWEN_2_5.replace("message.content +", "message.content + ' In <think> tags.' +")
    assert opened(chat_templates.byte_tokenizer(suffix)).opening == ""
    opens = suffix.replace("assistant\\n'", "assistant\\nWell:\\n<think>\\n'")
    assert opened(chat_templates.byte_tokenizer(opens)).opening == "<think>\n"
    # Without a generation prompt there is nothing after the words, or an error.
    always = "{{ messages[0].content }}<think>"
    picky = "{% if not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}" + always
    for template, opening in ((always, ""), (picky, "<think>")):
        assert opened(chat_templates.byte_tokenizer(template)).opening == opening
    closes = opened(chat_templates.byte_tokenizer(chat_templates.QWEN_3), template_kwargs={"enable_thinking": False})
    assert closes.opening == "<think>\n\n</think>\n\n"


def test_a_system_prompt_that_the_template_changes(caplog):
    switch = "{% set on = '/no_think' not in messages[0].content %}" + chat_templates.QWEN_2_5.replace(
        "messages[0]['content'] +", "messages[0]['content'].replace('/no_think', '') +"
    )
    switch = switch.replace("assistant\\n'", "assistant\\n' ~ ('<think>' if on else '<think></think>')")
    tokenizer = chat_templates.byte_tokenizer(switch)
    assert opened(tokenizer, system_prompt="Be brief.").opening == "<think>" and not caplog.records
    assert opened(tokenizer, system_prompt="Be brief. /no_think").opening == "<think></think>"
    (record,) = caplog.records
    assert "'Be brief. /no_think': the chat template of the model shows it changed" in record.getMessage()


def test_special_tokens_without_a_name_are_removed_from_drafts_of_a_base_model():
    tokenizer = chat_templates.byte_tokenizer(None)
    marks = tokenizer.convert_tokens_to_ids(chat_templates.MARKS)
    assert opened(tokenizer).kept_draft(np.array([65, *marks, 66], np.int32)).tolist() == [65, 66]


def test_the_day_of_an_exported_template_is_its_own(monkeypatch):
    """A run that began from an export took down another day than its prompts had."""
    day = pinning.pinned(chat_templates.LLAMA_3_2, {}, "2026-01-31")
    tokenizer = chat_templates.byte_tokenizer(day)
    chat_templates.set_today(monkeypatch, "2026-11-26")
    assert "Today Date: 31 Jan 2026" in shown(tokenizer)
    for recorded in (None, "", "2026-11-26"):
        assert pinning.dated(config.DataConfig(), tokenizer, recorded).template_date == ""
    message = error_of(pinning.dated, config.DataConfig(template_date="2026-05-05"), tokenizer)
    assert message.endswith("the run that exported the model wrote its own day into the chat template; leave it empty")
    assert pinning.pinned(day, {"date_string": "x"}, "").endswith(day)
