"""What every command shares: it turns flags into a checked configuration, and errors into one line and an exit code.

Exit codes: 0 done, 1 the run failed, 2 bad input, 3 does not fit (aot), 75 preempted (the same command goes on), 130
interrupted. Nothing here imports jax at module level: the verifier's workers import the main module again.
"""

import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from igrpo_jax.config import Config, check_field, default, freeze
from igrpo_jax.distributed import preemption, watchdog
from igrpo_jax.errors import InputError, RunError, one_line

# Read by transformers when it is first imported: without PyTorch, which nothing here needs, it prints advice to install
# it. Its warnings are not affected.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def parse(argv: list[str]) -> tuple[Config, Path]:
    """Returns configuration and workdir of `PROGRAM --config FILE [--workdir DIR] [--config.field=value ...]`.

    Raises:
        InputError: an unknown flag or field, a value of the wrong type, a config file that can't be used.
    """
    usage = "python -m igrpo_jax.main --config FILE [--workdir DIR] [--config.FIELD=VALUE ...]"
    texts = {"workdir": "folder of the run; default runs/NAME of the config file"} | CLUSTER
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


CONFIG_FLAG = "Python file whose get_config() edits igrpo_jax.config.default()"

# Flags of a process among several. Slurm, Open MPI and TPU pods need none of them: they tell JAX themselves.
CLUSTER = {
    "coordinator": "HOST:PORT of process 0, where several processes meet",
    "processes": "how many there are",
    "process": "number of this one, from 0",
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


# Short flags of the commands about a model: the field that each sets, and what it is for.
SHORT = {
    "benchmarks": ("evaluation.benchmarks", "names with commas between them"),
    "samples": ("evaluation.samples", "answers to each problem; default: as many as in the paper"),
    "rounds": ("evaluation.rounds", "rounds of draft -> refine, beside the single shot; default 0"),
}


def parse_model(argv: list[str], usage: str, texts: dict[str, str]) -> tuple[Config, dict[str, str | None]]:
    """Returns the configuration of a command about the model in --model, and the values of `texts` and "model".

    Without --config it is the configuration of the run in --model, or the default one. config.model is the run's own
    where --model is the folder of a run; otherwise config.model.path is --model. The flags of SHORT set their fields.

    Args:
        usage: shown by --help.
        texts: further flags, and what each is for.

    Raises:
        InputError: as `parse`; --model is a run whose config.json can't be used, or without a checkpoint.
    """
    argv = _spelled_out(argv)
    model = _last_value(argv, "model")
    run = None
    if model and Path(model, "checkpoints").is_dir():
        run = _tree_of_run(Path(model))
    elif model and _is_run(Path(model)):
        raise InputError(
            f"--model {model}: is the folder of a run that has no checkpoint yet; wait for the first one (of step 0), "
            f"or start the run again with --workdir {model}"
        )
    short = {name: meaning for name, (_, meaning) in SHORT.items()}
    texts = {"model": "folder of a run, Hugging Face directory or hub id"} | short | texts | CLUSTER
    config, values = _parse(argv, usage, texts, run or default())
    if run is not None:
        return replace(config, model=freeze(run).model), values
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
        raise InputError(one_line(error)) from error
    if values.help:
        print(f"{text}\n{values}")
        raise SystemExit(0)
    if len(rest) > 1:
        raise InputError(f"{rest[1]}: not understood; settings are given as {example}")


def number(flag: str, value: str | None) -> int | None:
    """Returns the value of a flag as an integer, None where it is not given. Raises InputError where it is none."""
    if value is None or value.isdecimal():
        return None if value is None else int(value)
    raise InputError(f"--{flag} {value}: must be a whole number")


def _spelled_out(argv: list[str]) -> list[str]:
    """Returns `argv` with the flags of SHORT written as --config.field=value."""
    result, rest = [], iter(argv)
    for argument in rest:
        match = re.fullmatch(rf"--?({'|'.join(SHORT)})(?:=(.*))?", argument)
        if not match:
            result.append(argument)
            continue
        value = match[2] if match[2] is not None else next(rest, "")
        if match[1] == "benchmarks":
            value = repr(tuple(name.strip() for name in value.split(",") if name.strip()))
        result.append(f"--config.{SHORT[match[1]][0]}={value}")
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
    """Returns the configuration, and the values of the flags in `texts` (name: what it is for).

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
        raise InputError(_flag_error(error)) from error
    if values["help"].value:
        _print_help(usage, texts)
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


def _print_help(usage: str, texts: dict[str, str]) -> None:
    meanings = {"config": CONFIG_FLAG} | texts
    meanings["config.FIELD"] = "any setting of igrpo_jax/config.py, over that of the file"
    print(usage, "", *(f"  --{name:<14}{meaning}" for name, meaning in meanings.items()), sep="\n")


def _tree_of_flag(holder: flags.FlagHolder, file: str | None) -> Any:
    """Returns the ConfigDict of --config. Raises InputError where its file failed, or returned something else."""
    try:
        tree = holder.value
        list(tree)
    except TypeError as error:
        raise InputError(f"--config {file}: get_config() must return a ConfigDict, not {tree!r}") from error
    except OSError as error:  # ml_collections keeps what went wrong in the file for the first use of its result
        raise InputError(f"--config {file}: {_flag_error(error.__cause__ or error)}") from error
    return tree


def _check_overrides(argv: list[str]) -> None:
    """Raises InputError, with the nearest right name, for a field or a file of --config that does not exist."""
    for argument in argv[1:]:
        if match := re.match(r"--?config\.([^=]+)", argument):
            check_field(match[1])
    file = _last_value(argv, "config")
    if file is not None and not Path(file).is_file():
        near = sorted(str(path) for path in Path("configs").glob("*.py"))
        raise InputError(f"--config = {file!r}: no such file" + (f"; there are {', '.join(near)}" if near else ""))


def _last_value(argv: list[str], name: str) -> str | None:
    """Returns what `argv` gives last for a flag, which counts as with every flag; None where it is not given."""
    value = None
    for i, argument in enumerate(argv):
        if match := re.fullmatch(rf"--?{name}(?:=(.*))?", argument):
            value = match[1] if match[1] is not None else next(iter(argv[i + 1 :]), None)
    return value


def _flag_error(error: BaseException) -> str:
    """Returns what is wrong with flags or a config file in one line, with the nearest name of an unknown field."""
    text = one_line(error)
    near = re.search(r"Did you mean \"(\w+)\" instead of \"(\w+)\"", text)
    if near:
        return f"config.{near[2]}: no such field; the nearest is {near[1]}"
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
