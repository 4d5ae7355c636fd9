"""A small configuration of fields of every type, for the tests of igrpo_jax/schema."""

import dataclasses
from typing import Annotated

from igrpo_jax.schema.rules import Above, AtLeast, AtMost, Choice, Each, Matches


@dataclasses.dataclass(frozen=True)
class Inner:
    fraction: Annotated[float, Above(0), AtMost(1)] = 0.5
    name: Annotated[str, Matches("[A-Z]+", "in capitals", secret=True)] = "KEY"


@dataclasses.dataclass(frozen=True)
class Outer:
    count: Annotated[int, AtLeast(1)] = 3
    limit: Annotated[int | None, AtLeast(1)] = None
    mode: Annotated[str | None, Choice(None, "a", "b")] = None
    sizes: Annotated[tuple[int, ...], Each(AtLeast(1), once=True)] = (1, 2)
    free: bool = False
    scale: float = 1.0
    scales: tuple[float, ...] = ()
    named: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
    inner: Inner = dataclasses.field(default_factory=Inner)
