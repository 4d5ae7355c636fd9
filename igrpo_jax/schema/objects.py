"""Functions and classes of the user's own, which a field names as "module:name"."""

import importlib
from collections.abc import Callable
from typing import Any

from igrpo_jax.errors import InputError


def load(path: str, where: str) -> Callable[..., Any]:
    """Returns what "module:name" names. Python searches for the module in its usual places.

    Args:
        where: the field and its value, with which errors begin.

    Raises:
        InputError: there is no such module or name, or it can't be called.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises during its import
        raise InputError(
            f"{where}: cannot be imported ({type(error).__name__}: {error}); write it as module:{_kind(name)}, the "
            "module in the current folder or installed"
        ) from error
    if not callable(found):
        raise InputError(f"{where}: must be a {_kind(name)}, not {type(found).__name__}")
    return found


def _kind(name: str) -> str:
    """Returns what a name looks like: classes begin with a capital."""
    return "Class" if name[:1].isupper() else "function"
