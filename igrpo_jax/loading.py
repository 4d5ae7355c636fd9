"""Where the configuration of a command comes from: a file, the run that a model belongs to, and single settings.

A config file is a Python file whose `get_config()` returns `igrpo_jax.config.default()` with its own values. An error
in it is one line with the file, the line, the field, its value and what to give instead.
"""

import ast
import copy
import difflib
import importlib.machinery
import importlib.util
import json
import linecache
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_collections

from igrpo_jax.config import Config, check_field, default, freeze, to_dict
from igrpo_jax.errors import InputError, one_line, shown
from igrpo_jax.schema.fields import KINDS, FieldError, Setting, refusal, setting_at, settings
from igrpo_jax.schema.trees import Tree
from igrpo_jax.storage.addresses import path_of
from igrpo_jax.storage.reading import read_bytes


def load_config(
    source: str | Path | ml_collections.ConfigDict | Config | None = None,
    overrides: Mapping[str, Any] | None = None,
    model: str | Path = "",
) -> Config:
    """Returns the checked configuration of a config file, with `overrides`.

    Args:
        source: the path of a config file, `igrpo_jax.config.default()` with its own values, or what this function
            returned before. Without it the configuration is that of the run in `model`, or the default one.
        overrides: values by the dotted names of their fields, such as {"algorithm.num_drafts": 4}.
        model: what is to be evaluated or asked: the folder of a run or a Hugging Face directory, also in a bucket, or
            a hub id. Where it is the folder of a run, `config.model` is the run's own, and so are the variables and the
            day of the chat template, unless they are given. Otherwise `config.model.path` is `model`.

    Raises:
        InputError: the file cannot be used; a field is unknown, or has a value that no run can use; `model` is a run
            without a checkpoint.
    """
    _check_source(source)
    overrides = _checked_overrides({} if overrides is None else overrides)
    folder = path_of(f"--model {model}", model)
    model = str(model)
    run = _tree_of_run(folder) if model and _holds_run(folder) else None
    file = str(source) if isinstance(source, (str, Path)) else None
    if isinstance(source, Config):
        source = _tree_of_dict(to_dict(source))
    tree = _tree_of_file(file) if file is not None else copy.deepcopy(source) or run or default()
    config = _checked(tree, overrides, file)
    if run is None:
        return replace(config, model=replace(config.model, path=model)) if model else config
    own = _checked(run, {path: value for path, value in overrides.items() if path.startswith("model.")}, None)
    if source is not None:
        kwargs = config.data.template_kwargs or own.data.template_kwargs
        date = config.data.template_date or own.data.template_date
        config = replace(config, data=replace(config.data, template_kwargs=kwargs, template_date=date))
    return replace(config, model=own.model)


def _check_source(source: Any) -> None:
    """Raises InputError if `source` is not something that `load_config` takes."""
    if isinstance(source, (str, Path, ml_collections.ConfigDict, Config, type(None))):
        return
    fix = "give its path, or igrpo_jax.config.default() with values of your own"
    if isinstance(source, Mapping):
        fix = f"settings are the second argument, as in load_config(None, {source!r})"
    raise InputError(f"source = {shown(source)}: is not a config file; {fix}")


def _checked_overrides(overrides: Any) -> dict[str, Any]:
    """Returns the overrides of `load_config` as a dictionary.

    Raises:
        InputError: they are not a mapping, or not from texts.
    """
    given, example = f"overrides = {shown(overrides)}", "such as {'steps': 3}"
    if not isinstance(overrides, (Mapping, ml_collections.ConfigDict)):
        raise InputError(f"{given}: must be a mapping from names of fields to values, {example}")
    if wrong := [name for name in overrides if not isinstance(name, str)]:
        raise InputError(f"{given}: {wrong[0]!r} is not a field name; give a mapping from names to values, {example}")
    return dict(overrides)


def check_config(config: Any) -> None:
    """Raises InputError if `config` is not what `load_config` returns, but a file or what a file returns."""
    if not isinstance(config, Config):
        given = shown(config)
        raise InputError(f"config = {given}: is not a checked configuration; give what load_config(...) returns")


def config_of_run(model: str | Path) -> Config | None:
    """Returns the configuration of the run whose folder `model` is; None if it is not the folder of a run."""
    folder = path_of(f"--model {model}", model)
    return freeze(_tree_of_run(folder)) if (folder / "checkpoints").is_dir() else None


def check_model(config: Config, model: str | Path) -> None:
    """Raises InputError if `config` does not describe `model`, as that of `load_config(..., model=model)` does."""
    check_config(config)
    path, own = str(model), config_of_run(model)
    fits = replace(own.model, dtype=config.model.dtype) == config.model if own else config.model.path == path
    if not fits:
        raise InputError(f"config.model: is not that of {path}; use what load_config(..., model={path!r}) returns")


def _checked(tree: Any, overrides: Mapping[str, Any], file: str | None) -> Config:
    """Returns `tree` with `overrides` as dataclasses. An error names the line of `file` that set the field."""
    for path, value in overrides.items():
        check_field(path)
        if setting_at(Config, path).is_section:
            field = next(settings(setting_at(Config, path).hint)).name
            fix = f"is a group of settings; give them by their dotted names, as in {{'{path}.{field}': VALUE}}"
            raise FieldError(path, f"config.{path} = {shown(value)}: {fix}")
        *sections, name = path.split(".")
        section = tree
        for part in sections:
            section = section.get(part) if isinstance(section, ml_collections.ConfigDict) else None
        if isinstance(section, ml_collections.ConfigDict):  # else freeze says what is wrong with it
            section[name] = value
    try:
        return freeze(tree)
    except FieldError as error:
        place = tree.place(error.path) if file and isinstance(tree, Tree) else None
        if place is None:
            raise
        name = file if Path(place.file) == Path(file).absolute() else place.file
        raise InputError(f"{name}, line {place.line}: {error}") from error


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module without leaving a compiled file, which would be stale after an edit that keeps time and size."""

    def set_data(self, path: str, data: Any, **_: Any) -> None:
        """Writes nothing."""


def _tree_of_file(file: str) -> ml_collections.ConfigDict:
    """Returns what `get_config` of a config file returns.

    Raises:
        InputError: the file is not there, fails, has no `get_config`, or it returns something else than a ConfigDict.
    """
    if wrong := _no_config_file(Path(file)):
        raise InputError(f"--config {file}: {wrong}")
    if not Path(file).is_file():
        near = difflib.get_close_matches(file, map(str, Path("configs").glob("*.py")), n=1, cutoff=0.0)
        fix = f"the nearest is {near[0]}" if near else "give a Python file that has get_config()"
        raise InputError(f"--config {file}: no such file; {fix}")
    name, path = "igrpo_config_file", str(Path(file).absolute())
    spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, path))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    linecache.checkcache(path)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise InputError("has no get_config(); start it as `def get_config(): config = default()`")
        tree = module.get_config()
    except (Exception, SystemExit) as error:  # it is the user's code and may raise anything
        raise InputError(_file_error(error, file, path)) from error
    finally:
        del sys.modules[name]
    if not isinstance(tree, ml_collections.ConfigDict):
        raise InputError(f"{file}: get_config() must return a ConfigDict, not {tree!r}; end it with `return config`")
    return tree


def _no_config_file(path: Path) -> str:
    """Returns what a path is that is not a config file, and what to give; "" if it may be one.

    A file with another ending is not run as Python, whatever it holds.
    """
    needed = "a config file is a Python file that has get_config()"
    if path.is_dir():
        return f"is a folder; {needed}"
    if not path.is_file() or path.suffix in (".py", ""):
        return ""
    try:
        is_of_run = path.suffix == ".json" and is_of_a_run(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        is_of_run = False
    if not is_of_run:
        return f"ends in {path.suffix}; {needed}, such as configs/tiny_cpu.py"
    fix = "a run's settings come from its --config file; give that file"
    return f"was written by a run; {fix}, or give the run itself as --model to commands that take a model"


def _file_error(error: BaseException, file: str, path: str) -> str:
    """Returns what went wrong in a config file as one line: the file, the line number, and the line itself."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines, text = [error.lineno], f"{type(error).__name__}: {error.msg}"
    else:
        text = one_line(error) if isinstance(error, InputError) else f"{type(error).__name__}: {one_line(error)}"
    if not lines:
        return f"{file}: {text}"
    return f"{file}, line {lines[-1]}: {text}; it reads `{linecache.getline(path, lines[-1]).strip()}`"


def value_of_text(path: str, text: str) -> Any:
    """Returns what a command line gives for the field with a dotted name, in the type of the field.

    A tuple is written as a,b or as Python writes it, a mapping as Python writes it.

    Raises:
        InputError: there is no such field; `text` is not a value of its type.
    """
    check_field(path)
    setting = setting_at(Config, path)
    if setting.is_section:
        example = f"--config.{path}.{next(settings(setting.hint)).name}=VALUE"
        raise FieldError(path, f"config.{path} = {text!r}: is a group of settings; give one of them, such as {example}")
    if setting.is_optional and text.strip() == "None":
        return None
    if setting.value_type is dict:
        value = _literal(text)
        if not isinstance(value, dict):
            fix = "must be a mapping as Python writes it, such as {'enable_thinking': False}"
            raise refusal(path, text, fix)
        return value
    if setting.value_type is tuple:
        return _tuple(setting, path, text)
    value = _scalar(setting.value_type, text)
    if value is None:
        raise refusal(path, text, f"must be {setting.kind}")
    return value


def _tuple(setting: Setting, path: str, text: str) -> tuple:
    """Returns the entries of a tuple that is written as a,b or as Python writes it."""
    if text.strip().startswith(("(", "[", "'", '"')):
        value = _literal(text)
        if isinstance(value, (str, tuple, list)):
            return (value,) if isinstance(value, str) else tuple(value)
        raise refusal(path, text, "must be values separated by commas, such as a,b")
    entries = [_scalar(setting.entry_type, entry.strip()) for entry in text.split(",") if entry.strip()]
    if None in entries:
        raise refusal(path, text, f"each entry must be {KINDS[setting.entry_type]}")
    return tuple(entries)


def _scalar(kind: type, text: str) -> Any:
    """Returns a text as a value of type `kind`; None if it does not spell one."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.strip().lower())
    try:
        return kind(text)
    except ValueError:
        return None


def _literal(text: str) -> Any:
    """Returns the value of a Python literal; None if `text` is not one."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _holds_run(folder: Path) -> bool:
    """Returns whether `folder` is that of a run with checkpoints.

    Raises:
        InputError: it is that of a run without one.
    """
    if (folder / "checkpoints").is_dir():
        return True
    try:
        keys = json.loads(read_bytes(folder / "config.json"))
    except (OSError, ValueError):
        return False
    if is_of_a_run(keys):
        raise InputError(
            f"--model {folder}: is the folder of a run that has no checkpoint yet; wait for the first one (of step 0), "
            f"or start the run again with --workdir {folder}"
        )
    return False


def is_of_a_run(keys: Any) -> bool:
    """Returns whether a config.json holds the settings of a run. The config.json of a Hugging Face model does not."""
    return isinstance(keys, dict) and {"algorithm", "rollout", "checkpoint"} <= keys.keys()


def _tree_of_dict(settings: Mapping[str, Any]) -> Any:
    """Returns the ConfigDict of settings; fields that are not among them have their defaults."""
    tree = default()
    tree.update(settings)
    return tree


def _tree_of_run(workdir: Path) -> Any:
    """Returns the ConfigDict of a run's config.json; fields that an older version did not write have their defaults."""
    try:
        tree = _tree_of_dict(json.loads(read_bytes(workdir / "config.json")))
        freeze(tree)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, InputError) as error:
        raise InputError(
            f"--model {workdir}: its config.json can't be used ({one_line(error)}); give another folder"
        ) from error
    return tree
