"""What all commands share: turning flags into a checked configuration, and errors into one line and an exit code.

Exit codes: 0 done, 1 the run failed, 2 bad input, 3 does not fit (aot), 75 preempted (the same command goes on), 130
interrupted. Nothing here imports jax at module level: the verifier's workers import the main module again.
"""

import contextlib
import difflib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from igrpo_jax.config import Config, check_field
from igrpo_jax.distributed import preemption, watchdog
from igrpo_jax.errors import InputError, RunError, one_line
from igrpo_jax.loading import load_config, value_of_text
from igrpo_jax.schema.fields import field_paths, paths_named
from igrpo_jax.storage.addresses import path_of

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
    workdir = values["workdir"] or Path("runs", Path(_last_value(argv, "config")).stem)
    return config, path_of(f"--workdir {workdir}", workdir)


def parse_config(argv: list[str], usage: str, texts: dict[str, str]) -> tuple[Config, dict[str, str | None]]:
    """Returns the configuration of a command line that needs --config FILE, and the values of the flags in `texts`.

    Args:
        usage: shown by --help.
        texts: further flags, and what each is for.

    Raises:
        InputError: as `parse`.
    """
    values, settings = _parse(argv, usage, texts)
    if values["config"] is None:
        examples = sorted(map(str, Path("configs").glob("*.py")))
        example = "configs/tiny_cpu.py" if "configs/tiny_cpu.py" in examples else next(iter(examples), "my_config.py")
        raise InputError(f"--config: missing; name the configuration file, for example --config {example}")
    return load_config(values["config"], settings), values


CONFIG_FLAG = "Python file whose get_config() returns igrpo_jax.config.default(), with its own settings"

# Flags of a process among several. Slurm, Open MPI and TPU pods need none of them: JAX reads these values from them.
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
    texts = {"model": "the model: folder of a run, Hugging Face directory or hub id"} | texts | CLUSTER
    values, settings = _parse(argv, usage, texts)
    return load_config(values["config"], settings, values["model"] or ""), values


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
        # absl appends a note to the text of a flag that may be repeated.
        _print_help(text.strip(), {name: values[name].help.partition(";\n")[0] for name in values if len(name) > 1})
        raise SystemExit(0)
    if len(rest) > 1:
        raise InputError(f"{rest[1]}: not understood; settings are given as {example}")
    _refuse_empty({name: values[name].value for name in values})


def number(flag: str, value: str | None, least: int = 0) -> int | None:
    """Returns the value of a flag as an integer, None where it is not given.

    Raises:
        InputError: it is no integer, or below `least`.
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


def _parse(argv: list[str], usage: str, texts: dict[str, str]) -> tuple[dict[str, str | None], dict[str, Any]]:
    """Returns the values of --config and of the flags in `texts`, and those of --config.FIELD by the field.

    Args:
        texts: the purpose of each flag by its name.
    """
    argv, settings = _settings(argv)
    values = flags.FlagValues()
    for name, meaning in {"config": CONFIG_FLAG, **texts}.items():
        flags.DEFINE_string(name, None, meaning, flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values, short_name="h")
    try:
        rest = values(argv)
    except flags.Error as error:
        raise InputError(_flag_error(error, values)) from error
    if values["help"].value:
        field = {"config.FIELD": "any setting of igrpo_jax/config.py; it replaces the one of the file"}
        _print_help(usage, {"config": CONFIG_FLAG} | texts | field)
        raise SystemExit(0)
    given = {name: values[name].value for name in texts}
    if len(rest) > 1:
        raise InputError(f"{rest[1]}: not understood; {_meant(rest[1], given)}")
    _refuse_empty(given | {"config": values["config"].value})
    file = values["config"].value and os.path.expanduser(values["config"].value)
    return {"config": file} | given, settings


def _refuse_empty(given: Mapping[str, Any]) -> None:
    """Raises InputError where a flag has an empty value, for which a default would be taken in silence."""
    for name, value in given.items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise InputError(f'--{name} "": is empty, as a variable of the shell that is not set; give it a value')


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
        text = next(rest, None) if text is None else text
        if text is None or text.startswith("--"):
            raise InputError(f"--config.{path}: has no value; give it as --config.{path}=VALUE")
        settings[path] = value_of_text(path, text)
    return others, settings


def _meant(argument: str, given: Mapping[str, str | None]) -> str:
    """Returns what was probably meant by an argument that is no flag, in a command with these flags and values."""
    first = (given.get("compare") or "").rstrip(",")
    if first and "," not in first:
        return f"two evaluations are given as --compare {first},{argument.lstrip(',')}"
    if argument.endswith(".py"):
        return f"a configuration file is given as --config {argument}"
    name, equals, value = argument.partition("=")
    if equals and (paths := paths_named(Config, name)):
        return f"did you mean --config.{paths[0]}={value}"
    if "prompt" in given:
        return f'a question is given as --prompt "{argument}"'
    return "settings are given as --config.field=value"


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


# What absl says of a value, and what the value must be instead.
_KINDS = {"literal for int": "a whole number", "Non-boolean": "True or False"}


def _flag_error(error: Exception, values: flags.FlagValues) -> str:
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
    """Returns the error for a flag that is none of `known`: the setting that has this name, or the nearest flag."""
    settings = field_paths(Config) if "config" in known else []
    named = name.replace("-", "_")
    if "workdir" in known and (named == "out" or (named == "model" and not settings)):
        return f"--{name}: no such flag; did you mean --workdir"
    if paths := [path for path in settings if path == named or path.endswith(f".{named}")]:
        meant = " or ".join(f"--config.{path}" for path in paths)
        return f"--{name}: no such flag; did you mean {meant}"
    flag_of = {path.rpartition(".")[2]: f"--config.{path}" for path in settings} | {flag: f"--{flag}" for flag in known}
    if near := difflib.get_close_matches(named, flag_of, n=1, cutoff=0.7):
        return f"--{name}: no such flag; the nearest is {flag_of[near[0]]}"
    others = [f"--{flag}" for flag in known if flag not in ("help", "h")]
    return f"--{name}: no such flag; the command has {', '.join(others)}" + " and --config.FIELD" * bool(settings)


def run(command: Callable[[list[str]], None]) -> None:
    """Runs `command(sys.argv)`, and ends the process with an exit code where it fails.

    Errors that need no traceback are printed as one line. All others are printed with their traceback; below that of an
    error of JAX, one line names the phase in which it occurred and what to change.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.unraisablehook = _not_raised
    try:
        command(sys.argv)
        if sys.stdout:  # None where the command was started with a stdout that is closed
            sys.stdout.flush()
    except BrokenPipeError:
        # Else Python would try again at exit to write what is left, and report another error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(_say(f"stdout was closed by the command that it is piped into; {GOES_ON}", 1))
    except InputError as error:
        _leave(_say(error, 2))
    except RunError as error:
        _leave(_say(error, 1))
    except preemption.Preempted as error:
        _leave(_say(f"{error}; the same command goes on from there", preemption.EXIT_CODE))
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends exit handlers that wait
        # A run has noted what it has saved, and where.
        code = _say(f"interrupted; {'; '.join(getattr(error, '__notes__', [])) or GOES_ON}", 130)
        if isinstance(error.__context__, KeyboardInterrupt):  # this is the second, during the clean-up of the first
            os._exit(code)
        _leave(code)
    except Exception as error:
        traceback.print_exc()
        # By name: jax.errors is not imported before a command needs it.
        is_of_jax = type(error).__name__ == "JaxRuntimeError"
        _leave(_say(_device_error(str(error)), 1) if is_of_jax else 1)


GOES_ON = "the same command goes on from what was saved, if something was"


def _not_raised(unraisable: Any) -> None:
    """Repeats a Ctrl-C that came where Python drops every exception, and reports other such errors as Python does.

    Such places are destructors and callbacks of the garbage collector; jax has one of the latter.
    """
    if unraisable.exc_type is KeyboardInterrupt:
        # Not sooner: a signal between Python's last look at signals and a system call that waits stops nothing before
        # that call ends, and a busy machine may hold the thread just there.
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


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
    with contextlib.suppress(BrokenPipeError):  # stderr may go into the pipe that is closed
        print(f"igrpo_jax: error: {message}", file=sys.stderr, flush=True)
    return code
