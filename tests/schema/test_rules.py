"""Rules allow what their text says."""

import math

import pytest

from igrpo_jax.schema.rules import (
    Above,
    AtLeast,
    AtMost,
    Below,
    Between,
    Choice,
    Each,
    HoldsOnce,
    IsDate,
    Matches,
    Rule,
)


@pytest.mark.parametrize(
    ("rule", "text", "allowed", "refused"),
    [
        (AtLeast(2), "at least 2", [2, 2.5, math.inf], [1, -math.inf, math.nan]),
        (AtLeast(1, "-1 or more than 0", also=-1), "-1 or more than 0", [-1, 1], [0, -2]),
        (Above(0), "above 0", [0.1], [0, -1, math.nan]),
        (AtMost(1), "at most 1", [1, 0], [1.1, math.nan]),
        (Below(8, "below 2**3"), "below 2**3", [7.9], [8, math.nan]),
        (Between(0, 1), "within 0 and 1", [0, 1], [-0.1, 1.1, math.nan]),
        (Choice("a", 1), "one of a, 1", ["a", 1], ["b", 2]),
        (Each(Choice("a", "b"), once=True), "one of a, b, once", [(), ("a", "b")], [("c",), ("a", "a")]),
        (Each(AtLeast(1)), "at least 1", [(), (1, 1)], [(1, 0)]),
        (HoldsOnce("{x}"), "a text that holds {x} exactly once", ["a {x}"], ["", "{x}{x}"]),
        (
            IsDate(),
            "a day such as 2026-01-31, or empty",
            ["", "2024-02-29"],
            ["2026-02-29", "20260131", "today"],
        ),
        (Matches(r"\w+:\w+", "as a:b"), "as a:b", ["a:b"], ["a", "a:b\n", " a:b"]),
    ],
    ids=lambda value: value.text if isinstance(value, Rule) else "",
)
def test_rules_allow_what_their_text_says(rule, text, allowed, refused):
    assert rule.text == text
    assert [value for value in allowed if not rule.allows(value)] == []
    assert [value for value in refused if rule.allows(value)] == []
