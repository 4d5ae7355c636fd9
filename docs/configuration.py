"""Writes docs/configuration.md, the reference of every setting, from igrpo_jax/config.py.

    python docs/configuration.py

A field's type, default and allowed values are those of its declaration. Its meaning is the comment above it.
"""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

from igrpo_jax import config
from igrpo_jax.schema import fields

OUT = Path(__file__).with_suffix(".md")
HEAD = """# Configuration reference

Every setting, with its default: the paper's (arXiv 2602.09000, Table S.2) where the paper has one. This page is written
by `python docs/configuration.py` from the declarations and comments in
[igrpo_jax/config.py](../igrpo_jax/config.py).

A file in [configs/](../configs) edits the defaults, and the command line overrides both:

```bash
python -m igrpo_jax.main --config configs/tiny_cpu.py --config.algorithm.loss_type=dapo --config.mesh.tensor=2
```

A misspelt field is an error that names the nearest right one. A value that is not allowed is an error that names the
field, the value and what to do; so is a combination of values that no run can use. Many settings that have no effect
without another, such as `model.lora.targets` without `model.lora.rank`, are named in the table that a run prints first.

A run that is resumed keeps its settings. Only these may change, where the name of a section stands for all its fields:
{changeable}.
"""


def meanings() -> dict[str, dict[str, str]]:
    """Returns by class and field of igrpo_jax/config.py the text of the comment lines right above the field."""
    source = inspect.getsource(config)
    lines = source.splitlines()
    return {
        node.name: {ast.unparse(item.target): _comment_above(lines, item.lineno) for item in _fields(node)}
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def _fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    return [item for item in node.body if isinstance(item, ast.AnnAssign)]


def _comment_above(lines: list[str], number: int) -> str:
    """Returns the comment that ends above line `number`, counted from 1."""
    text = []
    for line in reversed(lines[: number - 1]):
        if not line.lstrip().startswith("#"):
            break
        text.insert(0, line.lstrip("# "))
    return " ".join(text)


def reference() -> str:
    """Returns the text of docs/configuration.md."""
    changeable = ", ".join(f"`{name}`" for name in config.MAY_CHANGE_ON_RESUME)
    return HEAD.format(changeable=changeable) + "".join(_section(config.Config, "", meanings()))


def _section(cls: type, prefix: str, texts: dict[str, dict[str, str]]) -> list[str]:
    """Returns the fields of a dataclass as a table, then the sections in it."""
    lines = [
        f"\n## {prefix.rstrip('.') or 'The run'}\n\n",
        " ".join((cls.__doc__ or "").split()) + "\n\n",
        "| field | type | default | allowed | meaning |\n|---|---|---|---|---|\n",
    ]
    sections = []
    for setting in fields.settings(cls):
        path = prefix + setting.name
        if setting.is_section:
            sections += _section(setting.hint, f"{path}.", texts)
            continue
        allowed = _cell(setting.subject + setting.allowed)
        meaning = _cell(texts[cls.__name__][setting.name])
        lines.append(f"| `{path}` | {_type(setting.hint)} | {_default(setting.default)} | {allowed} | {meaning} |\n")
    return lines + sections


def _type(hint: Any) -> str:
    return _cell(hint.__name__ if hint in (int, float, str, bool) else str(hint))


def _default(value: object) -> str:
    return '`""`' if value == "" else f"`{_cell(str(value), code=True)}`"


def _cell(text: str, code: bool = False) -> str:
    """Returns text that stays in its cell; in code only what would end the cell or the line is changed."""
    text = text.replace("|", "\\|").replace("\n", "\\n" if code else " ")
    return text if code else re.sub(r"<(?=[a-zA-Z/])", r"\\<", text)


if __name__ == "__main__":
    OUT.write_text(reference(), encoding="utf-8")
