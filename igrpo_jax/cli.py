"""What every command shares: flags to a checked configuration, and errors to one line and an exit code.

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


def parse(argv: list[str]) -> tuple[Config, Path]:
    """The configuration and workdir of a command line `PROGRAM --config FILE [--workdir DIR] [--config.field=value]`.

    Raises:
        InputError: an unknown flag or field, a value of the wrong type, a config file that can't be used.
    """
    usage = "python -m igrpo_jax.main --config FILE [--workdir DIR] [--config.FIELD=VALUE ...]"
    texts = {"workdir": "folder of the run; default runs/NAME of the config file"} | CLUSTER
    config, values = parse_config(argv, usage, texts)
    return config, Path(values["workdir"] or Path("runs", Path(_last_value(argv, "config")).stem))


def parse_config(argv: list[str], usage: str, texts: dict[str, str]) -> tuple[Config, dict[str, str | None]]:
    """The configuration of a command line with --config FILE, and the values of the flags `texts` (what they are for).

    Raises:
        InputError: as `parse`.
    """
    config, values = _parse(argv, usage, texts)
    if _last_value(argv, "config") is None:
        raise InputError("--config: missing; give a configuration file, for example --config configs/tiny_cpu.py")
    return config, values


# Flags of a process among several; none of them on Slurm, with Open MPI and on TPU pods, which say it themselves.
CLUSTER = {
    "coordinator": "HOST:PORT of process 0, where several processes meet",
    "processes": "how many there are",
    "process": "number of this one, from 0",
}


def address(argv: list[str]) -> dict[str, Any]:
    """What the flags of CLUSTER say, as jax.distributed.initialize names it; empty without them.

    Raises:
        InputError: one of them is missing or makes no sense.
    """
    values = {name: _last_value(argv, name) for name in CLUSTER}
    if not any(values.values()):
        return {}
    for name, value in values.items():
        if value is None:
            raise InputError(f"--{name}: missing; --coordinator, --processes and --process belong together")
    where = values["coordinator"]
    count, own = (number(name, values[name]) for name in ("processes", "process"))
    if not re.fullmatch(r".+:\d+", where):
        raise InputError(f"--coordinator {where}: must be HOST:PORT, an address of process 0 and a port free there")
    if not own < count:
        raise InputError(f"--process {own}: must be below --processes = {count}; they are counted from 0")
    return {"coordinator_address": where, "num_processes": count, "process_id": own}


# Flags that stand for a field, in the commands that have them: the field, and what the flag is for.
SHORT = {
    "benchmarks": ("evaluation.benchmarks", "names with commas between them"),
    "samples": ("evaluation.samples", "answers to each problem; default: of a benchmark as many as in the paper"),
    "rounds": ("evaluation.rounds", "of draft -> refine, beside the single shot; default 0"),
}


def parse_model(argv: list[str], usage: str, texts: dict[str, str]) -> tuple[Config, dict[str, str | None]]:
    """The configuration of a command about the model that --model names, and the values of `texts` and "model".

    Without --config it is that of the run in --model, or the default one. config.model is the run's own where --model
    is the folder of a run; otherwise config.model.path is --model. The flags of SHORT stand for their fields.

    Args:
        usage: shown by --help.
        texts: further flags and what they are for.

    Raises:
        InputError: as `parse`; a run whose config.json can't be used.
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
        InputError: an unknown flag, a value of the wrong type, or something that is none, where `example` is shown.
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
    """The whole number that a flag of text gives. Raises InputError where it is none."""
    if value is None or value.isdecimal():
        return None if value is None else int(value)
    raise InputError(f"--{flag} {value}: must be a whole number")


def _spelled_out(argv: list[str]) -> list[str]:
    """`argv` with the flags of SHORT as --config.field=value."""
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
    """The ConfigDict of a run's config.json; what it lacks, because it is of an older version, is as by default."""
    tree = default()
    try:
        old = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        tree.update(old)
    except (OSError, ValueError, TypeError, KeyError) as error:
        said = one_line(error)
        raise InputError(f"--model {workdir}: its config.json can't be used ({said}); give another folder") from error
    return tree


def _parse(
    argv: list[str], usage: str, texts: dict[str, str], tree: Any = None
) -> tuple[Config, dict[str, str | None]]:
    """The configuration, and the flags `texts` (with what they are for). `tree` is used where there is no --config."""
    _check_overrides(argv)
    file, values = _last_value(argv, "config"), flags.FlagValues()
    if file is None and tree is not None:
        holder = config_flags.DEFINE_config_dict("config", tree, flag_values=values, lock_config=False, sys_argv=argv)
    else:
        # fmt: off
        holder = config_flags.DEFINE_config_file(
            "config", None, "Python file whose get_config() edits igrpo_jax.config.default()", flag_values=values,
            lock_config=False, sys_argv=argv,
        )
        # fmt: on
    for name, meaning in texts.items():
        flags.DEFINE_string(name, None, meaning, flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values, short_name="h")
    try:
        rest = values(argv)
    except Exception as error:  # the config file is the user's code and may raise anything
        raise InputError(_flag_error(error)) from error
    if values["help"].value:
        meanings = {"config": "Python file whose get_config() edits igrpo_jax.config.default()"} | texts
        meanings["config.FIELD"] = "any setting of igrpo_jax/config.py, over that of the file"
        print(usage, "", *(f"  --{name:<14}{meaning}" for name, meaning in meanings.items()), sep="\n")
        raise SystemExit(0)
    if len(rest) > 1:
        raise InputError(f"{rest[1]}: not understood; settings are given as --config.field=value")
    given = {name: values[name].value for name in texts}
    if file is None and tree is None:
        return Config(), given
    try:
        tree = holder.value
        list(tree)
    except TypeError as error:
        raise InputError(f"--config {file}: get_config() must return a ConfigDict, not {tree!r}") from error
    except OSError as error:  # ml_collections keeps what went wrong in the file for the first use of its result
        raise InputError(f"--config {file}: {_flag_error(error.__cause__ or error)}") from error
    return freeze(tree), given


def _check_overrides(argv: list[str]) -> None:
    """Names and the file are checked here first, where the nearest right name can be given."""
    for argument in argv[1:]:
        if match := re.match(r"--?config\.([^=]+)", argument):
            check_field(match[1])
    file = _last_value(argv, "config")
    if file is not None and not Path(file).is_file():
        near = sorted(str(path) for path in Path("configs").glob("*.py"))
        raise InputError(f"--config = {file!r}: no such file" + (f"; there are {', '.join(near)}" if near else ""))


def _last_value(argv: list[str], name: str) -> str | None:
    value = None
    for at, argument in enumerate(argv):  # the last one counts, as with every flag
        if match := re.fullmatch(rf"--?{name}(?:=(.*))?", argument):
            value = match[1] if match[1] is not None else next(iter(argv[at + 1 :]), None)
    return value


def _flag_error(error: BaseException) -> str:
    """One line of what flags or a config file complained about, with the nearest name where a field is unknown."""
    text = one_line(error)
    near = re.search(r"Did you mean \"(\w+)\" instead of \"(\w+)\"", text)
    if near:
        return f"config.{near[2]}: no such field; the nearest is {near[1]}"
    known = isinstance(error, (flags.Error, ValueError))
    return (text if known else f"{type(error).__name__}: {text}")[:300]


def run(command: Callable[[list[str]], None]) -> None:
    """Runs `command(sys.argv)` and ends the process: what needs no traceback is one line, everything else ends in one.

    What JAX raises is shown whole, then named with the phase it came in and what to change.
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
        of_jax = type(error).__name__ == "JaxRuntimeError"  # jax.errors', which is not imported before it is needed
        _leave(_say(_device_error(str(error)), 1) if of_jax else 1)


def _leave(code: int) -> NoReturn:
    """Ends the process; one of several at once, since JAX's exit handlers wait for the others, who do not come."""
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _device_error(text: str) -> str:
    """One line of what JAX raised: the phase with its shapes, and what to change."""
    phase = watchdog.current() or "no phase of a run"
    said = " ".join(text.partition("\n")[0].split())[:300]
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        return (
            f"JAX failed in {phase}: {said}; if it comes again where a program is compiled, try learner.attention = "
            "xla, or another version of jax"
        )
    smaller = next((what for name, what in watchdog.SMALLER.items() if name in phase), "the sizes of what runs")
    return (
        f"out of device memory in {phase}: lower {smaller}; more devices on mesh.fsdp or mesh.tensor hold smaller "
        f"parts of the weights ({said})"
    )


def _say(message: object, code: int) -> int:
    print(f"igrpo_jax: error: {message}", file=sys.stderr, flush=True)
    return code
