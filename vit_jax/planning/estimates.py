"""From counts to seconds, days and money: the arithmetic of a plan. Pure functions, with all assumptions named.

The time of a step is estimated twice. *By the compiler*: what XLA's cost model expects each instruction to take
(`optimal_seconds`, for each the longer of its arithmetic at the peak rate and its memory traffic at full bandwidth),
plus the time of the collectives that nothing overlaps, which that model leaves out. *By roofline*: the longest of all
arithmetic at the peak rate, the least memory traffic at full bandwidth, and all collectives at full bandwidth. This
program cannot be faster, as its temporaries and collectives are counted; another one for the same step may be. Both are
lower bounds of what a device will do; neither knows of input, checkpoints or stragglers.
"""

import dataclasses
from collections.abc import Iterable

from vit_jax.planning.hlo import Collective
from vit_jax.planning.topologies import Topology

SECONDS_PER_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least seconds that this program can take for a step, by what it could be limited by."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The longest of them."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def limit(self) -> str:
        """Which one that is."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def collective_seconds(collective: Collective, topology: Topology) -> float:
    """Seconds that a collective takes, all its turns together, if links are used to the full.

    In a ring, or in several at once, each of n chips sends (n - 1) / n of the array to have it reduced and scattered,
    as much to have it gathered, and both for an all-reduce (Patarasuk and Yuan, 2009). The two cores of a chip do it
    together. Latency is left out.
    """
    devices = collective.group_size or topology.num_devices
    chips = max(1.0, devices * topology.share_of_chip)
    if chips <= 1 or topology.interconnect_bandwidth == 0:
        return 0.0
    passes = {"all-reduce": 2.0}.get(collective.kind, 1.0)
    num_bytes: float = collective.num_bytes
    if collective.kind in ("all-to-all", "collective-permute"):
        num_bytes /= topology.share_of_chip  # each device of a chip sends its own
    return collective.times * passes * (chips - 1) / chips * num_bytes / topology.interconnect_bandwidth


def interconnect_seconds(collectives: Iterable[Collective], topology: Topology, *, exposed: bool = False) -> float:
    """Seconds of all collectives; `exposed`: only of those that nothing overlaps."""
    return sum(
        collective_seconds(collective, topology)
        for collective in collectives
        if not (exposed and collective.overlapped)
    )


def roofline(
    *, flops: float, memory_bytes: float, interconnect: float, num_devices: int, topology: Topology
) -> Roofline:
    """The roofline of a step.

    Args:
      flops: of a step, over all devices.
      memory_bytes: the least that one device reads and writes.
      interconnect: seconds of the collectives.
      num_devices: devices that share the FLOPs.
      topology: what they can do.
    """
    chip, share = topology.chip, topology.share_of_chip
    return Roofline(
        compute=flops / num_devices / (chip.bf16_flops * share),
        memory=memory_bytes / (chip.hbm_bandwidth * share),
        interconnect=interconnect,
    )


def least_traffic(arguments: int, outputs: int, temporaries: int) -> int:
    """The least bytes a step moves: each argument read once, each output written once, what it keeps meanwhile both."""
    return arguments + outputs + 2 * temporaries


def with_loops(optimal_seconds: float, cycles: int, cycles_once: int) -> float:
    """The compiler's estimate of a step with loops, of which its cost analysis counts one turn.

    It is scaled as the cycles grow that the compiler estimates for the single instructions if the bodies of loops are
    counted as often as they turn. Without loops nothing changes.
    """
    return optimal_seconds * cycles / cycles_once if cycles_once else optimal_seconds


def days(step_seconds: float, num_steps: int) -> float:
    """Days of all steps, one after the other, with nothing in between."""
    return step_seconds * num_steps / SECONDS_PER_DAY


def straight_line(points: Iterable[tuple[float, float]], value: float) -> float:
    """Where the straight line through the first and the last of points (x, y) reaches a value of y."""
    (x1, y1), *_, (x2, y2) = points
    return x1 + (value - y1) * (x2 - x1) / (y2 - y1)
