"""A field has a type, rules, a default and a dotted name; a wrong name gives the nearest one."""

import pytest
from schema_cases import Outer

from igrpo_jax.errors import InputError
from igrpo_jax.schema import fields


def test_a_declaration_gives_type_rules_and_default():
    declared = {setting.name: setting for setting in fields.settings(Outer)}
    assert {name: setting.allowed for name, setting in declared.items()} == {
        "count": "at least 1",
        "limit": "at least 1, or None",
        "mode": "one of None, a, b",
        "sizes": "at least 1, once",
        "free": "",
        "scale": "",
        "scales": "",
        "named": "",
        "inner": "",
    }
    assert declared["limit"].hint == int | None and declared["limit"].value_type is int
    assert declared["sizes"].hint == tuple[int, ...] and declared["sizes"].value_type is tuple
    assert declared["count"].default == 3 and declared["inner"].is_section
    assert fields.field_paths(Outer)[-3:] == ["inner", "inner.fraction", "inner.name"]


@pytest.mark.parametrize(
    ("path", "nearest"), [("fraction", "inner.fraction"), ("inner.fractoin", "inner.fraction"), ("limits", "limit")]
)
def test_the_nearest_name(path, nearest):
    with pytest.raises(InputError, match=rf"^config\.{path}: no such field; the nearest is config\.{nearest}$"):
        fields.check_path(Outer, path)
    fields.check_path(Outer, nearest)
