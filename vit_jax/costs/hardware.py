"""Data sheets of accelerators: peak FLOP/s, memory, bandwidths.

A JAX device is not always a chip: on TPU v2, v3 and 7x each TensorCore is a device, on v4 and v5p the two cores of a
chip are one device ("megacore") unless the run asks otherwise.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from vit_jax.console import num_cpus


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip by its data sheet. All numbers are for the whole chip; divide by `cores` for a core.

    Attributes:
      name: its usual name.
      device_kinds: `jax.Device.device_kind` of its devices.
      cores: TensorCores of a TPU chip; 1 for a GPU.
      cores_per_device: cores of a JAX device, unless it has its own `num_cores`.
      bf16_flops: peak of dense bfloat16 matrix products, FLOP/s; a multiplication and its addition are 2.
      hbm_bytes: memory. The compiler and the runtime reserve some of it.
      hbm_bandwidth: memory bandwidth, bytes/s.
      interconnect_bandwidth: bytes/s that a chip can send to other chips, over all links (TPU: ICI; GPU: NVLink, or
        PCI Express without it) and in one direction. Data sheets often give the sum of both directions.
      clock: cycles per second of a TPU's core; None for GPUs.
      dcn_bandwidth: bytes/s that a chip can send to chips of another slice, or a GPU to GPUs of another machine, in one
        direction, over the data-centre network; None if unpublished.
    """

    name: str
    device_kinds: tuple[str, ...]
    cores: int
    cores_per_device: int
    bf16_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    interconnect_bandwidth: float
    clock: float | None
    dcn_bandwidth: float | None


def _tpu(
    name: str, kinds: tuple[str, ...], cores: int, megacore: int, tflops: float, gib: int, memory: float, links: float,
    clock: float, network: float | None = None,
) -> Chip:  # fmt: skip
    """A TPU by its data sheet: TFLOP/s, GiB, MHz, and GB/s of the memory, all links, and the network."""
    network = None if network is None else network * 1e9
    return Chip(
        name, kinds, cores, megacore, tflops * 1e12, gib * 2**30, memory * 1e9, links * 1e9, clock * 1e6, network
    )


def _gpu(
    name: str, kind: str, tflops: float, gb: int, memory: float, links: float, network: float | None = None
) -> Chip:
    """A GPU by its data sheet; units as of `_tpu`, but GB."""
    network = None if network is None else network * 1e9
    return Chip(name, (kind,), 1, 1, tflops * 1e12, gb * 10**9, memory * 1e9, links * 1e9, None, network)


# TPUs: https://cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x}. v2, the links of v3, and the clocks of both:
# Jouppi et al. 2020, A domain-specific supercomputer for training deep neural networks. Links and clock of v4: Jouppi
# et al. 2023, TPU v4: an optically reconfigurable supercomputer. The clock of v5e and later is the one, rounded, at
# which the matrix units of a core reach the published peak: four of 128 x 128; for v6e and 7x four times 256 x 256, a
# guess. The network of v5e is 6.4 Tbit/s a pod of 256 chips; that of v5p, v6e and 7x is on the page of tpu7x.
#
# GPUs: NVIDIA's data sheets; for the network those of the DGX (A100: 8 adapters of 200 Gbit/s for 8 GPUs; others: 400
# Gbit/s a GPU). B200 is an eighth of a DGX B200. H100's data sheet prints 1,979 TFLOP/s, for matrices half of which
# is zero. A bridge of NVLink joins only two of H100 PCIe, so its links are PCI Express.
# fmt: off
CHIPS = (
    #    name       device kinds               cores  TFLOP/s GiB memory  links of 1 direction   MHz   network
    _tpu("TPU v2",  ("TPU v2",),                2, 1,    46,   16,  700, 4 * 496 / 8,            700),
    _tpu("TPU v3",  ("TPU v3",),                2, 1,   123,   32,  900, 4 * 656 / 8,            940),
    _tpu("TPU v4",  ("TPU v4",),                2, 2,   275,   32, 1200, 6 * 50,                1050),
    _tpu("TPU v5e", ("TPU v5 lite", "TPU v5e"), 1, 1,   197,   16,  819, 400 / 2,               1500, 25 / 8),
    _tpu("TPU v5p", ("TPU v5", "TPU v5p"),      2, 2,   459,   95, 2765, 4800 / 8,              1750, 50 / 8),
    _tpu("TPU v6e", ("TPU v6 lite", "TPU v6e"), 1, 1,   918,   32, 1638, 800 / 2,               1750, 100 / 8),
    _tpu("TPU7x",   ("TPU7x",),                 2, 1,  2307,  192, 7380, 1200 / 2,              2200, 100 / 8),
    #    name             device kind              TFLOP/s  GB memory  links  network
    _gpu("A100 40GB SXM", "NVIDIA A100-SXM4-40GB",    312,  40, 1555,  600 / 2, 200 / 8),
    _gpu("A100 80GB SXM", "NVIDIA A100-SXM4-80GB",    312,  80, 2039,  600 / 2, 200 / 8),
    _gpu("H100 SXM",      "NVIDIA H100 80GB HBM3",    989,  80, 3350,  900 / 2, 400 / 8),
    _gpu("H100 PCIe",     "NVIDIA H100 PCIe",         756,  80, 2000,  128 / 2),
    _gpu("H200 SXM",      "NVIDIA H200",              989, 141, 4800,  900 / 2, 400 / 8),
    _gpu("B200 SXM",      "NVIDIA B200",             2250, 180, 8000, 1800 / 2, 400 / 8),
)
# fmt: on

TPU_V3 = next(chip for chip in CHIPS if chip.name == "TPU v3")
TPU_V3_CORE_BF16_FLOPS = TPU_V3.bf16_flops / TPU_V3.cores  # the unit of the paper's table 2: TPUv3-core-days


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None for CPUs and unknown chips."""
    return next((chip for chip in CHIPS if device_kind in chip.device_kinds), None)


def cores_of_device(device: Any, chip: Chip) -> int:
    """The number of cores of a JAX device; a megacore has two.

    Args:
      device: a `jax.Device`, also one of a topology description.
      chip: from `find_chip(device.device_kind)`.
    """
    # GPUs have other attributes, and old TPU clients lack this one.
    return int(getattr(device, "num_cores", chip.cores_per_device)) if chip.cores > 1 else 1


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices of a run, all processes together.

    Attributes:
      device_kind: `jax.Device.device_kind`.
      num_devices: number of JAX devices.
      num_cores: TensorCores of TPUs; GPUs; for CPUs the cores that this process may use, times the number of hosts.
      bf16_flops: peak FLOP/s of all devices; None if unknown.
    """

    device_kind: str
    num_devices: int
    num_cores: int
    bf16_flops: float | None


def describe_machine(devices: Sequence[Any]) -> Machine:
    """Adds up the devices of a mesh (`mesh.devices.flat`), which are all of one kind."""
    kind = devices[0].device_kind
    chip = find_chip(kind)
    if chip is not None:
        num_cores = sum(cores_of_device(device, chip) for device in devices)
        return Machine(kind, len(devices), num_cores, chip.bf16_flops * num_cores / chip.cores)
    if devices[0].platform == "cpu":
        num_hosts = len({getattr(device, "slice_index", 0) for device in devices})  # to JAX a CPU host is a slice
        return Machine(kind, len(devices), num_cpus() * num_hosts, None)
    return Machine(kind, len(devices), len(devices), None)
