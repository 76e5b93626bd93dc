"""Data sheets of accelerators: peak FLOP/s, memory, bandwidths.

A JAX device is not always a chip: on TPU v2, v3 and 7x each TensorCore is a device, on v4 and v5p the two cores of a
chip are one device ("megacore") unless the run asks otherwise.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from vit_jax.console import num_cpus

_GIB = 2**30
_TPU_DOCS = "https://cloud.google.com/tpu/docs/"
_JOUPPI_2020 = "Jouppi et al. 2020, A domain-specific supercomputer for training deep neural networks"
# v5e and later: the clock at which the matrix units of a core reach the published peak; a round number.
_FROM_PEAK = "peak / (2 x multiplications a cycle of a core: {})"
_JOUPPI_2023 = "Jouppi et al. 2023, TPU v4: an optically reconfigurable supercomputer"


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
      source: source of the numbers.
      clock: cycles per second of a TPU's core; None for GPUs.
      dcn_bandwidth: bytes/s that a chip can send to chips of another slice, or a GPU to GPUs of another machine, in one
        direction, over the data-centre network; None if unpublished.
      network_source: source of the clock and of the data-centre network.
    """

    name: str
    device_kinds: tuple[str, ...]
    cores: int
    cores_per_device: int
    bf16_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    interconnect_bandwidth: float
    source: str
    clock: float | None = None
    dcn_bandwidth: float | None = None
    network_source: str = ""


CHIPS = (
    Chip(
        name="TPU v2",
        device_kinds=("TPU v2",),
        cores=2,
        cores_per_device=1,
        bf16_flops=46e12,
        hbm_bytes=16 * _GIB,
        hbm_bandwidth=700e9,
        interconnect_bandwidth=4 * 496e9 / 8,  # links of 496 Gbit/s
        source=_JOUPPI_2020,
        clock=700e6,
        network_source=f"clock: {_JOUPPI_2020}",
    ),
    Chip(
        name="TPU v3",
        device_kinds=("TPU v3",),
        cores=2,
        cores_per_device=1,
        bf16_flops=123e12,
        hbm_bytes=32 * _GIB,
        hbm_bandwidth=900e9,
        interconnect_bandwidth=4 * 656e9 / 8,  # links of 656 Gbit/s
        source=f"{_TPU_DOCS}v3; links: {_JOUPPI_2020}",
        clock=940e6,
        network_source=f"clock: {_JOUPPI_2020}",
    ),
    Chip(
        name="TPU v4",
        device_kinds=("TPU v4",),
        cores=2,
        cores_per_device=2,
        bf16_flops=275e12,
        hbm_bytes=32 * _GIB,
        hbm_bandwidth=1200e9,
        interconnect_bandwidth=6 * 50e9,
        source=f"{_TPU_DOCS}v4; links: {_JOUPPI_2023}",
        clock=1050e6,
        network_source=f"clock: {_JOUPPI_2023}",
    ),
    Chip(
        name="TPU v5e",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        cores=1,
        cores_per_device=1,
        bf16_flops=197e12,
        hbm_bytes=16 * _GIB,
        hbm_bandwidth=819e9,
        interconnect_bandwidth=400e9 / 2,  # both directions: 400 GB/s
        source=f"{_TPU_DOCS}v5e",
        clock=1500e6,
        dcn_bandwidth=25e9 / 8,  # 6.4 Tbit/s a pod of 256 chips
        network_source=f"{_TPU_DOCS}v5e; clock: {_FROM_PEAK.format('four of 128 x 128')}",
    ),
    Chip(
        name="TPU v5p",
        device_kinds=("TPU v5", "TPU v5p"),
        cores=2,
        cores_per_device=2,
        bf16_flops=459e12,
        hbm_bytes=95 * _GIB,
        hbm_bandwidth=2765e9,
        interconnect_bandwidth=4800e9 / 8,
        source=f"{_TPU_DOCS}v5p",
        clock=1750e6,
        dcn_bandwidth=50e9 / 8,
        network_source=f"network: {_TPU_DOCS}tpu7x; clock: {_FROM_PEAK.format('four of 128 x 128')}",
    ),
    Chip(
        name="TPU v6e",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        cores=1,
        cores_per_device=1,
        bf16_flops=918e12,
        hbm_bytes=32 * _GIB,
        hbm_bandwidth=1638e9,
        interconnect_bandwidth=800e9 / 2,  # both directions: 800 GB/s
        source=f"{_TPU_DOCS}v6e",
        clock=1750e6,
        dcn_bandwidth=100e9 / 8,
        network_source=f"network: {_TPU_DOCS}tpu7x; clock: {_FROM_PEAK.format('four times 256 x 256')}, not published",
    ),
    Chip(
        name="TPU7x",
        device_kinds=("TPU7x",),
        cores=2,
        cores_per_device=1,
        bf16_flops=2307e12,
        hbm_bytes=192 * _GIB,
        hbm_bandwidth=7380e9,
        interconnect_bandwidth=1200e9 / 2,  # both directions: 1,200 GB/s
        source=f"{_TPU_DOCS}tpu7x",
        clock=2200e6,
        dcn_bandwidth=100e9 / 8,
        network_source=f"network: {_TPU_DOCS}tpu7x; clock: {_FROM_PEAK.format('four times 256 x 256')}, not published",
    ),
    Chip(
        name="A100 40GB SXM",
        device_kinds=("NVIDIA A100-SXM4-40GB",),
        cores=1,
        cores_per_device=1,
        bf16_flops=312e12,
        hbm_bytes=40_000_000_000,
        hbm_bandwidth=1555e9,
        interconnect_bandwidth=600e9 / 2,
        source="NVIDIA A100 data sheet",
        dcn_bandwidth=200e9 / 8,
        network_source="NVIDIA DGX A100 data sheet: 8 adapters of 200 Gbit/s for 8 GPUs",
    ),
    Chip(
        name="A100 80GB SXM",
        device_kinds=("NVIDIA A100-SXM4-80GB",),
        cores=1,
        cores_per_device=1,
        bf16_flops=312e12,
        hbm_bytes=80_000_000_000,
        hbm_bandwidth=2039e9,
        interconnect_bandwidth=600e9 / 2,
        source="NVIDIA A100 data sheet",
        dcn_bandwidth=200e9 / 8,
        network_source="NVIDIA DGX A100 data sheet: 8 adapters of 200 Gbit/s for 8 GPUs",
    ),
    Chip(
        name="H100 SXM",
        device_kinds=("NVIDIA H100 80GB HBM3",),
        cores=1,
        cores_per_device=1,
        bf16_flops=989e12,  # data sheets print 1,979 for matrices half of which is zero
        hbm_bytes=80_000_000_000,
        hbm_bandwidth=3350e9,
        interconnect_bandwidth=900e9 / 2,
        source="NVIDIA H100 data sheet",
        dcn_bandwidth=400e9 / 8,
        network_source="NVIDIA DGX H100 data sheet: 400 Gbit/s a GPU",
    ),
    Chip(
        name="H100 PCIe",
        device_kinds=("NVIDIA H100 PCIe",),
        cores=1,
        cores_per_device=1,
        bf16_flops=756e12,
        hbm_bytes=80_000_000_000,
        hbm_bandwidth=2000e9,
        interconnect_bandwidth=128e9 / 2,  # a bridge of NVLink joins two of them only
        source="NVIDIA H100 data sheet",
    ),
    Chip(
        name="H200 SXM",
        device_kinds=("NVIDIA H200",),
        cores=1,
        cores_per_device=1,
        bf16_flops=989e12,
        hbm_bytes=141_000_000_000,
        hbm_bandwidth=4800e9,
        interconnect_bandwidth=900e9 / 2,
        source="NVIDIA H200 data sheet",
        dcn_bandwidth=400e9 / 8,
        network_source="NVIDIA DGX H200 data sheet: 400 Gbit/s a GPU",
    ),
    Chip(
        name="B200 SXM",
        device_kinds=("NVIDIA B200",),
        cores=1,
        cores_per_device=1,
        bf16_flops=2250e12,
        hbm_bytes=180_000_000_000,
        hbm_bandwidth=8000e9,
        interconnect_bandwidth=1800e9 / 2,
        source="NVIDIA DGX B200 data sheet, an eighth of it",
        dcn_bandwidth=400e9 / 8,
        network_source="NVIDIA DGX B200 data sheet: 400 Gbit/s a GPU",
    ),
)

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
