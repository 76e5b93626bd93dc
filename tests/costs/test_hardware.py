from types import SimpleNamespace

import jax
import pytest

from vit_jax.console import num_cpus
from vit_jax.costs import hardware


def peak(device):
    return hardware.describe_machine([device]).bf16_flops


def test_a_tpu_v3_device_is_a_core_half_a_chip():
    device = SimpleNamespace(device_kind="TPU v3", num_cores=1)
    assert peak(device) == hardware.TPU_V3_CORE_BF16_FLOPS == 61.5e12


@pytest.mark.parametrize(("num_cores", "flops"), [(2, 275e12), (1, 137.5e12)])
def test_a_tpu_v4_device_is_as_many_cores_as_it_says(num_cores, flops):
    assert peak(SimpleNamespace(device_kind="TPU v4", num_cores=num_cores)) == flops


def test_a_device_without_a_core_count_has_the_usual_one():
    assert peak(SimpleNamespace(device_kind="TPU v2")) == 23e12
    assert peak(SimpleNamespace(device_kind="TPU v5")) == 459e12


@pytest.mark.parametrize(
    ("name", "products"),  # multiplications a cycle of all cores
    [
        ("TPU v2", 2 * 128**2), ("TPU v3", 4 * 128**2), ("TPU v4", 8 * 128**2), ("TPU v5e", 4 * 128**2),
        ("TPU v5p", 8 * 128**2), ("TPU v6e", 4 * 256**2), ("TPU7x", 8 * 256**2),
    ],
)  # fmt: skip
def test_clocks_and_peaks_agree(name, products):
    chip = next(chip for chip in hardware.CHIPS if chip.name == name)
    assert 2 * products * chip.clock == pytest.approx(chip.bf16_flops, rel=0.003)


def test_a_gpu_is_one_device():
    assert peak(SimpleNamespace(device_kind="NVIDIA H200")) == 989e12


def test_a_cpu_has_no_peak():
    assert peak(jax.local_devices(backend="cpu")[0]) is None


def test_each_kind_of_device_is_one_chip():
    kinds = [kind for chip in hardware.CHIPS for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


def test_a_machine_is_the_sum_of_its_devices():
    pod = [SimpleNamespace(device_kind="TPU v4", num_cores=2)] * 4
    assert hardware.describe_machine(pod) == hardware.Machine("TPU v4", 4, 8, 4 * 275e12)


def test_a_machine_of_an_unknown_kind_has_its_devices_and_no_peak():
    gpus = [SimpleNamespace(device_kind="NVIDIA GeForce RTX 5090", platform="gpu")] * 2
    assert hardware.describe_machine(gpus) == hardware.Machine("NVIDIA GeForce RTX 5090", 2, 2, None)


def test_the_cores_of_a_cpu_are_the_cores_of_the_process():
    machine = hardware.describe_machine(jax.local_devices(backend="cpu"))
    assert machine.num_cores == num_cpus()
    assert machine.bf16_flops is None
    hosts = [SimpleNamespace(device_kind="cpu", platform="cpu", slice_index=each // 2) for each in range(6)]
    assert hardware.describe_machine(hosts).num_cores == 3 * num_cpus()
