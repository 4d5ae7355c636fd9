"""The memory of devices, where JAX reports it and where it does not."""

from types import SimpleNamespace

import jax
import pytest

from igrpo_jax.distributed import chips


@pytest.mark.parametrize(
    ("kind", "stats", "gib"),
    [("NVIDIA A100", {"bytes_limit": 30 * chips.GIB}, 30), ("NVIDIA A100", None, 15.75), ("NVIDIA H200", None, 139.8)],
)
def test_a_device_that_is_present(monkeypatch, kind, stats, gib):
    """Of this process or of another one, of whose devices JAX refuses to say anything."""
    own = SimpleNamespace(platform="gpu", device_kind=kind, client=object(), memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [own])
    other = SimpleNamespace(platform="gpu", device_kind=kind, client=own.client)
    assert chips.usable_bytes(own) == chips.usable_bytes(other) == gib * chips.GIB
