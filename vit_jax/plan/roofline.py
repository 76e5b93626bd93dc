"""The arithmetic of a plan: seconds and days from counts. Pure functions.

The time of a step is estimated twice. *By cycles*: the clock cycles that the compiler writes beside each operation of
the program (`estimated_cycles`), divided by the chip's clock, plus the time of collectives that do not overlap with
computation, which have no cycles. *By roofline*: the longest of all arithmetic at the peak rate, the least memory
traffic at full bandwidth, and all collectives at full bandwidth. This program cannot be faster than the roofline, but
another program for the same step might. If the cycles give less than the roofline, the roofline replaces them. Both
leave out input, checkpoints and stragglers.

XLA's own sum, `optimal_seconds`, is only shown. It assumes that each operation runs at its peak, and counts -1 for an
unknown one: on TPU v4, v5e and v6e for each kernel that is prefetched in slices, with several slices for each transfer.
Loops multiply that.
"""

import dataclasses
from collections.abc import Iterable

from vit_jax.plan.hlo import Collective
from vit_jax.plan.topologies import Topology

SECONDS_PER_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds on the seconds of a step of this program, by each possible limit."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The longest."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def limit(self) -> str:
        """The name of the longest."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def collective_seconds(collective: Collective, topology: Topology) -> float:
    """Seconds of a collective, all its repetitions together, at full bandwidth and without latency.

    In one or several rings each of n chips sends (n - 1) / n of the array to reduce and scatter it, as much to gather
    it, and both for an all-reduce (Patarasuk and Yuan, 2009). The two cores of a chip share its part.

    Between slices, each device exchanges its part with the same device of the other slices; the devices of a chip
    share the chip's network. Each of n slices sends its part 2 (n - 1) / n times for an all-reduce, (n - 1) / n times
    for a reduce-scatter, and n - 1 times for an all-gather.
    """
    kind, num_bytes, share = collective.kind, collective.num_bytes * collective.times, topology.share_of_chip
    if collective.across_slices:
        others = topology.num_slices - 1
        passes = {
            "all-reduce": 2 * others / topology.num_slices,
            "reduce-scatter": others / topology.num_slices,
            "all-gather": others,
        }.get(kind, 1.0)
        return passes * num_bytes / share / topology.dcn_bandwidth if topology.dcn_bandwidth else 0.0
    chips = max(1.0, (collective.group_size or topology.devices_per_slice) * share)
    if chips <= 1 or topology.interconnect_bandwidth == 0:
        return 0.0
    passes = {"all-reduce": 2.0}.get(collective.kind, 1.0)
    if kind in ("all-to-all", "collective-permute"):
        passes /= share  # each device of a chip sends its own
    return passes * (chips - 1) / chips * num_bytes / topology.interconnect_bandwidth


def interconnect_seconds(collectives: Iterable[Collective], topology: Topology, *, exposed: bool = False) -> float:
    """Seconds of all collectives; `exposed`: only of those that do not overlap with computation.

    Leaves out exchanges between slices whose bandwidth is unknown.
    """
    return sum(
        collective_seconds(collective, topology)
        for collective in collectives
        if not (exposed and collective.overlapped)
    )


def roofline(
    *, flops: float, memory_bytes: float, interconnect: float, num_devices: int, topology: Topology
) -> Roofline:
    """The roofline of a step: of `flops` over all devices, the bytes that one moves, and the seconds of collectives."""
    chip, share = topology.chip, topology.share_of_chip
    return Roofline(
        compute=flops / num_devices / (chip.bf16_flops * share),
        memory=memory_bytes / (chip.hbm_bandwidth * share),
        interconnect=interconnect,
    )


def optimal_seconds(seconds: float | None, num_unknown_operations: int, num_loops: int) -> float | None:
    """XLA's `optimal_seconds`; None where loops or unknown operations make it meaningless."""
    return seconds if seconds and seconds > 0 and not num_unknown_operations and not num_loops else None


def compiler_seconds(cycles: int, topology: Topology, bound: Roofline) -> tuple[float | None, str]:
    """Seconds of a step without collectives, from the compiler's cycles for all operations with all turns of loops.

    Returns:
      the seconds and "cycles"; the roofline's and "roofline" if the cycles give less; without an estimate, None and the
      reason.
    """
    if topology.chip.clock is None:
        return None, f"the clock of {topology.chip.name} is unknown"
    if cycles <= 0:
        return None, "the compiler estimated no cycles"
    seconds, least = cycles / topology.chip.clock, max(bound.compute, bound.memory)
    return (seconds, "cycles") if seconds >= least else (least, "roofline")
