"""Flags of benchmarks/rollout.py that would compare rollouts of different work."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
rollout = importlib.import_module("rollout")


def test_peers_are_compared_on_equal_lengths_alone(monkeypatch, capsys):
    """A peer draws --new-tokens for every sample: beside shorter ones its rate would be that of other work."""
    flags = ["rollout.py", "--shape", "qwen2-tiny", "--peers", "generate", "static"]
    monkeypatch.setattr(sys, "argv", flags)
    assert rollout.parse().peers == ["generate", "static"]
    monkeypatch.setattr(sys, "argv", [*flags, "--lengths", "lognormal"])
    with pytest.raises(SystemExit):
        rollout.parse()
    assert "--peers generate static: draw equally many tokens" in capsys.readouterr().err
