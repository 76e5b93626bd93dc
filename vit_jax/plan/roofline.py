"""From counts to seconds, days and money: the arithmetic of a plan. Pure functions, with all assumptions named.

The time of a step is estimated twice. *By cycles*: the clock cycles that the compiler writes beside each operation of
the program (`estimated_cycles`), over the chip's clock, plus the time of the collectives that nothing overlaps, which
have no cycles. *By roofline*: the longest of all arithmetic at the peak rate, the least memory traffic at full
bandwidth, and all collectives at full bandwidth. This program cannot be faster, as its temporaries and collectives are
counted; another one for the same step may be. So a time by cycles that is less than the roofline is replaced by it.
Neither estimate knows of input, checkpoints or stragglers.

XLA's own sum, `optimal_seconds`, is not used for any time. It assumes that each operation runs at its peak, and counts
-1 for what it does not know: on TPU v4, v5e and v6e for each kernel that is prefetched in slices, with several slices
for each transfer. Loops multiply that.
"""

import dataclasses
from collections.abc import Iterable

from vit_jax.plan.hlo import Collective
from vit_jax.plan.topologies import Topology

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
    if collective.across_slices:
        return _seconds_between_slices(collective, topology)
    devices = collective.group_size or topology.devices_per_slice
    chips = max(1.0, devices * topology.share_of_chip)
    if chips <= 1 or topology.interconnect_bandwidth == 0:
        return 0.0
    passes = {"all-reduce": 2.0}.get(collective.kind, 1.0)
    num_bytes: float = collective.num_bytes
    if collective.kind in ("all-to-all", "collective-permute"):
        num_bytes /= topology.share_of_chip  # each device of a chip sends its own
    return collective.times * passes * (chips - 1) / chips * num_bytes / topology.interconnect_bandwidth


def _seconds_between_slices(collective: Collective, topology: Topology) -> float:
    """Seconds that an exchange between slices takes, all its turns together, if the network is used to the full.

    Each device exchanges its own part with its like in the other slices; the devices of a chip share the chip's part of
    the network. Of n slices each sends its part 2 (n - 1) / n times to have it summed up everywhere, (n - 1) / n times
    to have the sum scattered, and n - 1 times to have it gathered.
    """
    if topology.dcn_bandwidth is None:
        return 0.0
    slices = topology.num_slices
    passes = {
        "all-reduce": 2 * (slices - 1) / slices,
        "reduce-scatter": (slices - 1) / slices,
        "all-gather": slices - 1,
    }
    num_bytes = collective.num_bytes / topology.share_of_chip
    return collective.times * passes.get(collective.kind, 1.0) * num_bytes / topology.dcn_bandwidth


def interconnect_seconds(collectives: Iterable[Collective], topology: Topology, *, exposed: bool = False) -> float:
    """Seconds of all collectives; `exposed`: only of those that nothing overlaps.

    Where the bandwidth between slices is not known, what goes there is left out.
    """
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


def optimal_seconds(seconds: float | None, num_unknown_operations: int, num_loops: int) -> float | None:
    """XLA's `optimal_seconds` where it means something: without loops, and without operations that it does not know."""
    return seconds if seconds and seconds > 0 and not num_unknown_operations and not num_loops else None


def compiler_seconds(cycles: int, topology: Topology, bound: Roofline) -> tuple[float | None, str]:
    """Seconds of a step's own work, without collectives, and by which estimate.

    Args:
      cycles: that the compiler estimates for all operations, loops counted as often as they turn; 0: it tells none.
      topology: the slice.
      bound: the roofline of the step.

    Returns:
      The seconds and "cycles"; the roofline's and "roofline" if cycles come to less; None and the reason otherwise.
    """
    if topology.chip.clock is None:
        return None, f"the clock of a {topology.chip.name} is not known"
    if cycles <= 0:
        return None, "the compiler's program does not say how many cycles its operations take"
    seconds, least = cycles / topology.chip.clock, max(bound.compute, bound.memory)
    return (seconds, "cycles") if seconds >= least else (least, "roofline")


def days(step_seconds: float, num_steps: int) -> float:
    """Days of all steps, one after the other, with nothing in between."""
    return step_seconds * num_steps / SECONDS_PER_DAY


def straight_line(points: Iterable[tuple[float, float]], value: float) -> float:
    """Where the straight line through the first and the last of points (x, y) reaches a value of y."""
    (x1, y1), *_, (x2, y2) = points
    return x1 + (value - y1) * (x2 - x1) / (y2 - y1)
