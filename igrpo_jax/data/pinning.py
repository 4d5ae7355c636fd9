"""Fixes the values of a chat template's variables for a run: the day, and data.template_kwargs.

They are written into the head of the template itself. So a run, its resumes, its evaluations and the model that it
exports have the same prompts on any day, with transformers and with every other program that reads the template.
"""

import datetime
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import jinja2.ext
import jinja2.meta
import jinja2.parser
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase

from igrpo_jax.config import DataConfig, TemplateValue
from igrpo_jax.errors import InputError, one_line
from igrpo_jax.schema.fields import refusal

# Variables that are not the user's to set: apply_chat_template gives them, or data.template_date does.
GIVEN = ("messages", "add_generation_prompt", "strftime_now")


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the text of the tokenizer's chat template, "" if it has none.

    Raises:
        InputError: it has several, and none of them is the default one.
    """
    if not tokenizer.chat_template:
        return ""
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(
            f"config.model.path: its tokenizer has several chat templates ({one_line(error)[:200]}); name one of them "
            "'default' in the directory"
        ) from error


def dated(data: DataConfig, tokenizer: PreTrainedTokenizerBase, recorded: str | None = None) -> DataConfig:
    """Returns `data` with the day in template_date, where the chat template asks for it.

    Args:
        recorded: the day that was recorded when the run or the evaluation began, "" if none was; None at its first
            launch, which takes today.

    Raises:
        InputError: a setting that the template does not use, or no day although this is not the first launch.
    """
    template = template_of(tokenizer)
    _check_names(template, data)
    asks = "strftime_now" in template and not _has_a_day(template)
    if data.template_date and not asks:
        fix = "the chat template of the model never asks for the date; leave it empty"
        if _has_a_day(template):
            fix = "the run that exported the model wrote its own day into the chat template; leave it empty"
        raise refusal("data.template_date", data.template_date, fix)
    if not asks or data.template_date:
        return data
    if recorded == "":
        fix = (
            "the chat template of the model writes the date, and that of the first launch was not recorded; give the "
            "day of that launch, such as 2026-01-31"
        )
        raise refusal("data.template_date", "", fix)
    return replace(data, template_date=recorded or datetime.date.today().isoformat())


def _check_names(template: str, data: DataConfig) -> None:
    """Raises InputError for a name in data.template_kwargs that is not a variable of the template."""
    names = _variables(template) if data.template_kwargs else set()
    for name, value in data.template_kwargs.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            fix = f"the nearest is {near[0]}" if near else "leave it out"
            message = f"the chat template of the model has no such variable to set; {fix}"
            raise refusal(f"data.template_kwargs.{name}", value, message)


def _variables(template: str) -> set[str]:
    """Returns the names that a template reads before it sets them itself, other than those that it is given.

    Of a template that transformers cannot read, which fails where a prompt is made, these are all words of its code.
    """
    try:
        parsed = jinja2.Environment(extensions=[jinja2.ext.loopcontrols, _Generation]).parse(template)
        first = {name.name: name.ctx for name in reversed([*_in_order(parsed)])}
        names = {name for name in jinja2.meta.find_undeclared_variables(parsed) if first[name] == "load"}
    except jinja2.TemplateError:
        code = " ".join(re.findall(r"\{[{%].*?[%}]\}", template, re.DOTALL))
        names = {*re.findall(r"[A-Za-z_]\w*", code)}
    return names - {*GIVEN, "raise_exception", *jinja2.defaults.DEFAULT_NAMESPACE}


class _Generation(jinja2.ext.Extension):
    """The block {% generation %} of transformers, which marks what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012  (of an instance, for mypy)

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        """Returns the statements in the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _in_order(node: nodes.Node) -> Iterator[nodes.Name]:
    """Yields the names below a node of a template in the order in which it comes to them."""
    if isinstance(node, nodes.Name):
        yield node
    children = [*node.iter_child_nodes()]
    if isinstance(node, nodes.Assign | nodes.AssignBlock):
        children.reverse()  # the value is computed before its name is set
    for child in children:
        yield from _in_order(child)


def pinned(template: str, kwargs: Mapping[str, TemplateValue], date: str) -> str:
    """Returns the chat template with these values of its variables, and with `date` (YYYY-MM-DD) for today.

    A caller of the template may still pass other values. Without variables and date the text is unchanged.
    """
    head = "".join(f"{{% set {name} = {name} | default({_literal(value)}) %}}\n" for name, value in kwargs.items())
    if date:
        midnight = datetime.datetime.fromisoformat(date)
        codes = sorted(set(re.findall(r"(?<!\{)%-?[aAbBcdeFGHIjmMpSuUVwWxXyYzZ]", template + str(dict(kwargs)))))
        replaced = "".join(f".replace({_literal(code)}, {_literal(midnight.strftime(code))})" for code in codes)
        # This macro hides the function of the same name that transformers passes to a template.
        head += f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"
    return head + template  # Jinja drops the line end after each statement of the head


def _has_a_day(template: str) -> bool:
    """Returns whether `pinned` has written a day into the template already, as into that of an exported model."""
    return "{% macro strftime_now(" in template


def _literal(value: TemplateValue) -> str:
    """Returns a value as Jinja writes it."""
    return json.dumps(value, ensure_ascii=False)
