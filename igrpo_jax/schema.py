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

import contextlib
import dataclasses
import datetime
import difflib
import functools
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_collections

from igrpo_jax.errors import InputError


class FieldError(InputError):
    """A setting is wrong. `path` is the dotted name of its field."""

    def __init__(self, path: str, message: str):
        super().__init__(message)
        self.path = path


class UnknownField(FieldError, AttributeError):
    """A field is read that does not exist."""


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
        nearest = difflib.get_close_matches(path, paths_named(cls, path) or known, n=1, cutoff=0.0)
        raise UnknownField(path, f"config.{path}: no such field; the nearest is config.{nearest[0]}")


def paths_named(cls: type, name: str) -> list[str]:
    """Returns the dotted names of the fields that have the last name of `name`."""
    return [path for path in field_paths(cls) if path.rpartition(".")[2] == name.rpartition(".")[2]]


def setting_at(cls: type, path: str) -> Setting:
    """Returns the declaration of the field with a dotted name, which `check_path` accepts."""
    section, _, rest = path.partition(".")
    setting = next(setting for setting in settings(cls) if setting.name == section)
    return setting_at(setting.hint, rest) if rest else setting


def value_at(config: Any, path: str) -> Any:
    """Returns the value of the field with a dotted name."""
    return functools.reduce(getattr, path.split("."), config)


def refusal(path: str, value: Any, fix: str) -> FieldError:
    """Returns the error that says in one line which field has which value, and what to do."""
    return FieldError(path, f"config.{path} = {value!r}: {fix}")


class Place(NamedTuple):
    """The line in which a field of a Tree was set."""

    file: str
    line: int


class Tree(ml_collections.ConfigDict):
    """A ConfigDict of settings that knows where each was set.

    It takes values of every type, because `from_config_dict` refuses the wrong ones with a better message.
    """

    def __init__(self, initial_dictionary: Any = None, type_safe: bool = False, **options: Any):
        object.__setattr__(self, "_places", {})
        object.__setattr__(self, "_declared", None)
        super().__init__(initial_dictionary, type_safe=type_safe, **options)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        frame, module = sys._getframe(1), ""
        while frame:
            module = frame.f_globals.get("__name__", "")
            if module not in (__name__, "copy") and not module.startswith("ml_collections."):
                break
            frame = frame.f_back
        if frame is None or module.startswith("igrpo_jax."):
            self._places.pop(name, None)  # a default, or a value that no file gave
        else:
            self._places[name] = Place(frame.f_code.co_filename, frame.f_lineno)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not name.startswith("_") and self._declared:
                root, prefix = self._declared
                check_path(root, prefix + name)
            raise

    def place(self, path: str) -> Place | None:
        """Returns where the field with a dotted name was set, None where it has its default."""
        section, _, rest = path.partition(".")
        inner = self._fields.get(section)
        return (inner.place(rest) if rest and isinstance(inner, Tree) else None) or self._places.get(section)


def to_config_dict(config: Any, root: type | None = None, prefix: str = "") -> Tree:
    """Returns a dataclass as a ConfigDict.

    Args:
        root: the class of the whole configuration, of which `config` is the section `prefix`; None where it is all.
    """
    tree, root = Tree(), root or type(config)
    object.__setattr__(tree, "_declared", (root, prefix))
    for setting in settings(type(config)):
        value = getattr(config, setting.name)
        if setting.is_section:
            value = to_config_dict(value, root, f"{prefix}{setting.name}.")
        elif setting.value_type is dict:
            value = ml_collections.ConfigDict(value)
        tree[setting.name] = value
    tree._places.clear()
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
            raise FieldError(path, f"config.{path}: missing; start the config file from igrpo_jax.config.default()")
        if setting.is_section:
            if not isinstance(tree[name], (dict, ml_collections.ConfigDict)):
                raise refusal(path, tree[name], "is a group of settings; set its fields one by one")
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
        if not all(type(entry) is setting.entry_type for entry in value):
            raise refusal(path, value, f"each entry must be {KINDS[setting.entry_type]}")
    if type(value) is not wanted:
        raise refusal(path, value, f"must be {setting.kind}{_rewritten(setting, value)}")
    return value


def _rewritten(setting: Setting, value: Any) -> str:
    """Returns how a value of the wrong type is probably meant, as the end of an error; empty where that is unclear."""
    wanted = setting.value_type
    if wanted is tuple and type(value) is setting.entry_type:
        return f"; write {(value,)!r}"
    if wanted is int and type(value) is float and value.is_integer():
        return f"; write {int(value)}"
    if wanted in (int, float) and type(value) is str:
        with contextlib.suppress(ValueError):
            wanted(value)
            return f"; write {value.strip()} without quotation marks"
    return ""


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
                raise FieldError(path, f"config.{path}: {fix}")
            if broken:
                raise refusal(path, value, fix)
