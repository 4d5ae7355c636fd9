"""The settings of runs as text: which a run has, which of them are not the default, and which differ between runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from igrpo_jax.config import default, freeze, to_dict
from igrpo_jax.report.runs import RecordedRun

MISSING = "not there"


@dataclass(frozen=True)
class Setting:
    """A setting of a run with its default, as text."""

    name: str  # dotted, as in docs/configuration.md
    value: str
    default: str

    @property
    def changed(self) -> bool:
        return self.value != self.default


def of(run: RecordedRun) -> list[Setting]:
    """Returns all settings of a run, first those that differ from the defaults of this version."""
    defaults = flat(to_dict(freeze(default())))
    settings = [Setting(name, value, defaults.get(name, MISSING)) for name, value in flat(run.config).items()]
    return sorted(settings, key=lambda setting: not setting.changed)


def differing(runs: Sequence[RecordedRun]) -> dict[str, list[str]]:
    """Returns by name the values of the settings that are not the same in all of these runs, a value for each run."""
    by_run = [flat(run.config) for run in runs]
    names = dict.fromkeys(name for values in by_run for name in values)
    rows = {name: [values.get(name, MISSING) for values in by_run] for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns the values of a nested configuration by dotted names, in JSON."""
    values: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = json.dumps(value, ensure_ascii=False)
    return values
