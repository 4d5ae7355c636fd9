"""The memory of devices, where JAX reports it and where it does not."""

from types import SimpleNamespace

import jax
import pytest

from igrpo_jax.distributed import chips


@pytest.mark.parametrize(
    ("kind", "stats", "gib"),
    [("NVIDIA A100", {"bytes_limit": 30 * chips.GIB}, 30), ("NVIDIA A100", None, 15.75), ("NVIDIA H200", None, 139.8)],
)
def test_a_device_that_is_present(kind, stats, gib):
    client = jax.local_devices()[0].client
    device = SimpleNamespace(platform="gpu", device_kind=kind, client=client, memory_stats=lambda: stats)
    assert chips.usable_bytes(device) == gib * chips.GIB
