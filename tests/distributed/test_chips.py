"""The memory of devices, where JAX reports it and where it does not."""

import os
from types import SimpleNamespace

import jax
import pytest

from igrpo_jax.distributed import chips


@pytest.mark.parametrize(
    ("kind", "stats", "gib", "is_known"),
    [
        ("NVIDIA A100", {"bytes_limit": 30 * chips.GIB}, 30, True),
        ("NVIDIA A100", None, 15.75, False),
        ("NVIDIA H200", None, 139.8, True),
        ("NVIDIA H200", {"bytes_limit": 105 * chips.GIB}, 105, True),  # a part is left to others
    ],
)
def test_a_device_that_is_present(monkeypatch, kind, stats, gib, is_known):
    """Of this process or of another one, of whose devices JAX refuses to say anything."""
    own = SimpleNamespace(platform="gpu", device_kind=kind, client=object(), memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [own])
    other = SimpleNamespace(platform="gpu", device_kind=kind, client=own.client)
    assert chips.usable_bytes(own) == chips.usable_bytes(other) == gib * chips.GIB
    assert chips.known_bytes(own) == chips.known_bytes(other) == (gib * chips.GIB if is_known else None)


def test_nothing_bounds_what_a_cpu_samples():
    device = jax.local_devices()[0]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert chips.known_bytes(device) is None
    assert chips.usable_bytes(device) == machine / 2 / len(jax.local_devices())  # its share of half of it
