"""How a configuration is declared and checked: frozen dataclasses whose fields have rules next to their types.

    seed: Annotated[int, AtLeast(0)] = 0
    max_draft_length: Annotated[int | None, AtLeast(1)] = None
    dtype: Annotated[str, Choice("bfloat16", "float32")] = "bfloat16"

The type of a field is bool, int, float or str, a tuple of one of them, or any of these or None; or a mapping from names
to values of such types; or another dataclass (a section), whose own fields are named with a dot: `model.lora.rank`. A
field that may be None needs no rule for None. igrpo_jax/config.py declares the settings, and its tree is called
`config` in messages. Of this folder only two modules know them: `constraints` has the rules between several, and
`unused` says which have no effect without another.

In order: rules, fields, trees, objects, constraints, unused.
"""
