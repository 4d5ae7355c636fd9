"""What an error says of a flag that is wrong, and of an argument that is not a flag."""

import difflib
import re
from collections.abc import Mapping

from absl import flags

from igrpo_jax.config import Config
from igrpo_jax.errors import one_line
from igrpo_jax.schema.fields import field_paths, leaf_paths, paths_named

# What absl says of a value, and what the value must be instead.
_KINDS = {"literal for int": "a whole number", "Non-boolean": "True or False"}


def flag_error(error: Exception, values: flags.FlagValues) -> str:
    """Returns what is wrong with the flags in one line: the flag, its value, and what to give instead."""
    text = one_line(error)
    if isinstance(error, flags.UnrecognizedFlagError):
        return _unknown_flag(error.flagname, list(values))
    if missing := re.fullmatch(r"Missing value for flag (--\S+)", text):
        return f"{missing[1]}: has no value; give it as {missing[1]}=VALUE"
    kind = next((kind for words, kind in _KINDS.items() if words in text), None)
    if kind and (wrong := re.match(r"flag --(\w+)=(.*?): ", text)):
        return f"--{wrong[1]} {wrong[2]}: must be {kind}"
    return text


def _unknown_flag(name: str, known: list[str]) -> str:
    """Returns the error for a flag that is not in `known`: the setting that has this name, or the nearest flag."""
    settings = field_paths(Config) if "config" in known else []
    named = name.replace("-", "_")
    if "workdir" in known and (named == "out" or (named == "model" and not settings)):
        return f"--{name}: no such flag; did you mean --workdir"
    paths = [path for path in settings if path == named or path.endswith(f".{named}")] if "." in named else []
    if settings and not paths:
        paths = [path for path in paths_named(Config, named) if not path.startswith("--") or path[2:] in known]
    if paths:
        meant = " or ".join(path if path.startswith("--") else f"--config.{path}" for path in paths)
        return f"--{name}: no such flag; did you mean {meant}"
    single = leaf_paths(Config) if settings else []
    flag_of = {path.rpartition(".")[2]: f"--config.{path}" for path in single} | {flag: f"--{flag}" for flag in known}
    if near := difflib.get_close_matches(named, flag_of, n=1, cutoff=0.7):
        return f"--{name}: no such flag; the nearest is {flag_of[near[0]]}"
    others = [f"--{flag}" for flag in known if flag not in ("help", "h")]
    return f"--{name}: no such flag; the command has {', '.join(others)}" + " and --config.FIELD" * bool(settings)


def suggestion(argument: str, given: Mapping[str, str | None]) -> str:
    """Returns what was probably meant by an argument that is not a flag, in a command with these flags and values."""
    first = (given.get("compare") or "").rstrip(",")
    if first and "," not in first:
        return f"two evaluations are given as --compare {first},{argument.lstrip(',')}"
    if argument.endswith(".py"):
        return f"a configuration file is given as --config {argument}"
    name, equals, value = argument.partition("=")
    if equals and (paths := paths_named(Config, name)):
        flag = paths[0] if paths[0].startswith("--") else f"--config.{paths[0]}"
        return f"did you mean {flag}={value}"
    if "prompt" in given:
        return f'a question is given as --prompt "{argument}"'
    return "settings are given as --config.field=value"
