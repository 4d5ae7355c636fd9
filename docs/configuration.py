"""Writes docs/configuration.md, the reference of every setting, from igrpo_jax/config.py.

    python docs/configuration.py

A field's meaning is its comment there: what follows it on its line, and lines of comment under it that go on in lower
case. A comment that begins with a capital letter is a note about the fields after it.
"""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
import typing
from pathlib import Path
from typing import NamedTuple

from igrpo_jax import config

OUT = Path(__file__).with_suffix(".md")
HEAD = """# Configuration reference

Every setting, with its default: the paper's (arXiv 2602.09000, Table S.2) where the paper has one. The text is that of
the comments in [igrpo_jax/config.py](../igrpo_jax/config.py), written here by `python docs/configuration.py`.

A file in [configs/](../configs) edits the defaults, and the command line overrides both:

```bash
python -m igrpo_jax.main --config configs/tiny_cpu.py --config.algorithm.loss_type=dapo --config.mesh.tensor=2
```

A misspelt field is an error that names the nearest right one, and a value that no run can use is an error that names
the field, the value and what to do. On resume only {changeable} may differ.
"""


class Field(NamedTuple):
    meaning: str
    note: str  # about this and the fields after it


def comments() -> dict[str, dict[str, Field]]:
    """By class and field of igrpo_jax/config.py, what its comments say."""
    source = inspect.getsource(config)
    texts, alone = {}, set()  # by line; lines that hold nothing else
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            texts[token.start[0]] = token.string.lstrip("# ").rstrip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {}
            for item in node.body:
                if isinstance(item, ast.AnnAssign):
                    found[node.name][item.target.id] = _field(item, texts, alone)
    return found


def _field(item: ast.AnnAssign, texts: dict[int, str], alone: set[int]) -> Field:
    lines, after = list(range(item.lineno, item.end_lineno + 1)), item.end_lineno + 1
    while after in alone and not texts[after][0].isupper():
        lines.append(after)
        after += 1
    note, before = [], item.lineno - 1
    while before in alone and texts[before][0].isupper():
        note.insert(0, texts[before])
        before -= 1
    return Field(" ".join(texts[line] for line in lines if line in texts), " ".join(note))


def reference() -> str:
    """The text of docs/configuration.md."""
    changeable = ", ".join(f"`{name}`" for name in config.MAY_CHANGE_ON_RESUME)
    found = comments()
    return HEAD.format(changeable=changeable) + "".join(_section(config.Config, "", found))


def _section(cls: type, prefix: str, found: dict[str, dict[str, Field]]) -> list[str]:
    """The fields of a dataclass as a table, then its parts."""
    hints = typing.get_type_hints(cls)
    lines = [f"\n## {prefix.rstrip('.') or 'The run'}\n"]
    if cls.__doc__ and not cls.__doc__.startswith(cls.__name__ + "("):  # which dataclasses write where there is none
        lines.append("\n" + " ".join(cls.__doc__.split()) + "\n")
    lines.append("\n| field | type | default | meaning |\n|---|---|---|---|\n")
    parts = []
    for field in dataclasses.fields(cls):
        hint, (meaning, note) = hints[field.name], found[cls.__name__][field.name]
        if dataclasses.is_dataclass(hint):
            parts += _section(hint, f"{prefix}{field.name}.", found)
            continue
        if note:
            lines.append(f"| | | | *{_cell(note)}* |\n")
        name, kind = f"`{prefix}{field.name}`", getattr(hint, "__name__", str(hint)) if hint in _PLAIN else str(hint)
        lines.append(f"| {name} | {_cell(kind)} | {_default(field.default)} | {_cell(meaning)} |\n")
    return lines + parts


_PLAIN = (int, float, str, bool)


def _default(value: object) -> str:
    return '`""`' if value == "" else f"`{_cell(str(value), code=True)}`"


def _cell(text: str, code: bool = False) -> str:
    """Text that stays in its cell; in code only what would end the cell or the line is changed."""
    text = text.replace("|", "\\|").replace("\n", "\\n" if code else " ")
    return text if code else re.sub(r"<(?=[a-zA-Z/])", r"\\<", text)


if __name__ == "__main__":
    OUT.write_text(reference(), encoding="utf-8")
