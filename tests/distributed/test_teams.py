"""Which processes sample together, what part of a step each has, and which sizes of groups a slice allows."""

import types

import jax
import numpy as np
import pytest

from igrpo_jax.distributed import teams


def mesh_of(processes, tensor, slices=None):
    """A mesh of devices that are not there, by the processes and slices that they belong to."""
    slices = slices or [0] * len(processes)
    devices = [types.SimpleNamespace(process_index=p, slice_index=s) for p, s in zip(processes, slices, strict=True)]
    grid = np.array(devices, object).reshape(-1, 1, tensor)
    return types.SimpleNamespace(devices=grid, size=grid.size, shape={"data": 1, "fsdp": len(grid), "tensor": tensor})


@pytest.mark.parametrize(
    ("processes", "tensor", "expected"),
    [
        ([0, 0, 1, 1, 2, 2, 3, 3], 1, [(0,), (1,), (2,), (3,)]),
        ([0, 0, 1, 1, 2, 2, 3, 3], 2, [(0,), (1,), (2,), (3,)]),
        ([0, 0, 1, 1, 2, 2, 3, 3], 4, [(0, 1), (2, 3)]),
        ([0, 0, 3, 3, 2, 2, 1, 1], 4, [(0, 3), (1, 2)]),  # in the order of the mesh
        ([0, 0, 1, 1, 2, 2, 3, 3], 8, [(0, 1, 2, 3)]),
        ([0, 1, 1, 2, 2, 0, 3, 3], 2, [(0, 1, 2), (3,)]),  # groups that overlap in processes
    ],
)
def test_processes_that_share_a_group_are_a_team(monkeypatch, processes, tensor, expected):
    mesh, positions = mesh_of(processes, tensor), []
    for own in range(4):
        monkeypatch.setattr(jax, "process_index", lambda own=own: own)
        team = teams.team_of(mesh)
        assert team.processes == expected[team.number] and own in team.processes and team.count == len(expected)
        assert team.leads == (own == min(team.processes))
        assert team.leads or not team.positions(7)
        positions += team.positions(7)
    assert sorted(positions) == list(range(7))


def test_a_team_takes_every_nth_prompt(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    assert list(teams.team_of(mesh_of([0, 0, 1, 1, 2, 2, 3, 3], 4)).positions(5)) == [1, 3]


def test_a_group_lies_within_a_slice():
    assert teams.tensors(mesh_of([0, 0, 1, 1], 1)) == [1, 2, 4]
    assert teams.tensors(mesh_of([0, 0, 1, 1], 1, slices=[0, 0, 1, 1])) == [1, 2]


def test_the_others_hear_what_the_first_sends(monkeypatch):
    store = {}

    def take(key, _):
        return store[key]

    client = types.SimpleNamespace(
        key_value_set_bytes=store.__setitem__, blocking_key_value_get_bytes=take, key_value_delete=store.pop
    )
    monkeypatch.setattr(teams.abort, "client", lambda: client)
    first, second, third = (teams.Team(0, 1, (4, 5, 7)) for _ in range(3))
    for message in (b"a", b"bc", b""):
        first.send(message)
    assert len(store) == 6
    for own, team in ((5, second), (7, third)):
        monkeypatch.setattr(jax, "process_index", lambda own=own: own)
        heard = team.messages()
        assert [next(heard) for _ in range(3)] == [b"a", b"bc", b""]
    assert not store
