"""Reads collectives, loops and estimated cycles from the text of a compiled program (optimised HLO).

A program is a set of computations; the first to run is marked ENTRY and calls others, such as the bodies of loops. All
counts are of one run of the program on one device. The body of a loop counts once for each iteration, unlike in the
compiler's own cost analysis, which counts it once.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "collective-permute", "all-to-all")

_BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "bf16": 16, "c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\{\s*$|\{\s*$)")
_COLLECTIVE = re.compile(rf" ({'|'.join(COLLECTIVES)}|ragged-all-to-all)(-start)?\(")
_CALL = re.compile(r" (fusion|call|async-start|custom-call)\(")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCHES = re.compile(r" conditional\(.*(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), "
                       r"false_computation=%?([\w.\-]+))")  # fmt: skip
_TRIP_COUNT = re.compile(r'known_trip_count\\?"?:\s*\{\\?"?n\\?"?:\s*\\?"?(\d+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SEND = re.compile(r' send\(.*_xla_host_transfer_handler_name="xla_megascale_runtime"')
_UNKNOWN = re.compile(r" (?:custom-call|send|recv|infeed|outfeed)\(")
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange of data between devices."""

    kind: str  # one of `COLLECTIVES`
    # Bytes of the whole array on one device: the summands (all-reduce, reduce-scatter), the result (all-gather), or
    # what is sent (the others). Between slices: what one device sends to the same device of the others.
    bytes_by_dtype: tuple[tuple[str, int], ...]
    group_size: int | None  # devices that exchange with each other; None if unknown
    times: int = 1  # executions in a run of the program
    overlapped: bool = False  # whether the devices compute at the same time (asynchronous)
    across_slices: bool = False  # whether it uses the network between slices

    @property
    def num_bytes(self) -> int:
        """Bytes of the array, once."""
        return sum(each for _, each in self.bytes_by_dtype)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program."""

    collectives: tuple[Collective, ...]  # in the order of the text
    # Sum of the compiler's estimates for instructions, in clock cycles, with all iterations of loops. Collectives have
    # no estimate. 0 if the compiler writes none (CPU, GPU).
    cycles: int
    num_loops: int  # that run
    num_unknown_loops: int  # loops with an unknown number of iterations; they count once
    # Custom calls and transfers to the host or other slices, for which XLA's cost analysis may count -1 s.
    num_unknown_operations: int = 0


@dataclasses.dataclass
class _Computation:
    """A part of a program that others call."""

    cycles: int = 0
    collectives: list[tuple[Collective, str | None]] = dataclasses.field(default_factory=list)  # and its channel
    calls: list[tuple[str, bool]] = dataclasses.field(default_factory=list)  # name, whether its cycles count
    loops: list[tuple[str, str, int | None]] = dataclasses.field(default_factory=list)  # condition, body, iterations
    constants: list[int] = dataclasses.field(default_factory=list)
    less_than: bool = False


def parse(text: str) -> Program:
    """Reads the text of a compiled program, `jax.stages.Compiled.as_text()`."""
    computations: dict[str, _Computation] = {}
    current, entry = _Computation(), None
    for line in text.splitlines():
        if line[:1] not in (" ", "}", "") and (match := _COMPUTATION.match(line)):
            current = computations.setdefault(match[2], _Computation())
            entry = match[2] if match[1] else entry
        elif " = " in line:
            _read_instruction(current, line)
    if entry is None:
        return Program((), 0, 0, 0)

    found: dict[str, Collective] = {}
    totals = collections.Counter[str]()

    def visit(name: str, times: int, *, with_cycles: bool, overlapped: bool) -> None:
        computation = computations.get(name)
        if computation is None:
            return
        if with_cycles:
            totals["cycles"] += times * computation.cycles
        for index, (written, channel) in enumerate(computation.collectives):
            # TPUs spread an asynchronous collective over several fusions, which share its channel.
            key = f"channel {channel}" if channel else f"{name} {index}"
            kind = "reduce-scatter" if "all-reduce-scatter" in name else written.kind
            known = found.get(key, dataclasses.replace(written, kind=kind, times=0))
            found[key] = dataclasses.replace(
                known, times=max(known.times, times), overlapped=known.overlapped or overlapped or "async" in name
            )
        for called, counted in computation.calls:
            visit(called, times, with_cycles=with_cycles and counted, overlapped=overlapped or "async" in called)
        for condition, body, trip_count in computation.loops:
            turns = _turns(computations.get(condition), computations) if trip_count is None else trip_count
            totals["loops"] += 1
            totals["unknown_loops"] += turns is None
            visit(body, times * (1 if turns is None else turns), with_cycles=with_cycles, overlapped=overlapped)

    visit(entry, 1, with_cycles=True, overlapped=False)
    return Program(
        collectives=tuple(found.values()),
        cycles=totals["cycles"],
        num_loops=totals["loops"],
        num_unknown_loops=totals["unknown_loops"],
        num_unknown_operations=len(_UNKNOWN.findall(text)),
    )


def _read_instruction(computation: _Computation, line: str) -> None:
    """Adds one line of a computation."""
    if match := _CYCLES.search(line):
        computation.cycles += int(match[1])
    if _SEND.search(line):
        computation.collectives.append((_between_slices(line), None))
    elif match := _COLLECTIVE.search(line):
        channel = _CHANNEL.search(line)
        computation.collectives.append((_collective(line, match), channel[1] if channel else None))
    elif match := _WHILE.search(line):
        trip_count = _TRIP_COUNT.search(line)
        computation.loops.append((match[1], match[2], int(trip_count[1]) if trip_count else None))
    elif match := _CALL.search(line):
        if called := _CALLED.search(line, match.end()):
            # A fusion is estimated as one instruction, at its call.
            computation.calls.append((called[1], match[1] in ("call", "async-start")))
    elif match := _BRANCHES.search(line):
        names = match[1].split(",") if match[1] else [match[2], match[3]]
        computation.calls += [(name.strip().lstrip("%"), True) for name in names]
    if match := re.search(r"= [su]\d+\[\]\S* constant\((\d+)\)", line):
        computation.constants.append(int(match[1]))
    if "direction=LT" in line:
        computation.less_than = True


def _collective(line: str, match: re.Match[str]) -> Collective:
    kind, is_start = match[1].removeprefix("ragged-"), bool(match[2])
    arrays = _ARRAY.findall(re.sub(r"\{[^}]*\}|/\*[^*]*\*/", "", line[line.index(" = ") + 3 : match.start()]))
    if is_start and kind != "all-reduce":
        # The result of a start is (input, output, ...).
        counted = [array for array in arrays if array[1] or array[0] not in ("u32", "s32")]
        arrays = counted[len(counted) // 2 :]
    group_size = _group_size(line)
    times = (group_size or 1) if kind == "reduce-scatter" else 1  # its result is a part of the sum
    by_dtype = collections.Counter[str]()
    for dtype, sizes in arrays:
        by_dtype[dtype] += _num_bytes(dtype, sizes) * times
    return Collective(kind, tuple(sorted(by_dtype.items())), group_size, overlapped=is_start)


def _between_slices(line: str) -> Collective:
    """A transfer to other slices; the result of a send is (the array sent, ...)."""
    transfer = _TRANSFER.search(line)
    kind = transfer[1].lower().replace("_", "-") if transfer else "collective-permute"
    (dtype, sizes), *_ = _ARRAY.findall(line[line.index(" = ") + 3 :])
    return Collective(
        kind if kind in COLLECTIVES else "collective-permute",
        ((dtype, _num_bytes(dtype, sizes)),),
        None,
        across_slices=True,
    )


def _num_bytes(dtype: str, sizes: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype) or (int(digits[0]) if digits else 0)
    return -(-math.prod(int(size) for size in sizes.split(",") if size) * bits // 8)


def _group_size(line: str) -> int | None:
    """Devices in a group of `replica_groups`, in any of its spellings: lists, iota tiles, axes of a mesh."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", match[1]))
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2])  # 'data':(2)4 is a part of an axis
        return math.prod(int(part or sizes.get(axis, 1)) for axis, part in axes)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    if "source_target_pairs=" in line:
        return 2
    return None


def _turns(condition: _Computation | None, computations: dict[str, _Computation]) -> int | None:
    """Iterations of a loop that counts from 0 by 1 while less than a constant; None for other loops."""
    if condition is None:
        return None
    called = [computations[name] for name, _ in condition.calls if name in computations]
    constants = [constant for each in (condition, *called) for constant in each.constants]
    if len(constants) == 1 and any(each.less_than for each in (condition, *called)):
        return constants[0]
    return None


def total_bytes(collectives: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Bytes of a run by kind of collective and dtype, and the number of exchanges as "count".

    Exchanges between slices are separate kinds, such as "all-reduce between slices".
    """
    totals: dict[str, dict[str, int]] = collections.defaultdict(lambda: collections.defaultdict(int))
    for collective in collectives:
        kind = f"{collective.kind} between slices" if collective.across_slices else collective.kind
        for name, number in (("count", 1), *collective.bytes_by_dtype):
            totals[kind][name] += collective.times * number
    return totals
