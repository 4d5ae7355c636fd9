"""Which devices and processes sample together: the sampler's mesh, and the team of processes that share a part of it.

The devices of the run, in the order of its mesh, are divided into groups of `tensor` neighbours. The devices of a group
hold one copy of the weights together, and run every program at the same time. Where the devices of each group belong to
one process, each process is its own team, and samples without regard to the others. Where a group spans processes,
these form a team, which samples in lockstep. The first process of a team leads: it decides what is run, and tells the
others before it runs it. Teams know nothing of each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding

from igrpo_jax.distributed import abort
from igrpo_jax.distributed.sharding import AXES, owners, slice_of
from igrpo_jax.errors import InputError

_WAIT = 1000  # ms that one request for a message waits


@dataclass
class Team:
    """The processes that sample in lockstep with this one, itself included.

    What the leader tells the others goes through the key-value store of jax.distributed. A collective of the devices
    would wait behind the programs that already run, and the devices would idle after each of them.

    Attributes:
        number: the index of this team among all teams, from 0.
        count: the number of teams.
        processes: indices of its processes, in ascending order; the first one leads.
    """

    number: int = 0
    count: int = 1
    processes: tuple[int, ...] = (0,)
    _next_message: int = field(default=0, init=False)  # its number, from 0

    @property
    def leads(self) -> bool:
        """Whether this process decides what its team samples."""
        return jax.process_index() == self.processes[0]

    def positions(self, count: int) -> range:
        """Returns which of `count` prompts this process samples and scores; a process that does not lead has none."""
        return range(self.number, count, self.count) if self.leads else range(0)

    def send(self, message: bytes) -> None:
        """Sends a message to the other processes of the team; the first process calls this."""
        for process in self.processes[1:]:
            abort.client().key_value_set_bytes(_key(process, self._next_message), message)
        self._next_message += 1

    def messages(self) -> Iterator[bytes]:
        """Yields the messages of the first process as they come; the other processes of the team call this."""
        client = abort.client()
        while True:
            key = _key(jax.process_index(), self._next_message)
            try:
                message = client.blocking_key_value_get_bytes(key, _WAIT)
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                continue  # Python takes signals between two waits
            client.key_value_delete(key)
            self._next_message += 1
            yield message


def _key(process: int, number: int) -> str:
    """Returns the key of a message to `process`."""
    return f"igrpo_jax/team/{process}/{number}"


def team_of(mesh: jax.sharding.Mesh) -> Team:
    """Returns the team of this process on the sampler's `mesh`. Teams are in the order of their first processes."""
    teams: list[set[int]] = []
    for group in owners(mesh.devices).reshape(-1, mesh.shape["tensor"]):
        together = set(group.tolist())
        overlapping = [team for team in teams if team & together]
        teams = [team for team in teams if not team & together] + [together.union(*overlapping)]
    ordered = sorted(tuple(sorted(team)) for team in teams)
    number = next(number for number, team in enumerate(ordered) if jax.process_index() in team)
    return Team(number, len(ordered), ordered[number])


def sampler_mesh(mesh: jax.sharding.Mesh, tensor: int) -> jax.sharding.Mesh:
    """Returns the devices of `mesh` in their order, with groups of `tensor` neighbours on the axis `tensor`.

    The order is the same so that one program can take weights from the one mesh to the other. Where `mesh` has groups
    of this size already, it is returned itself.

    Raises:
        InputError: `tensor` does not divide the number of devices.
    """
    if tensor == mesh.shape["tensor"]:
        return mesh
    if mesh.size % tensor:
        raise InputError(
            f"config.rollout.mesh.tensor = {tensor}: does not divide the {mesh.size} devices; choose a divisor of "
            f"{mesh.size}"
        )
    return _mesh(mesh.devices, tensor)


def tensors(mesh: jax.sharding.Mesh) -> list[int]:
    """Returns the sizes of the axis `tensor` for which each group of a sampler's mesh lies within one slice."""
    sizes = [size for size in range(1, mesh.size + 1) if mesh.size % size == 0]
    numbers = slice_of(mesh.devices).reshape(-1)
    return [size for size in sizes if (np.diff(numbers.reshape(-1, size), axis=1) == 0).all()]


def team_mesh(mesh: jax.sharding.Mesh, team: Team) -> jax.sharding.Mesh:
    """Returns the part of the sampler's `mesh` whose devices belong to `team`; `mesh` itself where all of them do."""
    own = np.isin(owners(mesh.devices), team.processes)
    return mesh if own.all() else _mesh(mesh.devices[own], mesh.shape["tensor"])


def team_view(tree: dict, shardings: dict) -> dict:
    """Returns global arrays as arrays on a team's part of the mesh, without a copy.

    Args:
        tree: a tree of arrays, each of which every group of devices holds completely.
        shardings: a tree of the same structure with the shardings of the result, on the mesh of `team_mesh`.
    """

    def view(x: jax.Array, sharding: NamedSharding) -> jax.Array:
        by_device = {shard.device: shard.data for shard in x.addressable_shards}
        shards = [by_device[device] for device in sharding.mesh.devices.flat if device in by_device]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)

    return jax.tree.map(view, tree, shardings)


def _mesh(devices: np.ndarray, tensor: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(devices.reshape(-1, 1, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))
