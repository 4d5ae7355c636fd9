"""Types are checked, a ConfigDict comes back as it went, and it knows where its fields were set."""

import copy
import inspect
import math

import pytest
from schema_cases import Inner, Outer

from igrpo_jax.errors import InputError
from igrpo_jax.schema.trees import from_config_dict, to_config_dict


def test_a_config_dict_comes_back_as_it_went():
    changed = Outer(2, 7, "a", (4,), True, 0.5, (1.5,), {"x": False, "y": 2.5}, Inner(1.0, "OTHER"))
    for config in (Outer(), changed):
        assert from_config_dict(Outer, to_config_dict(config)) == config
    tree = to_config_dict(Outer())
    tree.named = {"x": "some text"}
    tree.limit = 5  # the type of a field that is None is known
    tree.inner.fraction, tree.scales = 1, (1, 0.5)  # a whole number passes as a float
    read = from_config_dict(Outer, tree)
    assert read.named == {"x": "some text"} and type(read.named) is dict
    assert read.limit == 5 and type(read.inner.fraction) is float
    assert from_config_dict(Outer, tree.to_dict() | {"sizes": [3]}).sizes == (3,)  # a list, as from JSON


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "config.count = 0: must be at least 1"),
        ({"limit": 0}, "config.limit = 0: must be at least 1, or None"),
        ({"mode": "c"}, "config.mode = 'c': must be one of None, a, b"),
        ({"sizes": (1, 0)}, "config.sizes = (1, 0): each must be at least 1, once; 0 is not"),
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
        ({"named": {"a b": 1}}, "config.named = {'a b': 1}: 'a b' is not the name of a variable"),
        ({"cuont": 1}, "config.cuont: no such field; the nearest is config.count"),
        ({"inner": {"fraction": 2.0, "name": "KEY"}}, "config.inner.fraction = 2.0: must be above 0 and at most 1"),
        ({"scale": math.inf}, "config.scale = inf: must be a finite number"),
        ({"scales": (1.0, math.nan)}, "config.scales = (1.0, nan): each must be a finite number"),
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
    tree = to_config_dict(Outer()).to_dict() | change
    with pytest.raises(InputError) as error:
        from_config_dict(Outer, tree)
    assert str(error.value) == message


def test_a_tree_knows_where_a_field_was_set():
    tree = to_config_dict(Outer())
    assert tree.place("count") is None
    tree.count = 4.5
    here = inspect.currentframe().f_lineno
    tree.update({"inner": {"fraction": 0.25}})
    assert tree.place("count") == (__file__, here - 1) and tree.place("inner.fraction") == (__file__, here + 1)
    assert tree.place("inner.name") is None and tree.place("named.x") is None
    copied = copy.deepcopy(tree)
    assert copied == tree and copied.place("inner.fraction").file == __file__


def test_a_section_that_does_not_exist_names_the_nearest():
    tree = to_config_dict(Outer())
    with pytest.raises(InputError, match=r"^config\.iner: no such field; the nearest is config\.inner$"):
        tree.iner.fraction = 0.5
    with pytest.raises(InputError, match=r"^config\.inner\.nam: no such field; the nearest is config\.inner\.name$"):
        _ = tree.inner.nam
    assert not hasattr(tree, "iner")
