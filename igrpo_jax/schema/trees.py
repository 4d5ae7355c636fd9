"""Converts a configuration to a ConfigDict that knows where each field was set, and back to checked dataclasses."""

import contextlib
import math
import os
import sys
import typing
from typing import Any, NamedTuple

import ml_collections

from igrpo_jax.schema.fields import KINDS, FieldError, Setting, check_path, refusal, settings


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
        """Returns where the field with a dotted name was set, None if it has its default."""
        section, _, rest = path.partition(".")
        inner = self._fields.get(section)
        return (inner.place(rest) if rest and isinstance(inner, Tree) else None) or self._places.get(section)


def to_config_dict(config: Any, root: type | None = None, prefix: str = "") -> Tree:
    """Returns a dataclass as a ConfigDict.

    Args:
        root: the class of the whole configuration, of which `config` is the section `prefix`; None if it is the whole.
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
    """Returns the value in the type of its field: a whole number as a float, a list as a tuple, a path as a text."""
    if setting.value_type is dict:
        return _mapping(setting, value, path)
    value = _of_python(value)
    if value is None and setting.is_optional:
        return None
    wanted = setting.value_type
    value = _number(wanted, value)
    if wanted is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if wanted is tuple and isinstance(value, (list, tuple)):
        value = tuple(_number(setting.entry_type, _of_python(entry)) for entry in value)
        if not all(type(entry) is setting.entry_type for entry in value):
            raise refusal(path, value, f"each entry must be {KINDS[setting.entry_type]}{_otherwise(setting)}")
    if type(value) is not wanted:
        raise refusal(path, value, f"must be {setting.kind}{_rewritten(setting, value)}")
    return value


def _of_python(value: Any) -> Any:
    """Returns a scalar of numpy as the number, text or truth value that it holds, and any other value as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def _number(wanted: type, value: Any) -> Any:
    """Returns a whole number as a float where one is wanted, and any other value as it is."""
    return float(value) if wanted is float and type(value) is int else value


def _rewritten(setting: Setting, value: Any) -> str:
    """Returns how a value of the wrong type is probably meant, as the end of an error; empty if that is unclear."""
    wanted = setting.value_type
    if wanted is tuple and type(value) is setting.entry_type:
        return f"; write {(value,)!r}"
    if wanted is int and type(value) is float and value.is_integer():
        return f"; write {int(value)}"
    if wanted in (int, float) and type(value) is str:
        with contextlib.suppress(ValueError):
            wanted(value)
            return f"; write {value.strip()} without quotation marks"
    return _otherwise(setting) if type(value) not in (bool, int, float, str, type(None)) else ""


def _otherwise(setting: Setting) -> str:
    """Returns what to do with an object that the field does not take, as the end of an error."""
    return "".join(f"; {rule.otherwise}" for rule in setting.rules if rule.otherwise)


def _mapping(setting: Setting, value: Any, path: str) -> dict[str, Any]:
    """Returns the value of a field that maps names to values."""
    types_of_values = typing.get_args(typing.get_args(setting.hint)[1])
    if not isinstance(value, (dict, ml_collections.ConfigDict)):
        raise refusal(path, value, f"must be a mapping from names to values, not {type(value).__name__}")
    mapping = {name: _of_python(entry) for name, entry in value.items()}
    for name, entry in mapping.items():
        if not (isinstance(name, str) and name.isidentifier()):
            raise refusal(path, mapping, f"{name!r} is not the name of a variable")
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
                raise refusal(path, value, fix + broken[0].which(value))
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise refusal(path, value, f"{'each ' * isinstance(value, tuple)}must be a finite number")
