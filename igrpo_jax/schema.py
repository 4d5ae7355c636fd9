"""Settings as frozen dataclasses: rules for the value of a field, and the way from a ConfigDict to checked dataclasses.

A field declares its type, and its rules beside it:

    seed: Annotated[int, AtLeast(0)] = 0
    max_draft_length: Annotated[int | None, AtLeast(1)] = None
    dtype: Annotated[str, Choice("bfloat16", "float32")] = "bfloat16"

A field is one of bool, int, float and str, a tuple of one of them, or any of these or None; or a mapping from names to
values of such types. Or it is another dataclass (a section), and then its own fields are named with a dot:
`model.lora.rank`. A field that may be None needs no rule for None. This module knows no setting: igrpo_jax/config.py
declares them, and its tree is called `config` in messages.
"""

import dataclasses
import datetime
import difflib
import functools
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from igrpo_jax.errors import InputError


class Rule(NamedTuple):
    """A condition on the value of one field."""

    text: str  # what the value must be, as it follows "must be": "at least 0"
    allows: Callable[[Any], bool]
    on_entries: bool = False  # whether the condition is one on each entry of a tuple
    secret: bool = False  # a value that breaks the rule may be a secret, and is not repeated


# Rules are written as types are, because they stand beside them. `text` replaces the one that follows from the bound.


def AtLeast(low: float, text: str = "", also: float | None = None) -> Rule:
    """Allows numbers from `low` on, and the number `also`. Refuses NaN, as every bound does."""
    return Rule(text or f"at least {low}", lambda value: value >= low or value == also)


def Above(low: float, text: str = "") -> Rule:
    """Allows numbers greater than `low`."""
    return Rule(text or f"above {low}", lambda value: value > low)


def AtMost(high: float) -> Rule:
    """Allows numbers up to `high`."""
    return Rule(f"at most {high}", lambda value: value <= high)


def Below(high: float, text: str = "") -> Rule:
    """Allows numbers less than `high`."""
    return Rule(text or f"below {high}", lambda value: value < high)


def Between(low: float, high: float) -> Rule:
    """Allows numbers from `low` up to `high`, both included."""
    return Rule(f"within {low} and {high}", lambda value: low <= value <= high)


def Choice(*allowed: Any) -> Rule:
    """Allows these values only."""
    return Rule("one of " + ", ".join(map(str, allowed)), lambda value: value in allowed)


def Each(rule: Rule, once: bool = False) -> Rule:
    """Allows tuples whose entries `rule` allows; with `once` no entry may come twice."""

    def allows(entries: tuple) -> bool:
        return all(map(rule.allows, entries)) and not (once and len(set(entries)) < len(entries))

    return Rule(rule.text + ", once" * once, allows, on_entries=True)


def HoldsOnce(part: str) -> Rule:
    """Allows texts in which `part` occurs exactly once."""
    return Rule(f"a text that holds {part} exactly once", lambda value: value.count(part) == 1)


def Matches(pattern: str, text: str, secret: bool = False) -> Rule:
    """Allows texts that match the regular expression from end to end."""
    return Rule(text, lambda value: re.fullmatch(pattern, value) is not None, secret=secret)


def IsDate() -> Rule:
    """Allows days, written as 2026-01-31, and the empty text."""

    def allows(value: str) -> bool:
        try:
            return not value or datetime.date.fromisoformat(value).isoformat() == value
        except ValueError:
            return False

    return Rule("a day such as 2026-01-31, or empty", allows)


class Setting(NamedTuple):
    """A field of a dataclass, as it is declared."""

    name: str
    hint: Any  # the type without its rules; a dataclass for a section
    rules: tuple[Rule, ...]
    default: Any

    @property
    def is_section(self) -> bool:
        """Whether the field is a dataclass with fields of its own."""
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
    def allowed(self) -> str:
        """What the rules allow, as it follows "must be": "at least 0 and below 1"; empty without rules."""
        text = " and ".join(rule.text for rule in self.rules)
        return f"{text}, or None" if text and self.is_optional and "None" not in text else text

    @property
    def subject(self) -> str:
        """What must be so: "each " entry of a tuple, or the value itself, which needs no name."""
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


def check_path(cls: type, path: str) -> None:
    """Checks that a dotted name is that of a field.

    Raises:
        InputError: there is no such field; the message gives the nearest name.
    """
    known = field_paths(cls)
    if path not in known:
        # A right last name in the wrong section ("learning_rate") is as common as a misspelling.
        same_last_name = [name for name in known if name.rpartition(".")[2] == path.rpartition(".")[2]]
        nearest = difflib.get_close_matches(path, same_last_name or known, n=1, cutoff=0.0)
        raise InputError(f"config.{path}: no such field; the nearest is config.{nearest[0]}")


def value_at(config: Any, path: str) -> Any:
    """Returns the value of the field with a dotted name."""
    return functools.reduce(getattr, path.split("."), config)


def refusal(path: str, value: Any, fix: str) -> InputError:
    """Returns the error that says in one line which field has which value, and what to do."""
    return InputError(f"config.{path} = {value!r}: {fix}")


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """Returns a dataclass as a ConfigDict, whose fields keep their types."""
    tree = ml_collections.ConfigDict()
    for setting in settings(type(config)):
        value = getattr(config, setting.name)
        if setting.is_section:
            value = to_config_dict(value)
        elif setting.value_type is dict:
            value = ml_collections.ConfigDict(value)
        elif value is None:
            value = config_dict.placeholder(setting.value_type)
        tree[setting.name] = value
    return tree


def from_config_dict(cls: type, tree: Any) -> Any:
    """Returns a ConfigDict as an object of the dataclass `cls`.

    Raises:
        InputError: a field is unknown or missing, has the wrong type, or a value that its rules refuse.
    """
    config = _read(cls, cls, tree, "")
    _check_rules(config, "")
    return config


def _read(root: type, cls: type, tree: Any, prefix: str) -> Any:
    declared = {setting.name: setting for setting in settings(cls)}
    for name in tree:
        if name not in declared:
            check_path(root, prefix + name)
    values = {}
    for name, setting in declared.items():
        path = prefix + name
        if name not in tree:
            raise InputError(f"config.{path}: missing; start the config file from igrpo_jax.config.default()")
        if setting.is_section:
            values[name] = _read(root, setting.hint, tree[name], f"{path}.")
        else:
            values[name] = _typed(setting, tree[name], path)
    return cls(**values)


def _typed(setting: Setting, value: Any, path: str) -> Any:
    """Returns the value in the type of its field: a whole number passes as a float, a list as a tuple."""
    if setting.value_type is dict:
        return _mapping(setting, value, path)
    if value is None and setting.is_optional:
        return None
    wanted = setting.value_type
    if wanted is float and type(value) is int:
        value = float(value)
    if wanted is tuple and isinstance(value, (list, tuple)):
        value = tuple(value)
        entry_type = typing.get_args(setting.hint)[0]
        if not all(type(entry) is entry_type for entry in value):
            raise refusal(path, value, f"each entry must be of type {entry_type.__name__}")
    if type(value) is not wanted:
        raise refusal(path, value, f"must be of type {wanted.__name__}, not {type(value).__name__}")
    return value


def _mapping(setting: Setting, value: Any, path: str) -> dict[str, Any]:
    """Returns the value of a field that maps names to values."""
    types_of_values = typing.get_args(typing.get_args(setting.hint)[1])
    if not isinstance(value, (dict, ml_collections.ConfigDict)):
        raise refusal(path, value, f"must be a mapping from names to values, not {type(value).__name__}")
    mapping = dict(value.items())
    for name, entry in mapping.items():
        if not (isinstance(name, str) and name.isidentifier()):
            raise refusal(path, mapping, f"{name!r} is no name of a variable")
        if type(entry) not in types_of_values:
            allowed = ", ".join(kind.__name__ for kind in types_of_values)
            raise refusal(f"{path}.{name}", entry, f"must be one of {allowed}, not {type(entry).__name__}")
    return mapping


def _check_rules(config: Any, prefix: str) -> None:
    for setting in settings(type(config)):
        path = prefix + setting.name
        value = getattr(config, setting.name)
        if setting.is_section:
            _check_rules(value, f"{path}.")
        elif value is not None:
            broken = [rule for rule in setting.rules if not rule.allows(value)]
            fix = f"{setting.subject}must be {setting.allowed}"
            if any(rule.secret for rule in broken):
                raise InputError(f"config.{path}: {fix}")
            if broken:
                raise refusal(path, value, fix)
