"""What every command shares: it turns flags into a checked configuration, and errors into one line and an exit code.

Exit codes: 0 done, 1 the run failed, 2 bad input, 3 does not fit (aot), 75 preempted (the same command goes on), 130
interrupted. Nothing here imports jax at module level: the verifier's workers import the main module again.
"""

import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from igrpo_jax.config import Config, check_field, default, freeze
from igrpo_jax.distributed import preemption, watchdog
from igrpo_jax.errors import InputError, RunError, one_line
from igrpo_jax.schema import field_paths

# Read by transformers when it is first imported: without PyTorch, which nothing here needs, it prints advice to install
# it. Its warnings are not affected.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def parse(argv: list[str]) -> tuple[Config, Path]:
    """Returns configuration and workdir of `PROGRAM --config FILE [--workdir DIR] [--config.field=value ...]`.

    Raises:
        InputError: an unknown flag or field, a value of the wrong type, a config file that can't be used.
    """
    usage = "python -m igrpo_jax.main --config FILE [--workdir DIR] [--config.FIELD=VALUE ...]"
    texts = {"workdir": "folder of the run; default: runs/NAME, where NAME.py is the --config file"} | CLUSTER
    config, values = parse_config(argv, usage, texts)
    return config, Path(values["workdir"] or Path("runs", Path(_last_value(argv, "config")).stem))


def parse_config(argv: list[str], usage: str, texts: dict[str, str]) -> tuple[Config, dict[str, str | None]]:
    """Returns the configuration of a command line that needs --config FILE, and the values of the flags in `texts`.

    Args:
        usage: shown by --help.
        texts: further flags, and what each is for.

    Raises:
        InputError: as `parse`.
    """
    config, values = _parse(argv, usage, texts)
    if _last_value(argv, "config") is None:
        raise InputError("--config: missing; give a configuration file, for example --config configs/tiny_cpu.py")
    return config, values


CONFIG_FLAG = "Python file whose get_config() returns igrpo_jax.config.default(), with its own settings"

# Flags of a process among several. Slurm, Open MPI and TPU pods need none of them: they tell JAX themselves.
CLUSTER = {
    "coordinator": "HOST:PORT of process 0, where the processes meet",
    "processes": "number of processes that run together",
    "process": "number of this process, counted from 0",
}


def address(argv: list[str]) -> dict[str, Any]:
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
    if not re.fullmatch(r".+:\d+", coordinator):
        raise InputError(
            f"--coordinator {coordinator}: must be HOST:PORT, an address of process 0 and a port that is free there"
        )
    if not process < count:
        raise InputError(f"--process {process}: must be below --processes = {count}; they are counted from 0")
    return {"coordinator_address": coordinator, "num_processes": count, "process_id": process}


# Short flags that commands about a model may have, with the field that each sets.
SHORT = {name: f"evaluation.{name}" for name in ("benchmarks", "samples", "rounds")}


def parse_model(argv: list[str], usage: str, texts: dict[str, str]) -> tuple[Config, dict[str, str | None]]:
    """Returns the configuration of a command about the model in --model, and the values of `texts` and "model".

    Without --config it is the configuration of the run in --model, or the default one. Where --model is the folder of a
    run, config.model is the run's own, and so are the variables and the day of the chat template, unless they are
    given. Otherwise config.model.path is --model.

    Args:
        usage: shown by --help.
        texts: further flags, and what each is for; those of SHORT set their fields.

    Raises:
        InputError: as `parse`; --model is a run whose config.json can't be used, or without a checkpoint.
    """
    argv = _spelled_out(argv, SHORT.keys() & texts.keys())
    model = _last_value(argv, "model")
    run = None
    if model and Path(model, "checkpoints").is_dir():
        run = _tree_of_run(Path(model))
    elif model and _is_run(Path(model)):
        raise InputError(
            f"--model {model}: is the folder of a run that has no checkpoint yet; wait for the first one (of step 0), "
            f"or start the run again with --workdir {model}"
        )
    texts = {"model": "the model: folder of a run, Hugging Face directory or hub id"} | texts | CLUSTER
    config, values = _parse(argv, usage, texts, run or default())
    if run is not None:
        own = freeze(run)
        if _last_value(argv, "config") is not None:
            kwargs = config.data.template_kwargs or own.data.template_kwargs
            date = config.data.template_date or own.data.template_date
            config = replace(config, data=replace(config.data, template_kwargs=kwargs, template_date=date))
        return replace(config, model=own.model), values
    return replace(config, model=replace(config.model, path=model or "")), values


def read_flags(argv: list[str], values: flags.FlagValues, text: str, example: str) -> None:
    """Reads the flags `values` of a command that has no configuration; --help prints `text` and the flags, and ends.

    Raises:
        InputError: an unknown flag, a value of the wrong type, or an argument that is no flag; `example` shows how a
            flag is written.
    """
    flags.DEFINE_bool("help", False, "show this help", flag_values=values, short_name="h")
    try:
        rest = values(argv)
    except flags.Error as error:
        raise InputError(_flag_error(error, values)) from error
    if values.help:
        # absl adds to the text of a flag that may be repeated.
        _print_help(text.strip(), {name: values[name].help.partition(";\n")[0] for name in values if len(name) > 1})
        raise SystemExit(0)
    if len(rest) > 1:
        raise InputError(f"{rest[1]}: not understood; settings are given as {example}")


def number(flag: str, value: str | None) -> int | None:
    """Returns the value of a flag as an integer, None where it is not given. Raises InputError where it is none."""
    if value is None or value.isdecimal():
        return None if value is None else int(value)
    raise InputError(f"--{flag} {value}: must be a whole number")


def _spelled_out(argv: list[str], short: Collection[str]) -> list[str]:
    """Returns `argv` with the flags `short`, which SHORT has, written as --config.field=value."""
    result, rest = [], iter(argv)
    for argument in rest:
        match = re.fullmatch(r"--?(\w+)(?:=(.*))?", argument)
        if not match or match[1] not in short:
            result.append(argument)
            continue
        value = match[2] if match[2] is not None else next(rest, "")
        if match[1] == "benchmarks":
            value = repr(tuple(name.strip() for name in value.split(",") if name.strip()))
        result.append(f"--config.{SHORT[match[1]]}={value}")
    return result


def _is_run(folder: Path) -> bool:
    """Returns whether the config.json of `folder` is a run's and not that of a Hugging Face model."""
    try:
        keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(keys, dict) and {"algorithm", "rollout", "checkpoint"} <= keys.keys()


def _tree_of_run(workdir: Path) -> Any:
    """Returns the ConfigDict of a run's config.json; fields that an older version did not write have their defaults."""
    tree = default()
    try:
        old = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        tree.update(old)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"--model {workdir}: its config.json can't be used ({one_line(error)}); give another folder"
        ) from error
    return tree


def _parse(
    argv: list[str], usage: str, texts: dict[str, str], tree: Any = None
) -> tuple[Config, dict[str, str | None]]:
    """Returns the configuration, and the values of the flags in `texts` (the purpose of each by its name).

    Args:
        tree: a ConfigDict that is used where there is no --config; without it the configuration is then the default.
    """
    _check_overrides(argv)
    file = _last_value(argv, "config")
    values = flags.FlagValues()
    holder = _define_config(argv, values, tree if file is None else None)
    for name, meaning in texts.items():
        flags.DEFINE_string(name, None, meaning, flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values, short_name="h")
    try:
        rest = values(argv)
    except Exception as error:  # the config file is the user's code and may raise anything
        raise InputError(_flag_error(error, values)) from error
    if values["help"].value:
        field = {"config.FIELD": "any setting of igrpo_jax/config.py; it replaces the one of the file"}
        _print_help(usage, {"config": CONFIG_FLAG} | texts | field)
        raise SystemExit(0)
    if len(rest) > 1:
        raise InputError(f"{rest[1]}: not understood; settings are given as --config.field=value")
    given = {name: values[name].value for name in texts}
    if file is None and tree is None:
        return Config(), given
    return freeze(_tree_of_flag(holder, file)), given


def _define_config(argv: list[str], values: flags.FlagValues, tree: Any) -> flags.FlagHolder:
    """Defines --config and --config.FIELD in `values`: for a file, or for the fields of `tree` where that is given."""
    settings = {"flag_values": values, "lock_config": False, "sys_argv": argv}
    if tree is not None:
        return config_flags.DEFINE_config_dict("config", tree, **settings)
    return config_flags.DEFINE_config_file("config", None, CONFIG_FLAG, **settings)


def _print_help(text: str, meanings: Mapping[str, str]) -> None:
    """Prints `text`, and a line for each flag with what it is for."""
    print(text, "", *(f"  --{name:<14}{meaning}" for name, meaning in meanings.items()), sep="\n")


def _tree_of_flag(holder: flags.FlagHolder, file: str | None) -> Any:
    """Returns the ConfigDict of --config. Raises InputError where its file failed, or returned something else."""
    try:
        tree = holder.value
        list(tree)
    except TypeError as error:
        raise InputError(f"--config {file}: get_config() must return a ConfigDict, not {tree!r}") from error
    except OSError as error:  # ml_collections keeps what went wrong in the file for the first use of its result
        raise InputError(f"--config {file}: {_config_error(error.__cause__ or error)}") from error
    return tree


def _check_overrides(argv: list[str]) -> None:
    """Raises InputError, with the nearest right name, for a field or a file of --config that does not exist."""
    for argument in argv[1:]:
        if match := re.match(r"--?config\.([^=]+)", argument):
            check_field(match[1])
    file = _last_value(argv, "config")
    if file is not None and not Path(file).is_file():
        near = difflib.get_close_matches(file, map(str, Path("configs").glob("*.py")), n=1, cutoff=0.0)
        fix = f"the nearest is {near[0]}" if near else "give a Python file that has get_config()"
        raise InputError(f"--config {file}: no such file; {fix}")


def _last_value(argv: list[str], name: str) -> str | None:
    """Returns what `argv` gives last for a flag, which counts as with every flag; None where it is not given."""
    value = None
    for i, argument in enumerate(argv):
        if match := re.fullmatch(rf"--?{name}(?:=(.*))?", argument):
            value = match[1] if match[1] is not None else next(iter(argv[i + 1 :]), None)
    return value


# What absl says of a value, and what the value must be instead.
_KINDS = {"literal for int": "a whole number", "string to float": "a number", "Non-boolean": "True or False"}


def _flag_error(error: Exception, values: flags.FlagValues) -> str:
    """Returns what is wrong with the flags in one line: the flag, its value, and what to give instead."""
    text = one_line(error)
    if isinstance(error, flags.UnrecognizedFlagError):
        near = difflib.get_close_matches(error.flagname, list(values), n=1, cutoff=0.0)
        return f"--{error.flagname}: no such flag; the nearest is --{near[0]}"
    if missing := re.fullmatch(r"Missing value for flag (--\S+)", text):
        return f"{missing[1]}: has no value; give it as {missing[1]}=VALUE"
    if wrong := re.match(r"flag --([\w.]+)=(.*?): Failed to parse .* as a ConfigDict", text):
        name, value = wrong.groups()
        return f"{name} = {value}: must be a mapping as Python writes it, such as {{'enable_thinking': False}}"
    kind = next((kind for words, kind in _KINDS.items() if words in text), None)
    if kind and (wrong := re.match(r"flag --([\w.]+)=(.*?): ", text)):
        name, value = wrong.groups()
        return f"{name} = {value!r}: must be {kind}" if "." in name else f"--{name} {value}: must be {kind}"
    return _config_error(error)


def _config_error(error: BaseException) -> str:
    """Returns what is wrong with a config file or a value in one line, with the nearest name of an unknown field."""
    text = one_line(error)
    if near := re.search(r"Did you mean \"(\w+)\" instead of \"(\w+)\"", text):
        # The message lacks the part of the configuration that the field is in.
        paths = [path for path in field_paths(Config) if path.rpartition(".")[2] == near[1]]
        part = paths[0].removesuffix(near[1]) if len(paths) == 1 else ""
        return f"config.{part}{near[2]}: no such field; the nearest is config.{part}{near[1]}"
    known = isinstance(error, (flags.Error, ValueError))
    return (text if known else f"{type(error).__name__}: {text}")[:300]


def run(command: Callable[[list[str]], None]) -> None:
    """Runs `command(sys.argv)`, and ends the process with an exit code where it fails.

    Errors that need no traceback are one line. All others show theirs; below that of an error of JAX, one line names
    the phase in which it came and what to change.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        command(sys.argv)
    except InputError as error:
        _leave(_say(error, 2))
    except RunError as error:
        _leave(_say(error, 1))
    except preemption.Preempted as error:
        _leave(_say(f"{error}; the same command goes on from there", preemption.EXIT_CODE))
    except KeyboardInterrupt:
        _leave(_say("interrupted; the same command goes on from what was saved, if something was", 130))
    except Exception as error:
        traceback.print_exc()
        # By name: jax.errors is not imported before a command needs it.
        is_of_jax = type(error).__name__ == "JaxRuntimeError"
        _leave(_say(_device_error(str(error)), 1) if is_of_jax else 1)


def _leave(code: int) -> NoReturn:
    """Ends the process. One of several ends at once, since JAX's exit handlers would wait for the others in vain."""
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _device_error(text: str) -> str:
    """Returns one line about an error of JAX: the phase with its shapes, its message, and what to change."""
    phase = watchdog.current() or "no phase of a run"
    message = one_line(text.partition("\n")[0])[:300]
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        return (
            f"JAX failed in {phase}: {message}; if it comes again where a program is compiled, try learner.attention = "
            "xla, or another version of jax"
        )
    smaller = next((fields for name, fields in watchdog.SMALLER.items() if name in phase), "the sizes of what runs")
    return (
        f"out of device memory in {phase}: lower {smaller}; more devices on mesh.fsdp or mesh.tensor hold smaller "
        f"parts of the weights ({message})"
    )


def _say(message: object, code: int) -> int:
    """Prints an error; returns the exit code."""
    print(f"igrpo_jax: error: {message}", file=sys.stderr, flush=True)
    return code
