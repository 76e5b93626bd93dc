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

LARGEST_SLICE_COUNT = 256
_LONGEST_NAME = 40


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice or several equal ones: chips of one kind and their network."""

    name: str  # the rental name, such as "v3-512"; for other shapes the shape, such as "v4:2x2x16"
    chip: Chip  # its data sheet
    shape: tuple[int, ...]  # chips along each axis of a slice
    torus: tuple[bool, ...]  # for each axis whether its ends are connected
    compiler_name: str | None = None  # libtpu's name of a slice; None without a compiler (GPUs)
    # Further arguments of `jax.experimental.topologies.get_topology_desc`.
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_slices: int = 1  # slices, or machines with GPUs, that the data-centre network joins
    dcn_bandwidth: float | None = None  # bytes/s that a chip can send to other slices, in one direction

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
class _Family:
    """Slices of a generation of TPUs, or GPUs of one machine."""

    chip: str  # name of the data sheet
    cores_in_name: bool  # whether names count TensorCores instead of chips
    shapes: tuple[tuple[int, ...], ...]  # all slices, the smallest first
    pod_axis: int  # length of an axis, in chips, that is closed to a ring; with three axes also its multiples
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # see `Topology`
    is_gpu: bool = False


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # v5e and v6e
_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16),
          (8, 16, 16), (16, 16, 16))  # fmt: skip

_FAMILIES = {
    "v2": _Family("TPU v2", True, ((2, 2), (4, 4), (8, 8), (8, 16), (16, 16)), pod_axis=16),
    "v3": _Family("TPU v3", True, ((2, 2), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)), pod_axis=32),
    # Without this libtpu makes two devices of a v4 chip; Cloud TPU's JAX has one.
    "v4": _Family("TPU v4", True, _CUBES[:-1], pod_axis=4, compiler_options={"chip_config_name": "megacore"}),
    "v5e": _Family("TPU v5e", False, _FLAT, pod_axis=16),
    "v5p": _Family("TPU v5p", True, _CUBES, pod_axis=4),
    "v6e": _Family("TPU v6e", False, _FLAT, pod_axis=16),
    "tpu7x": _Family("TPU7x", True, (*_CUBES, (16, 24, 24)), pod_axis=4),
}
# v5litepod is from the accelerator types of Cloud TPU's API; the others are common names of TPU7x.
_ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x", "ironwood": "tpu7x"}
_GPUS = {"a100-40gb": "A100 40GB SXM", "a100-80gb": "A100 80GB SXM"} | {
    name: f"{name.upper()} SXM" for name in ("h100", "h200", "b200")
}
# NVLink joins the GPUs of one machine. Several machines are several slices.
_FAMILIES |= {
    name: _Family(chip, False, tuple((count,) for count in range(1, 9)), pod_axis=0, is_gpu=True)
    for name, chip in _GPUS.items()
}


def _slice(name: str, shape: tuple[int, ...]) -> Topology:
    """A slice of the family of that name."""
    family = _FAMILIES[name]
    chip = next(chip for chip in hardware.CHIPS if chip.name == family.chip)
    torus: tuple[bool, ...]
    if len(shape) == 3:  # cubes of 4 x 4 x 4 are joined by optical switches, into rings
        torus = (all(size % family.pod_axis == 0 for size in shape),) * 3
    else:
        torus = tuple(size == family.pod_axis for size in shape)
    by_shape = f"{name}:{'x'.join(map(str, shape))}"
    count = math.prod(shape) * (chip.cores if family.cores_in_name else 1)
    by_count = name if family.is_gpu and count == 1 else f"{name}-{count}"
    return Topology(
        name=by_count if shape in family.shapes else by_shape,  # each count has only one shape
        chip=chip,
        shape=shape,
        torus=torus,
        compiler_name=None if family.is_gpu else by_shape,
        compiler_options=family.compiler_options,
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

    The generation may be the name of a slice of it; "2xv3" doubles each.

    Raises:
      UserError: the generation is unknown.
    """
    count, generation = _split_count(normalise(generation))
    name = _family_of(generation)
    if name is None:
        raise unknown_name("generation", generation, _FAMILIES)
    shapes = [(1,), (2,), (4,), (8,)] if _FAMILIES[name].is_gpu else _FAMILIES[name].shapes
    return [_several(_slice(name, shape), count) for shape in shapes]


def _family_of(name: str) -> str | None:
    """The family of a slice: "v3" for "v3", "v3-8" and "v3:2x2"."""
    return next((family for family in _FAMILIES if re.fullmatch(rf"{family}([-:].*)?", name)), None)


def _several(topology: Topology, count: int) -> Topology:
    """Several slices like the given one."""
    if not 1 <= count <= LARGEST_SLICE_COUNT:
        raise UserError(
            f"'{count}x{topology.name}': give 1 to {LARGEST_SLICE_COUNT} slices, such as 2x{topology.name}."
        )
    name = topology.name if count == 1 else f"{count}x{topology.name}"
    return dataclasses.replace(topology, name=name, num_slices=count, dcn_bandwidth=topology.chip.dcn_bandwidth)


def list_topologies() -> list[str]:
    """Names of all slices; GPUs may be followed by how many, as in "h100-8"."""
    return [each.name for name, family in _FAMILIES.items() if not family.is_gpu for each in slices(name)] + list(_GPUS)


def find_topology(name: str) -> Topology:
    """Finds the slice, or the equal slices, of a name such as "v3-512", "v3:16x16" (chips), "h100-8" or "2xv5e-256".

    Raises:
      UserError: there is none; the message says what to type instead.
    """
    name = normalise(name)[:_LONGEST_NAME]
    if match := re.fullmatch(r"([^:]+?)[x*](\d{1,9})|(\d{1,9})\*([^\d].*)", name):
        # "v5e-256x2" and "2*v5e-256"
        right = f"{match[2] or match[3]}x{match[1] or match[4]}"
        raise UserError(f"unknown topology {name!r}: several slices are written {right}.")
    count, name = _split_count(name)
    return _several(_find_slice(name), count)


def _find_slice(name: str) -> Topology:
    """One slice; see `find_topology`."""
    family = _family_of(name)
    if family is None:
        raise unknown_name("topology", name, list_topologies())
    size = name.removeprefix(family)
    shapes, largest = _FAMILIES[family].shapes, _FAMILIES[family].shapes[-1]
    if re.fullmatch(r":\d{1,9}(x\d{1,9})+", size) and not _FAMILIES[family].is_gpu:
        shape, example = tuple(map(int, size[1:].split("x"))), f"{family}:{'x'.join(map(str, largest))}"
        if len(shape) != len(largest) or min(shape) < 1:
            raise UserError(f"{name!r}: a {family}'s chips lie along {len(largest)} axes, as in {example}.")
        if math.prod(shape) > math.prod(largest):
            raise UserError(
                f"{name!r} has {math.prod(shape):,} chips, more than the {math.prod(largest):,} of the largest slice. "
                f"Give up to {example}, or several slices, such as 2x{example}."
            )
        return _slice(family, shape)
    known = {each.name: each for each in (_slice(family, shape) for shape in shapes)}
    if name in known:
        return known[name]
    if not size[1:].isdecimal():
        raise unknown_name("topology", name, known)
    is_gpu = _FAMILIES[family].is_gpu
    if is_gpu and size[0] == "-" and (int(size[1:10]),) in shapes:  # "h100-1", "h100-08"
        return _slice(family, (int(size[1:10]),))
    # Suggests the nearest size, not the nearest spelling.
    asked, counts = int(size[1:10]), {int(each.removeprefix(family)[1:] or 1): each for each in known}
    nearest = min(counts, key=lambda count: abs(math.log(max(asked, 1) / count)))
    times, rest = divmod(asked, max(counts))
    several = ""
    if is_gpu and asked > max(counts):
        machines = min(times + bool(rest), LARGEST_SLICE_COUNT)
        several = f" NVLink joins the {max(counts)} GPUs of one machine; for more give machines: {machines}x{family}-8."
    elif times in range(2, LARGEST_SLICE_COUNT + 1) and not rest:
        several = f" Or several of them: {times}x{counts[nearest]}."
    raise UserError(f"unknown topology {name!r}. Did you mean {counts[nearest]!r}?{several} Known: {', '.join(known)}.")
