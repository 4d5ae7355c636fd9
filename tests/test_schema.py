"""Settings as dataclasses: rules say what they allow, types are checked, and a ConfigDict comes back as it went."""

import copy
import dataclasses
import inspect
import math
from typing import Annotated

import pytest

from igrpo_jax import schema
from igrpo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Inner:
    fraction: Annotated[float, schema.Above(0), schema.AtMost(1)] = 0.5
    name: Annotated[str, schema.Matches("[A-Z]+", "in capitals", secret=True)] = "KEY"


@dataclasses.dataclass(frozen=True)
class Outer:
    count: Annotated[int, schema.AtLeast(1)] = 3
    limit: Annotated[int | None, schema.AtLeast(1)] = None
    mode: Annotated[str | None, schema.Choice(None, "a", "b")] = None
    sizes: Annotated[tuple[int, ...], schema.Each(schema.AtLeast(1), once=True)] = (1, 2)
    free: bool = False
    named: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
    inner: Inner = dataclasses.field(default_factory=Inner)


@pytest.mark.parametrize(
    ("rule", "text", "allowed", "refused"),
    [
        (schema.AtLeast(2), "at least 2", [2, 2.5, math.inf], [1, -math.inf, math.nan]),
        (schema.AtLeast(1, "-1 or more than 0", also=-1), "-1 or more than 0", [-1, 1], [0, -2]),
        (schema.Above(0), "above 0", [0.1], [0, -1, math.nan]),
        (schema.AtMost(1), "at most 1", [1, 0], [1.1, math.nan]),
        (schema.Below(8, "below 2**3"), "below 2**3", [7.9], [8, math.nan]),
        (schema.Between(0, 1), "within 0 and 1", [0, 1], [-0.1, 1.1, math.nan]),
        (schema.Choice("a", 1), "one of a, 1", ["a", 1], ["b", 2]),
        (schema.Each(schema.Choice("a", "b"), once=True), "one of a, b, once", [(), ("a", "b")], [("c",), ("a", "a")]),
        (schema.Each(schema.AtLeast(1)), "at least 1", [(), (1, 1)], [(1, 0)]),
        (schema.HoldsOnce("{x}"), "a text that holds {x} exactly once", ["a {x}"], ["", "{x}{x}"]),
        (
            schema.IsDate(),
            "a day such as 2026-01-31, or empty",
            ["", "2024-02-29"],
            ["2026-02-29", "20260131", "today"],
        ),
        (schema.Matches(r"\w+:\w+", "as a:b"), "as a:b", ["a:b"], ["a", "a:b\n", " a:b"]),
    ],
    ids=lambda value: value.text if isinstance(value, schema.Rule) else "",
)
def test_rules_allow_what_their_text_says(rule, text, allowed, refused):
    assert rule.text == text
    assert [value for value in allowed if not rule.allows(value)] == []
    assert [value for value in refused if rule.allows(value)] == []


def test_a_declaration_gives_type_rules_and_default():
    declared = {setting.name: setting for setting in schema.settings(Outer)}
    assert {name: setting.allowed for name, setting in declared.items()} == {
        "count": "at least 1",
        "limit": "at least 1, or None",
        "mode": "one of None, a, b",
        "sizes": "at least 1, once",
        "free": "",
        "named": "",
        "inner": "",
    }
    assert declared["limit"].hint == int | None and declared["limit"].value_type is int
    assert declared["sizes"].hint == tuple[int, ...] and declared["sizes"].value_type is tuple
    assert declared["count"].default == 3 and declared["inner"].is_section
    assert schema.field_paths(Outer)[-3:] == ["inner", "inner.fraction", "inner.name"]


def test_a_config_dict_comes_back_as_it_went():
    changed = Outer(2, 7, "a", (4,), True, {"x": False, "y": 2.5}, Inner(1.0, "OTHER"))
    for config in (Outer(), changed):
        assert schema.from_config_dict(Outer, schema.to_config_dict(config)) == config
    tree = schema.to_config_dict(Outer())
    tree.named = {"x": "some text"}
    tree.limit = 5  # the type of a field that is None is known
    tree.inner.fraction = 1  # a whole number passes as a float
    read = schema.from_config_dict(Outer, tree)
    assert read.named == {"x": "some text"} and type(read.named) is dict
    assert read.limit == 5 and type(read.inner.fraction) is float
    assert schema.from_config_dict(Outer, tree.to_dict() | {"sizes": [3]}).sizes == (3,)  # a list, as from JSON


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "config.count = 0: must be at least 1"),
        ({"limit": 0}, "config.limit = 0: must be at least 1, or None"),
        ({"mode": "c"}, "config.mode = 'c': must be one of None, a, b"),
        ({"sizes": (1, 0)}, "config.sizes = (1, 0): each must be at least 1, once"),
        ({"sizes": (1, True)}, "config.sizes = (1, True): each entry must be a whole number"),
        ({"sizes": 1}, "config.sizes = 1: must be a tuple, each entry a whole number; write (1,)"),
        ({"count": None}, "config.count = None: must be a whole number"),
        ({"count": True}, "config.count = True: must be a whole number"),
        ({"count": 1.0}, "config.count = 1.0: must be a whole number; write 1"),
        ({"count": 1.5}, "config.count = 1.5: must be a whole number"),
        ({"count": "1"}, "config.count = '1': must be a whole number; write 1 without quotation marks"),
        ({"count": "one"}, "config.count = 'one': must be a whole number"),
        ({"limit": "x"}, "config.limit = 'x': must be a whole number or None"),
        ({"free": 1}, "config.free = 1: must be True or False"),
        ({"inner": 3}, "config.inner = 3: is a group of settings; set its fields one by one"),
        ({"named": "x"}, "config.named = 'x': must be a mapping from names to values, not str"),
        ({"named": {"x": None}}, "config.named.x = None: must be one of bool, int, float, str, not NoneType"),
        ({"named": {"a b": 1}}, "config.named = {'a b': 1}: 'a b' is no name of a variable"),
        ({"cuont": 1}, "config.cuont: no such field; the nearest is config.count"),
        ({"inner": {"fraction": 2.0, "name": "KEY"}}, "config.inner.fraction = 2.0: must be above 0 and at most 1"),
        ({"inner": {"fraction": True, "name": "A"}}, "config.inner.fraction = True: must be a number"),
        ({"inner": {"fraction": 1.0, "name": "secret"}}, "config.inner.name: must be in capitals"),
        (
            {"inner": {"fraction": 1.0, "nam": "KEY"}},
            "config.inner.nam: no such field; the nearest is config.inner.name",
        ),
        (
            {"inner": {"fraction": 1.0}},
            "config.inner.name: missing; start the config file from igrpo_jax.config.default()",
        ),
    ],
)
def test_a_mistake_is_one_line_with_field_value_and_fix(change, message):
    tree = schema.to_config_dict(Outer()).to_dict() | change
    with pytest.raises(InputError) as error:
        schema.from_config_dict(Outer, tree)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("path", "nearest"), [("fraction", "inner.fraction"), ("inner.fractoin", "inner.fraction"), ("limits", "limit")]
)
def test_the_nearest_name(path, nearest):
    with pytest.raises(InputError, match=rf"^config\.{path}: no such field; the nearest is config\.{nearest}$"):
        schema.check_path(Outer, path)
    schema.check_path(Outer, nearest)


def test_a_tree_knows_where_a_field_was_set():
    tree = schema.to_config_dict(Outer())
    assert tree.place("count") is None
    tree.count = 4.5
    here = inspect.currentframe().f_lineno
    tree.update({"inner": {"fraction": 0.25}})
    assert tree.place("count") == (__file__, here - 1) and tree.place("inner.fraction") == (__file__, here + 1)
    assert tree.place("inner.name") is None and tree.place("named.x") is None
    copied = copy.deepcopy(tree)
    assert copied == tree and copied.place("inner.fraction").file == __file__


def test_a_section_that_does_not_exist_names_the_nearest():
    tree = schema.to_config_dict(Outer())
    with pytest.raises(InputError, match=r"^config\.iner: no such field; the nearest is config\.inner$"):
        tree.iner.fraction = 0.5
    with pytest.raises(InputError, match=r"^config\.inner\.nam: no such field; the nearest is config\.inner\.name$"):
        _ = tree.inner.nam
    assert not hasattr(tree, "iner")
