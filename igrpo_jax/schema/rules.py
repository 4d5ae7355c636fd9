"""Rules for the value of a field, which stand next to its type."""

import datetime
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """A condition on the value of one field."""

    text: str  # what the value must be, as it follows "must be": "at least 0"
    allows: Callable[[Any], bool]
    on_entries: bool = False  # whether the condition is one on each entry of a tuple
    secret: bool = False  # a value that breaks the rule may be a secret, and is not repeated
    which: Callable[[Any], str] = lambda value: ""  # which entry of a tuple breaks it and how, as the end of an error
    otherwise: str = ""  # what to do where the value is an object of another type than the field's


# Rules are named like types, because they stand next to them. `text` replaces the text derived from the bound.


def AtLeast(low: float, text: str = "", also: float | None = None) -> Rule:
    """Allows numbers from `low` on, and the number `also`. Refuses NaN, as every bound does."""
    return Rule(text or f"at least {low}", lambda value: value >= low or value == also)


def Above(low: float, text: str = "") -> Rule:
    """Allows numbers greater than `low`."""
    return Rule(text or f"above {low}", lambda value: value > low)


def AtMost(high: float) -> Rule:
    """Allows numbers up to `high`."""
    return Rule(f"at most {high}", lambda value: value <= high)


def Below(high: float, text: str = "") -> Rule:
    """Allows numbers less than `high`."""
    return Rule(text or f"below {high}", lambda value: value < high)


def Between(low: float, high: float) -> Rule:
    """Allows numbers from `low` up to `high`, both included."""
    return Rule(f"within {low} and {high}", lambda value: low <= value <= high)


def Choice(*allowed: Any) -> Rule:
    """Allows these values only."""
    return Rule("one of " + ", ".join(map(str, allowed)), lambda value: value in allowed)


def Each(rule: Rule, once: bool = False) -> Rule:
    """Allows tuples whose entries `rule` allows; with `once` no entry may come twice."""

    def allows(entries: tuple) -> bool:
        return not which(entries)

    def which(entries: tuple) -> str:
        wrong = [f"; {entry!r} is not" for entry in entries if not rule.allows(entry)]
        twice = [f"; {entry!r} comes more than once" for entry in entries if once and entries.count(entry) > 1]
        return "".join([*wrong, *twice][:1])

    return Rule(rule.text + ", once" * once, allows, on_entries=True, which=which, otherwise=rule.otherwise)


def HoldsOnce(part: str) -> Rule:
    """Allows texts in which `part` occurs exactly once."""
    return Rule(f"a text that holds {part} exactly once", lambda value: value.count(part) == 1)


def Matches(pattern: str, text: str, secret: bool = False, otherwise: str = "") -> Rule:
    """Allows texts that match the regular expression from end to end."""
    return Rule(text, lambda value: re.fullmatch(pattern, value) is not None, secret=secret, otherwise=otherwise)


def Otherwise(fix: str) -> Rule:
    """Allows every value of the field's type, and says what to do with an object of another."""
    return Rule("", lambda value: True, otherwise=fix)


def IsDate() -> Rule:
    """Allows days, written as 2026-01-31, and the empty text."""

    def allows(value: str) -> bool:
        try:
            return not value or datetime.date.fromisoformat(value).isoformat() == value
        except ValueError:
            return False

    return Rule("a day such as 2026-01-31, or empty", allows)
