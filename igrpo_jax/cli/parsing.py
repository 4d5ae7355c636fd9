"""Turns the flags of a command into a checked configuration, and into the values of its own flags."""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from igrpo_jax.cli import flag_errors
from igrpo_jax.config import Config, check_field
from igrpo_jax.errors import InputError
from igrpo_jax.loading import load_config, value_of_text
from igrpo_jax.storage.addresses import path_of

CONFIG_FLAG = "Python file whose get_config() returns igrpo_jax.config.default(), with its own settings"

# Flags of a process among several. Slurm, Open MPI and TPU pods need none of them: JAX reads these values from them.
CLUSTER = {
    "coordinator": "HOST:PORT of process 0, where the processes meet",
    "processes": "number of processes that run together",
    "process": "number of this process, counted from 0",
}

# Short flags that commands about a model may have, with the field that each sets.
SHORT = {name: f"evaluation.{name}" for name in ("benchmarks", "samples", "rounds")}


def parse(argv: list[str]) -> tuple[Config, Path]:
    """Returns configuration and workdir of `PROGRAM --config FILE [--workdir DIR] [--config.field=value ...]`.

    Raises:
        InputError: an unknown flag or field, a value of the wrong type, a config file that can't be used.
    """
    usage = "python -m igrpo_jax.main --config FILE [--workdir DIR] [--config.FIELD=VALUE ...]"
    flag_help = {"workdir": "folder of the run; default: runs/NAME, where NAME.py is the --config file"} | CLUSTER
    config, values = parse_config(argv, usage, flag_help)
    workdir = values["workdir"] or Path("runs", Path(_last_value(argv, "config")).stem)
    return config, path_of(f"--workdir {workdir}", workdir)


def parse_config(argv: list[str], usage: str, flag_help: dict[str, str]) -> tuple[Config, dict[str, str | None]]:
    """Returns the configuration of a command line that needs --config FILE, and the values of the flags in `flag_help`.

    Args:
        usage: shown by --help.
        flag_help: more flags, and what each is for.

    Raises:
        InputError: as `parse`.
    """
    values, settings = _parse(argv, usage, flag_help)
    if values["config"] is None:
        examples = sorted(map(str, Path("configs").glob("*.py")))
        example = "configs/tiny_cpu.py" if "configs/tiny_cpu.py" in examples else next(iter(examples), "my_config.py")
        raise InputError(f"--config: missing; name the configuration file, for example --config {example}")
    return load_config(values["config"], settings), values


def cluster_arguments(argv: list[str]) -> dict[str, Any]:
    """Returns the flags of CLUSTER as arguments of jax.distributed.initialize; empty without them.

    Raises:
        InputError: one of them is missing or makes no sense.
    """
    values = {name: _last_value(argv, name) for name in CLUSTER}
    if not any(values.values()):
        return {}
    for name, value in values.items():
        if value is None:
            raise InputError(f"--{name}: missing; --coordinator, --processes and --process belong together")
    coordinator = values["coordinator"]
    count = number("processes", values["processes"])
    process = number("process", values["process"])
    match = re.fullmatch(r".+:(\d+)", coordinator)
    if not match or not 0 < int(match[1]) < 1 << 16:
        raise InputError(
            f"--coordinator {coordinator}: must be HOST:PORT, an address of process 0 and a port that is free there, "
            "at most 65535"
        )
    if not process < count:
        raise InputError(f"--process {process}: must be below --processes = {count}; they are counted from 0")
    return {"coordinator_address": coordinator, "num_processes": count, "process_id": process}


def parse_model(argv: list[str], usage: str, flag_help: dict[str, str]) -> tuple[Config, dict[str, str | None]]:
    """Returns the configuration of a command about the model in --model, and the values of `flag_help` and "model".

    Without --config it is the configuration of the run in --model, or the default one. Where --model is the folder of a
    run, config.model is the run's own, and so are the variables and the day of the chat template, unless they are
    given. Otherwise config.model.path is --model.

    Args:
        usage: shown by --help.
        flag_help: more flags, and what each is for; those of SHORT set their fields.

    Raises:
        InputError: as `parse`; --model is a run whose config.json can't be used, or without a checkpoint.
    """
    argv = _spelled_out(argv, SHORT.keys() & flag_help.keys())
    flag_help = {"model": "the model: folder of a run, Hugging Face directory or hub id"} | flag_help | CLUSTER
    values, settings = _parse(argv, usage, flag_help)
    return load_config(values["config"], settings, values["model"] or ""), values


def read_flags(argv: list[str], values: flags.FlagValues, text: str, example: str) -> None:
    """Reads the flags `values` of a command that has no configuration; --help prints `text` and the flags, and ends.

    Raises:
        InputError: an unknown flag, a value of the wrong type, or an argument that is not a flag; `example` shows how a
            flag is written.
    """
    flags.DEFINE_bool("help", False, "show this help", flag_values=values, short_name="h")
    try:
        rest = values(argv)
    except flags.Error as error:
        raise InputError(flag_errors.flag_error(error, values)) from error
    if values.help:
        # absl appends a note to the text of a flag that may be repeated.
        _print_help(text.strip(), {name: values[name].help.partition(";\n")[0] for name in values if len(name) > 1})
        raise SystemExit(0)
    if len(rest) > 1:
        meant = f"settings are given as {example}"
        if "workdir" in values and "=" not in rest[1] and (isinstance(values.workdir, list) or not values.workdir):
            meant = f"the folder of a run is given as --workdir={rest[1]}"
        raise InputError(f"{rest[1]}: not understood; {meant}")
    _refuse_empty({name: values[name].value for name in values})


def number(flag: str, value: str | None, least: int = 0) -> int | None:
    """Returns the value of a flag as an integer, None if it is not given.

    Raises:
        InputError: it is not an integer, or below `least`.
    """
    if value is None or (value.isdecimal() and int(value) >= least):
        return None if value is None else int(value)
    raise InputError(f"--{flag} {value}: must be a whole number, {least} or more")


def _spelled_out(argv: list[str], short: Collection[str]) -> list[str]:
    """Returns `argv` with the flags `short`, which SHORT has, written as --config.field=value."""
    result, rest = [], iter(argv)
    for argument in rest:
        match = re.fullmatch(r"--?(\w+)(?:=(.*))?", argument)
        if not match or match[1] not in short:
            result.append(argument)
            continue
        value = match[2] if match[2] is not None else next(rest, "")
        result.append(f"--config.{SHORT[match[1]]}={value}")
    return result


def _parse(argv: list[str], usage: str, flag_help: dict[str, str]) -> tuple[dict[str, str | None], dict[str, Any]]:
    """Returns the values of --config and of the flags in `flag_help`, and those of --config.FIELD by the field.

    Args:
        flag_help: the purpose of each flag by its name.
    """
    argv, settings = _settings(argv)
    values = flags.FlagValues()
    for name, meaning in {"config": CONFIG_FLAG, **flag_help}.items():
        flags.DEFINE_string(name, None, meaning, flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values, short_name="h")
    try:
        rest = values(argv)
    except flags.Error as error:
        raise InputError(flag_errors.flag_error(error, values)) from error
    if values["help"].value:
        field = {"config.FIELD": "any setting of igrpo_jax/config.py; it replaces the one of the file"}
        _print_help(usage, {"config": CONFIG_FLAG} | flag_help | field)
        raise SystemExit(0)
    given = {name: values[name].value for name in flag_help}
    if len(rest) > 1:
        raise InputError(f"{rest[1]}: not understood; {flag_errors.suggestion(rest[1], given)}")
    _refuse_empty(given | {"config": values["config"].value})
    file = values["config"].value and os.path.expanduser(values["config"].value)
    return {"config": file} | given, settings


def _refuse_empty(given: Mapping[str, Any]) -> None:
    """Raises InputError if a flag has an empty value, for which a default would be taken in silence."""
    for name, value in given.items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise InputError(f'--{name} "": is empty (an unset shell variable?); give it a value')


def _settings(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Returns `argv` without its --config.FIELD=VALUE, and these values by the field, each in the type of its field."""
    others, settings, rest = [], {}, iter(argv)
    for argument in rest:
        match = re.fullmatch(r"--?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if not match:
            others.append(argument)
            continue
        path, text = match.groups()
        check_field(path)
        if text is None and (text := next(rest, "--")).startswith("--"):
            raise InputError(f"--config.{path}: has no value; give it as --config.{path}=VALUE")
        settings[path] = value_of_text(path, text)
    return others, settings


def _print_help(text: str, meanings: Mapping[str, str]) -> None:
    """Prints `text`, and a line for each flag with what it is for."""
    print(text, "", *(f"  --{name:<14}{meaning}" for name, meaning in meanings.items()), sep="\n")


def _last_value(argv: list[str], name: str) -> str | None:
    """Returns the last value that `argv` gives for a flag, which is the one that counts; None if it is not given."""
    value = None
    for i, argument in enumerate(argv):
        if match := re.fullmatch(rf"--?{name}(?:=(.*))?", argument):
            value = match[1] if match[1] is not None else next(iter(argv[i + 1 :]), None)
    return value
