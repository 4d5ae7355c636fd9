"""The fields of a dataclass as they are declared, their dotted names, and the errors that name them."""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from igrpo_jax.errors import InputError, one_line, shown
from igrpo_jax.schema.rules import Rule


class FieldError(InputError):
    """A setting is wrong. `path` is the dotted name of its field."""

    def __init__(self, path: str, message: str):
        super().__init__(message)
        self.path = path


class UnknownField(FieldError, AttributeError):
    """A field is read or set that does not exist."""


# What values of a type are called in errors.
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}


class Setting(NamedTuple):
    """A field of a dataclass, as it is declared."""

    name: str
    hint: Any  # the type without its rules; a dataclass for a section
    rules: tuple[Rule, ...]
    default: Any

    @property
    def is_section(self) -> bool:
        """Whether the field is a dataclass with its own fields."""
        return dataclasses.is_dataclass(self.hint)

    @property
    def is_optional(self) -> bool:
        """Whether the field may be None."""
        return isinstance(self.hint, types.UnionType)

    @property
    def value_type(self) -> type:
        """The type of a value that is not None: float for `float | None`, tuple for `tuple[str, ...]`."""
        hint = self.hint
        if self.is_optional:
            hint = next(member for member in typing.get_args(hint) if member is not types.NoneType)
        return typing.get_origin(hint) or hint

    @property
    def entry_type(self) -> type:
        """The type of the entries of a tuple."""
        return typing.get_args(self.hint)[0]

    @property
    def kind(self) -> str:
        """What a value of the right type is called, as it follows "must be"."""
        kind = f"a tuple, each entry {KINDS[self.entry_type]}" if self.value_type is tuple else KINDS[self.value_type]
        return f"{kind} or None" if self.is_optional else kind

    @property
    def allowed(self) -> str:
        """What the rules allow, as it follows "must be": "at least 0 and below 1"; empty without rules."""
        text = " and ".join(rule.text for rule in self.rules if rule.text)
        return f"{text}, or None" if text and self.is_optional and "None" not in text else text

    @property
    def subject(self) -> str:
        """The subject of "must be": "each " for the entries of a tuple, empty for the value itself."""
        return "each " if any(rule.on_entries for rule in self.rules) else ""


def settings(cls: type) -> Iterator[Setting]:
    """Yields the fields of a dataclass in their order."""
    hints = typing.get_type_hints(cls)
    with_rules = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        rules = getattr(with_rules[field.name], "__metadata__", ())
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield Setting(field.name, hints[field.name], rules, default)


def field_paths(cls: type, prefix: str = "") -> list[str]:
    """Returns the dotted names of all fields, those of sections included."""
    paths = []
    for setting in settings(cls):
        paths.append(prefix + setting.name)
        if setting.is_section:
            paths += field_paths(setting.hint, f"{prefix}{setting.name}.")
    return paths


def leaf_paths(cls: type) -> list[str]:
    """Returns the dotted names of all fields that are no sections."""
    paths = field_paths(cls)
    sections = {path.rpartition(".")[0] for path in paths}
    return [path for path in paths if path not in sections]


def check_path(cls: type, path: str) -> None:
    """Checks that a dotted name is that of a field.

    Raises:
        InputError: there is no such field; the message gives the field that was probably meant.
    """
    if path not in field_paths(cls):
        meant = _meant(cls, path)
        fix = f"it is given as {meant}" if meant.startswith("--") else f"the nearest is config.{meant}"
        raise UnknownField(path, f"config.{path}: no such field; {fix}")


def _meant(cls: type, path: str) -> str:
    """Returns the field, or the flag, that a dotted name of none probably means."""
    group, _, name = path.rpartition(".")
    if known := paths_named(cls, path):
        # A right last name in the wrong group is as common as a misspelling.
        in_group = [other for other in known if other.rpartition(".")[0] == group]
        is_known_elsewhere = name in getattr(cls, "ALIASES", {})
        return (in_group or (known if is_known_elsewhere else difflib.get_close_matches(path, known, 1, 0.0)))[0]
    paths = field_paths(cls)
    beside = {other.rpartition(".")[2]: other for other in paths if other.rpartition(".")[0] == group}
    single = {other.rpartition(".")[2]: other for other in leaf_paths(cls)}
    for names, cutoff in ((beside, 0.6), (single, 0.7)):
        if near := difflib.get_close_matches(name, names, 1, cutoff):
            return names[near[0]]
    return difflib.get_close_matches(path, single.values(), 1, 0.0)[0]


def paths_named(cls: type, name: str) -> list[str]:
    """Returns the fields whose last part is that of a dotted name, or for which it is an alias (`cls.ALIASES`)."""
    last = name.rpartition(".")[2]
    if aliases := getattr(cls, "ALIASES", {}).get(last):
        return list(aliases)
    return [path for path in field_paths(cls) if path.rpartition(".")[2] == last]


def setting_at(cls: type, path: str) -> Setting:
    """Returns the declaration of the field with a dotted name, which `check_path` accepts."""
    section, _, rest = path.partition(".")
    setting = next(setting for setting in settings(cls) if setting.name == section)
    return setting_at(setting.hint, rest) if rest else setting


def value_at(config: Any, path: str) -> Any:
    """Returns the value of the field with a dotted name."""
    return functools.reduce(getattr, path.split("."), config)


def refusal(path: str, value: Any, fix: str) -> FieldError:
    """Returns the error that says in one line which field has which value, and what to do.

    Of a table or another large object only the beginning is shown.
    """
    text = one_line(repr(value))
    if not isinstance(value, str) and len(text) > 80:
        text = f"{shown(value)}..."
    return FieldError(path, f"config.{path} = {text}: {fix}")
