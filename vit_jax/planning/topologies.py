"""Slices of accelerators by the names under which they are rented, and what the compiler calls them.

    find_topology("v3-512")     512 TensorCores, 16 x 16 chips; libtpu: "v3:16x16"
    find_topology("v4-128")     128 TensorCores, 4 x 4 x 4 chips, 64 JAX devices (two cores are one "megacore")
    find_topology("v6e-256")    256 chips of one core; also as "v6e:16x16", by the shape
    find_topology("h100-8")     8 GPUs: by formula, no compiler here

Cloud TPU counts TensorCores in the names of v2, v3, v4 and v5p, and chips in those of v5e and v6e. The slices there are
stand in its documentation, https://cloud.google.com/tpu/docs, on the page of each generation. libtpu 0.0.52 knows all.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from vit_jax.analysis import hardware
from vit_jax.analysis.hardware import Chip
from vit_jax.errors import UserError, unknown_name

# GPUs that NVLink joins in one machine. Beyond them the network is whatever the place has, which no data sheet tells.
LARGEST_GPU_COUNT = 8


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: chips of one kind and how they are connected.

    Attributes:
      name: as it is rented, such as "v3-512"; of a shape that is no standard slice that shape, such as "v4:2x2x16".
      chip: its data sheet.
      shape: chips along each axis of the slice.
      torus: for each axis whether its ends are connected.
      compiler_name: what libtpu calls it; None where no compiler is at hand (GPUs).
      compiler_options: further arguments of `jax.experimental.topologies.get_topology_desc`.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    torus: tuple[bool, ...]
    compiler_name: str | None = None
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def generation(self) -> str:
        """What the names of its slices begin with, such as "v3" or "a100-80gb"."""
        if self.compiler_name is not None:
            return self.compiler_name.partition(":")[0]
        return self.name.removesuffix(f"-{self.num_chips}")

    @property
    def num_chips(self) -> int:
        """Chips of the slice."""
        return math.prod(self.shape)

    @property
    def num_cores(self) -> int:
        """TensorCores of the slice, the unit of the paper's core-days; for GPUs the GPUs."""
        return self.num_chips * self.chip.cores

    @property
    def num_devices(self) -> int:
        """JAX devices of the slice."""
        return self.num_cores // self.chip.cores_per_device

    @property
    def share_of_chip(self) -> float:
        """The share of a chip that a JAX device is."""
        return self.chip.cores_per_device / self.chip.cores

    @property
    def device_name(self) -> str:
        """What a JAX device is here: a core, a chip or a GPU."""
        if self.compiler_name is None:
            return "GPU"
        return "core" if self.share_of_chip < 1 else "chip"

    @property
    def interconnect_bandwidth(self) -> float:
        """Bytes/s that a chip in this slice sends to others, in one direction, over the links that it can use.

        Of a chip's two links along an axis both are of use where the ends are connected or the axis is longer than two
        chips and its inner chips pass data on both ways; a line's bandwidth is that of its ends: one link.
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
      cores_in_name: whether names count TensorCores rather than chips.
      shapes: all slices, the smallest first.
      pod_axis: an axis of so many chips, or of a multiple if there are three axes, is closed to a ring.
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
}
_ALIASES = {"v5litepod": "v5e"}  # in the accelerator types of Cloud TPU's API
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


def normalise(name: str) -> str:
    """A name of a slice or a generation in lower case and without aliases: "v5e-16" for " V5litepod-16"."""
    name = name.strip().lower()
    family = re.split("[-:]", name, maxsplit=1)[0]
    return _ALIASES.get(family, family) + name[len(family) :]


def slices(generation: str) -> list[Topology]:
    """All slices of a generation of TPUs, the smallest first; of GPUs 1, 2, 4 and 8.

    Args:
      generation: "v3", say, or the name of a slice of it; as `find_topology` takes it.

    Raises:
      UserError: there is no such generation.
    """
    generation = normalise(generation)
    family = re.split("[-:]", generation, maxsplit=1)[0]
    if family in _GENERATIONS:
        return [_tpu(family, shape) for shape in _GENERATIONS[family].shapes]
    gpu = next((gpu for gpu in _GPUS if generation == gpu or generation.startswith(f"{gpu}-")), None)
    if gpu:
        return [_gpu(gpu, 2**exponent) for exponent in range(int(math.log2(LARGEST_GPU_COUNT)) + 1)]
    raise unknown_name("generation", generation, [*_GENERATIONS, *_GPUS])


def _gpu(name: str, count: int) -> Topology:
    return Topology(
        name=name if count == 1 else f"{name}-{count}", chip=_chip(_GPUS[name]), shape=(count,), torus=(False,)
    )


def list_topologies() -> list[str]:
    """Names of all slices; GPUs may be followed by how many, as in "h100-8"."""
    return [slice_.name for generation in _GENERATIONS for slice_ in slices(generation)] + list(_GPUS)


def find_topology(name: str) -> Topology:
    """The slice of that name.

    Args:
      name: such as "v3-512", "v5litepod-16", "v3:16x16" (the shape of the slice in chips), "h100" or "h100-8".

    Raises:
      UserError: there is none; the message has the nearest.
    """
    name = normalise(name)
    family, _, rest = name.partition("-")
    if match := re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name):
        generation, shape = match[1], tuple(int(size) for size in match[2].split("x"))
        if generation in _GENERATIONS:
            axes = len(_GENERATIONS[generation].shapes[0])
            if len(shape) != axes or min(shape) < 1:
                example = "x".join(map(str, _GENERATIONS[generation].shapes[-1]))
                raise UserError(
                    f"{name!r}: the chips of a {generation} lie along {axes} axes, as in {generation}:{example}."
                )
            return _tpu(generation, shape)
    if family in _GENERATIONS:
        known = {slice_.name: slice_ for slice_ in slices(family)}
        if name in known:
            return known[name]
        if rest.isdecimal():  # the nearest by size, not by spelling
            nearest = min(known.values(), key=lambda slice_: abs(math.log(max(int(rest), 1) / _count(slice_))))
            raise UserError(f"unknown topology {name!r}. Did you mean {nearest.name!r}? Known: {', '.join(known)}.")
        raise unknown_name("topology", name, known)
    for gpu in _GPUS:
        if name == gpu:
            return _gpu(gpu, 1)
        if name.startswith(f"{gpu}-") and (count := name.removeprefix(f"{gpu}-")).isdecimal():
            if 1 <= int(count) <= LARGEST_GPU_COUNT:
                return _gpu(gpu, int(count))
            raise UserError(
                f"{name!r}: GPUs are planned up to the {LARGEST_GPU_COUNT} of one machine, which NVLink joins; give "
                f"{gpu} or {gpu}-2 to {gpu}-{LARGEST_GPU_COUNT}."
            )
    raise unknown_name("topology", name, list_topologies())


def _count(topology: Topology) -> int:
    return int(topology.name.rpartition("-")[2])
