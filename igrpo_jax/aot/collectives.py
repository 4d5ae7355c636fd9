"""Counts what devices send one another in a compiled program, from the program's text.

Each collective is counted as often as it runs: in the body of a loop as often as the loop runs, where the text gives
that number (a count from 0 to a constant), else once. Of the branches of a conditional the one that receives least is
counted, which for drawing tokens is the one without filters. Bytes are those that one device receives if no byte comes
twice: with n devices and a result of B bytes, an all-gather receives (n - 1) / n B, an all-reduce twice that, and a
reduce-scatter (n - 1) B. What goes between slices, over the data center's network, is a host transfer in the text. It
is counted in the same way, with n slices, under a kind that ends in OVER_DCN.
"""

import collections
import functools
import math
import re
from dataclasses import dataclass

KINDS = ["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"]

OVER_DCN = " over DCN"

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(KINDS)})(-start)?\((.*)$")
_TRANSFER = re.compile(r'^\s*(?:ROOT )?%?\S+ = (.*?) recv\(.*_xla_megascale_transfer_type="(\w+)"')
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply)=%?([\w.-]+)")
_ALL_CALLED = re.compile(r"\bcalled_computations=\{([^}]*)\}")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_BRANCH = re.compile(r"\b(?:true_computation|false_computation)=%?([\w.-]+)")
_NAME = re.compile(r"[\w.-]+")
_TRIPS = re.compile(r"known_trip_count\D*(\d+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_CONSTANT = re.compile(r"^\s*%?(\S+) = [su]32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"^\s*ROOT %?\S+ = pred\[\]\S* compare\(%?\S+, %?(\S+)\), direction=LT")
# On TPUs a reduce-scatter is a fusion with an all-reduce inside.
_SCATTERS = "all-reduce-scatter"


@dataclass
class Traffic:
    """How often a kind of collective runs, and how many bytes it moves."""

    count: float = 0.0
    bytes: float = 0.0  # bytes that one device receives

    def add(self, other: "Traffic", times: float) -> None:
        """Adds `other`, repeated `times` times."""
        self.count += other.count * times
        self.bytes += other.bytes * times


def collectives(text: str, devices: int) -> dict[str, Traffic]:
    """Returns the traffic of each kind of collective in a compiled program, and leaves out kinds that it does not have.

    Args:
        text: the text of the program, from `jax.stages.Compiled.as_text`.
        devices: how many devices it runs on.
    """
    own: dict[str, dict[str, Traffic]] = collections.defaultdict(lambda: collections.defaultdict(Traffic))
    # What a computation calls: one of these branches, this often (a number, or the loop's condition).
    called: dict[str, list[tuple[list[str], float | str]]] = collections.defaultdict(list)
    constants: dict[str, float] = {}
    bounds: dict[str, float] = {}  # trip counts of loops, by condition
    entry, name = "", ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            entry = name if line.startswith("ENTRY") else entry
        elif match := _COLLECTIVE.match(line):
            kind = "reduce-scatter" if name.startswith(_SCATTERS) else match[2]
            size = _group(match[4], devices)
            received = _received(match[2], _bytes(match[1]), size, started=bool(match[3]))
            if size > 1:
                own[name][kind].add(Traffic(1, received / 2 if kind != match[2] else received), 1)
        elif match := _TRANSFER.match(line):
            kind, slices = match[2].lower().replace("_", "-"), _slices(line)
            received = _received(kind, _bytes(_ARRAY.search(match[1])[0]), slices, started=False)
            own[name][kind + OVER_DCN].add(Traffic(1, received), 1)
        elif match := _CONSTANT.match(line):
            constants[match[1]] = float(match[2])
        elif match := _BELOW.match(line):
            bounds[name] = constants.get(match[1], 1.0)
        else:
            trips, condition = _TRIPS.search(line), _CONDITION.search(line)
            times = float(trips[1]) if trips else condition[1] if condition else 1.0
            called[name] += [(choices, times) for choices in _choices(line)]

    @functools.cache
    def count(name: str) -> dict[str, Traffic]:
        total: dict[str, Traffic] = collections.defaultdict(Traffic)
        for kind, traffic in own[name].items():
            total[kind].add(traffic, 1)
        for choices, trips in called[name]:
            least = min(map(count, choices), key=lambda sent: sum(traffic.bytes for traffic in sent.values()))
            for kind, traffic in least.items():
                total[kind].add(traffic, bounds.get(trips, 1.0) if isinstance(trips, str) else trips)
        return dict(total)

    return count(entry)


def _choices(line: str) -> list[list[str]]:
    """Returns the computations that an instruction calls, as lists of alternatives: of each list it calls one."""
    inner = [*_CALLED.findall(line), *_NAME.findall(" ".join(_ALL_CALLED.findall(line)))]
    branches = [*_BRANCH.findall(line), *_NAME.findall(" ".join(_BRANCHES.findall(line)))]
    return [[name] for name in inner] + [branches] * bool(branches)


def _bytes(shape: str) -> int:
    """Returns the bytes of all arrays of an HLO shape, tuples included: "(bf16[2,3]{1,0}, f32[])" has 16."""
    return sum(
        _width(dtype) * math.prod(map(int, filter(None, sizes.split(",")))) for dtype, sizes in _ARRAY.findall(shape)
    )


def _width(dtype: str) -> int:
    """Returns the bytes of one number: its bits are the first number in the name."""
    return 1 if dtype == "pred" else max(int(re.search(r"\d+", dtype)[0]) // 8, 1)


def _group(rest: str, devices: int) -> int:
    """Returns how many devices take part together."""
    if match := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^]]*)\] ?\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return match[1].count(",") + 1
    return 2 if "source_target_pairs=" in rest else devices


def _slices(line: str) -> int:
    """Returns how many slices take part in a transfer, which lists them as "1,2" or as a range such as "1:4"."""
    ranges = [part.split(":") for part in _SLICES.search(line)[1].split(",")]
    return sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)


def _received(kind: str, size: float, group: int, started: bool) -> float:
    """Returns the bytes that a device receives in a collective with a result of `size` bytes.

    The result of the start of an asynchronous collective holds its operands too.
    """
    if started and kind in ("all-gather", "collective-permute", "reduce-scatter"):
        # The size of the result over that of the operands.
        ratio = {"all-gather": group, "collective-permute": 1, "reduce-scatter": 1 / group}[kind]
        size = size * ratio / (ratio + 1)
    part = size * (group - 1) / group
    return {"all-gather": part, "all-to-all": part, "all-reduce": 2 * part, "reduce-scatter": part * group}.get(
        kind, size
    )
