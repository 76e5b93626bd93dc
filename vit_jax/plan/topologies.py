"""Slices of accelerators by their rental names, and the compiler's names for them.

    find_topology("v3-512")     512 TensorCores, 16 x 16 chips; libtpu: "v3:16x16"
    find_topology("v4-128")     128 TensorCores, 4 x 4 x 4 chips, 64 JAX devices (two cores are one "megacore")
    find_topology("v6e-256")    256 chips of one core; also as "v6e:16x16", by the shape
    find_topology("h100-8")     8 GPUs, by formula, without a compiler
    find_topology("2xv5e-256")  two slices, joined by the data-centre network like the machines of "4xh100-8"

Cloud TPU counts TensorCores in the names of v2, v3, v4, v5p and TPU7x, and chips in those of v5e and v6e. Its
documentation, https://cloud.google.com/tpu/docs, lists the slices on the page of each generation. libtpu 0.0.52 knows
all of them.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from vit_jax.costs import hardware
from vit_jax.costs.hardware import Chip
from vit_jax.errors import UserError, unknown_name

# GPUs of one machine, joined by NVLink. Several machines are several slices.
LARGEST_GPU_COUNT = 8
LARGEST_SLICE_COUNT = 256
_LONGEST_NAME = 40


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice or several equal ones: chips of one kind and their network.

    Attributes:
      name: the rental name, such as "v3-512"; for other shapes the shape, such as "v4:2x2x16".
      chip: its data sheet.
      shape: chips along each axis of a slice.
      torus: for each axis whether its ends are connected.
      compiler_name: libtpu's name of a slice; None without a compiler (GPUs).
      compiler_options: further arguments of `jax.experimental.topologies.get_topology_desc`.
      num_slices: slices, or machines with GPUs, that the data-centre network joins.
      dcn_bandwidth: bytes/s that a chip can send to other slices, in one direction; None if unknown.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    torus: tuple[bool, ...]
    compiler_name: str | None = None
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_slices: int = 1
    dcn_bandwidth: float | None = None

    @property
    def generation(self) -> str:
        """The first part of its name, such as "v3" or "a100-80gb"."""
        if self.compiler_name is not None:
            return self.compiler_name.partition(":")[0]
        return _split_count(self.name)[1].removesuffix(f"-{math.prod(self.shape)}")

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return self.num_slices * math.prod(self.shape)

    @property
    def num_cores(self) -> int:
        """TensorCores of all slices, the unit of the paper's core-days; for GPUs the GPUs."""
        return self.num_chips * self.chip.cores

    @property
    def num_devices(self) -> int:
        """JAX devices of all slices."""
        return self.num_cores // self.chip.cores_per_device

    @property
    def devices_per_slice(self) -> int:
        """JAX devices of one slice."""
        return self.num_devices // self.num_slices

    @property
    def share_of_chip(self) -> float:
        """A JAX device as a share of a chip."""
        return self.chip.cores_per_device / self.chip.cores

    @property
    def device_name(self) -> str:
        """The kind of a JAX device: "core", "chip" or "GPU"."""
        if self.compiler_name is None:
            return "GPU"
        return "core" if self.share_of_chip < 1 else "chip"

    @property
    def interconnect_bandwidth(self) -> float:
        """Bytes/s that a chip in this slice can send to others, in one direction.

        Along each axis a chip uses two links if the ends are connected, otherwise one: the chips at the ends of a line
        limit its bandwidth.
        """
        if self.compiler_name is None:
            return self.chip.interconnect_bandwidth
        link = self.chip.interconnect_bandwidth / (2 * len(self.shape))
        return link * sum((2 if wraps else 1) for size, wraps in zip(self.shape, self.torus, strict=True) if size > 1)


@dataclasses.dataclass(frozen=True)
class _Generation:
    """Slices of a generation of TPUs.

    Attributes:
      chip: name of the data sheet.
      cores_in_name: whether names count TensorCores instead of chips.
      shapes: all slices, the smallest first.
      pod_axis: length of an axis, in chips, that is closed to a ring; with three axes also its multiples.
      compiler_options: see `Topology`.
    """

    chip: str
    cores_in_name: bool
    shapes: tuple[tuple[int, ...], ...]
    pod_axis: int
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # v5e and v6e
_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16),
          (8, 16, 16), (16, 16, 16))  # fmt: skip

_GENERATIONS = {
    "v2": _Generation("TPU v2", True, ((2, 2), (4, 4), (8, 8), (8, 16), (16, 16)), pod_axis=16),
    "v3": _Generation(
        "TPU v3", True, ((2, 2), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)), pod_axis=32
    ),
    # Without this libtpu makes two devices of a v4 chip; Cloud TPU's JAX has one.
    "v4": _Generation("TPU v4", True, _CUBES[:-1], pod_axis=4, compiler_options={"chip_config_name": "megacore"}),
    "v5e": _Generation("TPU v5e", False, _FLAT, pod_axis=16),
    "v5p": _Generation("TPU v5p", True, _CUBES, pod_axis=4),
    "v6e": _Generation("TPU v6e", False, _FLAT, pod_axis=16),
    "tpu7x": _Generation("TPU7x", True, (*_CUBES, (16, 24, 24)), pod_axis=4),
}
# v5litepod is from the accelerator types of Cloud TPU's API; the others are common names of TPU7x.
_ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x", "ironwood": "tpu7x"}
_GPUS = {
    "a100-40gb": "A100 40GB SXM",
    "a100-80gb": "A100 80GB SXM",
    "h100": "H100 SXM",
    "h200": "H200 SXM",
    "b200": "B200 SXM",
}


def _chip(name: str) -> Chip:
    return next(chip for chip in hardware.CHIPS if chip.name == name)


def _tpu(generation: str, shape: tuple[int, ...]) -> Topology:
    facts = _GENERATIONS[generation]
    chip = _chip(facts.chip)
    torus: tuple[bool, ...]
    if len(shape) == 3:  # cubes of 4 x 4 x 4 are joined by optical switches, into rings
        torus = (all(size % facts.pod_axis == 0 for size in shape),) * 3
    else:
        torus = tuple(size == facts.pod_axis for size in shape)
    size = "x".join(map(str, shape))
    count = math.prod(shape) * (chip.cores if facts.cores_in_name else 1)
    return Topology(
        # A count stands for one shape only.
        name=f"{generation}-{count}" if shape in facts.shapes else f"{generation}:{size}",
        chip=chip,
        shape=shape,
        torus=torus,
        compiler_name=f"{generation}:{size}",
        compiler_options=facts.compiler_options,
    )


def _split_count(name: str) -> tuple[int, str]:
    """The number of slices and the name of one: (2, "v5e-256") for "2xv5e-256"."""
    match = re.fullmatch(r"(\d{1,9})x([^\d].*)", name)
    return (int(match[1]), match[2]) if match else (1, name)


def normalise(name: str) -> str:
    """A name of slices or a generation in lower case and without aliases: "v5e-16" for " 1xV5litepod-16"."""
    count, name = _split_count("".join(name.lower().split()))
    family = re.split("[-:]", name, maxsplit=1)[0]
    return ("" if count == 1 else f"{count}x") + _ALIASES.get(family, family) + name[len(family) :]


def slices(generation: str) -> list[Topology]:
    """All slices of a generation of TPUs, the smallest first; of GPUs 1, 2, 4 and 8.

    Args:
      generation: such as "v3", or the name of a slice of it; "2xv3" doubles each.

    Raises:
      UserError: the generation is unknown.
    """
    count, generation = _split_count(normalise(generation))
    family = re.split("[-:]", generation, maxsplit=1)[0]
    if family in _GENERATIONS:
        return [_several(_tpu(family, shape), count) for shape in _GENERATIONS[family].shapes]
    gpu = next((gpu for gpu in _GPUS if generation == gpu or generation.startswith(f"{gpu}-")), None)
    if gpu:
        sizes = [2**exponent for exponent in range(int(math.log2(LARGEST_GPU_COUNT)) + 1)]
        return [_several(_gpu(gpu, size), count) for size in sizes]
    raise unknown_name("generation", generation, [*_GENERATIONS, *_GPUS])


def _several(topology: Topology, count: int) -> Topology:
    """So many slices, each like the one given."""
    if not 1 <= count <= LARGEST_SLICE_COUNT:
        raise UserError(
            f"'{count}x{topology.name}': give 1 to {LARGEST_SLICE_COUNT} slices, such as 2x{topology.name}."
        )
    name = topology.name if count == 1 else f"{count}x{topology.name}"
    return dataclasses.replace(topology, name=name, num_slices=count, dcn_bandwidth=topology.chip.dcn_bandwidth)


def _gpu(name: str, count: int) -> Topology:
    return Topology(
        name=name if count == 1 else f"{name}-{count}", chip=_chip(_GPUS[name]), shape=(count,), torus=(False,)
    )


def list_topologies() -> list[str]:
    """Names of all slices; GPUs may be followed by how many, as in "h100-8"."""
    return [slice_.name for generation in _GENERATIONS for slice_ in slices(generation)] + list(_GPUS)


def find_topology(name: str) -> Topology:
    """The slice, or the equal slices, of that name.

    Args:
      name: such as "v3-512", "v5litepod-16", "v3:16x16" (the shape of the slice in chips), "h100", "h100-8" or
        "2xv5e-256" (two slices).

    Raises:
      UserError: there is none; the message says what to type instead.
    """
    name = normalise(name)
    if len(name) > _LONGEST_NAME:
        raise UserError(f"unknown topology {name[:_LONGEST_NAME]!r}...: give a name such as v5e-256 or 2xv5e-256.")
    if match := re.fullmatch(r"([^:]+?)[x*](\d{1,9})|(\d{1,9})\*([^\d].*)", name):
        # "v5e-256x2" and "2*v5e-256"
        raise UserError(f"unknown topology {name!r}: several slices are written {match[2] or match[3]}x"
                        f"{match[1] or match[4]}.")  # fmt: skip
    count, name = _split_count(name)
    return _several(_find_slice(name), count)


def _find_slice(name: str) -> Topology:
    """One slice; see `find_topology`."""
    family, _, rest = name.partition("-")
    if match := re.fullmatch(r"(\w+):(\d{1,9}(?:x\d{1,9})+)", name):
        generation, shape = match[1], tuple(int(size) for size in match[2].split("x"))
        if generation in _GENERATIONS:
            largest = _GENERATIONS[generation].shapes[-1]
            example = "x".join(map(str, largest))
            if len(shape) != len(largest) or min(shape) < 1:
                raise UserError(
                    f"{name!r}: a {generation}'s chips lie along {len(largest)} axes, as in {generation}:{example}."
                )
            if math.prod(shape) > math.prod(largest):
                raise UserError(
                    f"{name!r} has {math.prod(shape):,} chips, more than the {math.prod(largest):,} of the largest "
                    f"slice. Give up to {generation}:{example}, or several slices, such as 2x{generation}:{example}."
                )
            return _tpu(generation, shape)
    if family in _GENERATIONS:
        known = {slice_.name: slice_ for slice_ in slices(family)}
        if name in known:
            return known[name]
        if rest.isdecimal():  # suggests the nearest size, not the nearest spelling
            asked, largest_count = int(rest[:9]), _count(list(known.values())[-1])
            nearest = min(known.values(), key=lambda slice_: abs(math.log(max(asked, 1) / _count(slice_))))
            several = ""
            if asked > largest_count and asked % largest_count == 0 and asked // largest_count <= LARGEST_SLICE_COUNT:
                several = f" Or several of them: {asked // largest_count}x{family}-{largest_count}."
            raise UserError(
                f"unknown topology {name!r}. Did you mean {nearest.name!r}?{several} Known: {', '.join(known)}."
            )
        raise unknown_name("topology", name, known)
    for gpu in _GPUS:
        if name == gpu:
            return _gpu(gpu, 1)
        if name.startswith(f"{gpu}-") and (count := name.removeprefix(f"{gpu}-")).isdecimal():
            number = int(count[:9])
            if 1 <= number <= LARGEST_GPU_COUNT:
                return _gpu(gpu, number)
            machines = max(2, -(-number // LARGEST_GPU_COUNT))
            raise UserError(
                f"{name!r}: GPUs are planned up to the {LARGEST_GPU_COUNT} of one machine, which NVLink joins. Give "
                f"{gpu} or {gpu}-2 to {gpu}-{LARGEST_GPU_COUNT}, or several machines, such as "
                f"{min(machines, LARGEST_SLICE_COUNT)}x{gpu}-{LARGEST_GPU_COUNT}."
            )
    raise unknown_name("topology", name, list_topologies())


def _count(topology: Topology) -> int:
    return int(topology.name.rpartition("-")[2])
