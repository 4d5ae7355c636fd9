"""What every command shares: flags to a checked configuration, and errors to one line and an exit code.

Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted. Nothing here imports jax at
module level: the verifier's workers import the main module again.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from igrpo_jax import config
from igrpo_jax.config import Config, InputError


def parse(argv: list[str]) -> tuple[Config, Path]:
    """The configuration and workdir of a command line `PROGRAM --config FILE [--workdir DIR] [--config.field=value]`.

    Raises:
        InputError: an unknown flag or field, a value of the wrong type, a config file that can't be used.
    """
    _check_overrides(argv)
    values = flags.FlagValues()
    # fmt: off
    holder = config_flags.DEFINE_config_file(
        "config", None, "Python file whose get_config() edits igrpo_jax.config.default()", flag_values=values,
        lock_config=False, sys_argv=argv,
    )
    # fmt: on
    flags.DEFINE_string("workdir", None, "folder of the run; default runs/NAME of the config file", flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values, short_name="h")
    try:
        rest = values(argv)
    except Exception as error:  # the config file is the user's code and may raise anything
        raise InputError(_flag_error(error)) from error
    if values["help"].value:
        print(f"python -m igrpo_jax.main --config FILE [--workdir DIR] [--config.FIELD=VALUE ...]\n{values}")
        raise SystemExit(0)
    if len(rest) > 1:
        raise InputError(f"{rest[1]}: not understood; settings are given as --config.field=value")
    file = _config_file(argv)
    if file is None:
        raise InputError("--config: missing; give a configuration file, for example --config configs/tiny_cpu.py")
    workdir = values["workdir"].value or Path("runs", Path(file).stem)
    try:
        tree = holder.value
        list(tree)
    except TypeError as error:
        raise InputError(f"--config {file}: get_config() must return a ConfigDict, not {tree!r}") from error
    except OSError as error:  # ml_collections keeps what went wrong in the file for the first use of its result
        raise InputError(f"--config {file}: {_flag_error(error.__cause__ or error)}") from error
    return config.freeze(tree), Path(workdir)


def _check_overrides(argv: list[str]) -> None:
    """Names and the file are checked here first, where the nearest right name can be given."""
    for argument in argv[1:]:
        if match := re.match(r"--?config\.([^=]+)", argument):
            config.check_field(match[1])
    file = _config_file(argv)
    if file is not None and not Path(file).is_file():
        near = sorted(str(path) for path in Path("configs").glob("*.py"))
        raise InputError(f"--config = {file!r}: no such file" + (f"; there are {', '.join(near)}" if near else ""))


def _config_file(argv: list[str]) -> str | None:
    file = None
    for at, argument in enumerate(argv):  # the last one counts, as with every flag
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument):
            file = match[1] if match[1] is not None else next(iter(argv[at + 1 :]), None)
    return file


def _flag_error(error: BaseException) -> str:
    """One line of what flags or a config file complained about, with the nearest name where a field is unknown."""
    text = " ".join(str(error).split())
    near = re.search(r"Did you mean \"(\w+)\" instead of \"(\w+)\"", text)
    if near:
        return f"config.{near[2]}: no such field; the nearest is {near[1]}"
    known = isinstance(error, (flags.Error, ValueError))
    return (text if known else f"{type(error).__name__}: {text}")[:300]


def run(command: Callable[[list[str]], None]) -> None:
    """Runs `command(sys.argv)` and ends the process: errors of the user's making are one line, without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        command(sys.argv)
    except InputError as error:
        sys.exit(_say(error, 2))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted; the same command goes on from the last checkpoint, if there is one", 130))
    except Exception as error:
        from igrpo_jax.rewards.reward import VerifierError

        if not isinstance(error, VerifierError):
            raise
        sys.exit(_say(error, 1))


def _say(message: object, code: int) -> int:
    print(f"igrpo_jax: error: {message}", file=sys.stderr, flush=True)
    return code
