"""Refuses a program that the verifier's processes, which import it when they start, would run again."""

import ast
import multiprocessing
import os
import sys
from pathlib import Path
from types import ModuleType

from igrpo_jax.errors import InputError


def check_main() -> None:
    """Checks that workers can import the program that calls this, as each does when it starts; needs no pool.

    Raises:
        InputError: the program is a file that makes this call wherever it is imported, or is not a file.
    """
    main = sys.modules["__main__"]
    file, name = getattr(main, "__file__", None), getattr(getattr(main, "__spec__", None), "name", None)
    is_imported = getattr(multiprocessing.current_process(), "_inheriting", False)  # a worker that starts
    if not is_imported and (file is None or (name or "").rpartition(".")[2] == "__main__"):
        return  # a notebook, python -c or python -m FOLDER: workers import none of them
    if file and not name and not os.path.isfile(file):
        raise InputError(
            f"{file}: is not a file, so the verifier's processes can't import it; run the program from a file"
        )
    if is_imported or not _is_guarded(main):
        raise InputError(
            f"{file or 'the program'}: the verifier's processes import it, and it would call igrpo_jax again in each; "
            'put its calls under `if __name__ == "__main__":`'
        )


def _is_guarded(main: ModuleType) -> bool:
    """Returns whether the statement of the program that is being executed, if one is, tests `__name__`."""
    frame = sys._getframe()
    while frame and not (frame.f_globals is main.__dict__ and frame.f_code.co_name == "<module>"):
        frame = frame.f_back
    if frame is None or os.path.abspath(frame.f_code.co_filename) != os.path.abspath(main.__file__):
        return True
    try:
        statements = ast.parse(Path(main.__file__).read_bytes()).body
    except (OSError, SyntaxError, ValueError):  # it was changed, or is not a Python file
        return True
    here = [part for part in statements if part.lineno <= frame.f_lineno <= part.end_lineno]
    return any(isinstance(node, ast.Name) and node.id == "__name__" for part in here for node in ast.walk(part))
