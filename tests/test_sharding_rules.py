import dataclasses

import jax
import numpy as np
import pytest

from vit_jax import sharding
from vit_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("eight_devices")


def test_batches_are_split_over_the_devices_in_order():
    mesh = sharding.make_mesh()
    batch = sharding.global_batch({"x": np.arange(16)}, sharding.batch_sharding(mesh))
    assert [shard.data.tolist() for shard in batch["x"].addressable_shards] == [[2 * i, 2 * i + 1] for i in range(8)]


@pytest.mark.parametrize(
    ("batch_size", "accumulation_steps", "message"),
    [
        (12, 1, r"batch_size 12 is not divisible by 8 .*such as 16"),
        (16, 4, r"not divisible by 32 \(8 devices x 4 accumulation"),
        (0, 1, "batch_size 0"),
        (16, 0, "accumulation_steps must be at least 1"),
    ],
)
def test_batch_that_devices_and_accumulation_do_not_split_is_refused(batch_size, accumulation_steps, message):
    with pytest.raises(UserError, match=message):
        sharding.check_batch_size(batch_size, sharding.make_mesh(), accumulation_steps)


def test_batch_that_fits_is_accepted():
    sharding.check_batch_size(64, sharding.make_mesh(), 4)
    sharding.check_batch_size(3, sharding.make_mesh(jax.devices()[:1]))


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh needs to know of a device."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def slices(*sizes):
    """Devices of slices of these sizes, in no order."""
    devices = [Device(100 * number + each, number) for number, size in enumerate(sizes) for each in range(size)]
    return sorted(devices, key=lambda device: (device.id % 100, -device.id))


@pytest.mark.parametrize(
    ("sizes", "mesh", "shape"),
    [
        ((4, 4), {}, (8, 1)),
        ((4, 4), {"model": 2}, (4, 2)),
        ((4, 4), {"data": 2, "model": -1}, (2, 4)),
        ((2, 2, 2), {"model": 2}, (3, 2)),
        ((6, 6, 6), {"model": 3}, (6, 3)),
        ((1, 1), {}, (2, 1)),
        ((8,), {"model": 4}, (2, 4)),
    ],
)
def test_slices_follow_each_other_along_data_and_model_stays_inside_one(sizes, mesh, shape):
    grid = sharding.make_mesh(slices(*sizes), **mesh).devices
    assert grid.shape == shape
    numbers = np.vectorize(lambda device: device.slice_index)(grid)
    assert numbers.flatten().tolist() == [number for number, size in enumerate(sizes) for _ in range(size)]
    assert (numbers == numbers[:, :1]).all()
    assert len(set(grid.flat)) == sum(sizes)


@pytest.mark.parametrize(
    ("sizes", "mesh", "message"),
    [
        ((4, 2), {}, r"6 devices are in 2 slices \(hosts, or TPU slices\) of 2 to 4 devices; .* Use 2 of each"),
        (
            (4, 4),
            {"model": 8},
            "model 8 does not divide the 4 devices of a slice; .* Set mesh.model to one of 1, 2, 4",
        ),
        ((4, 4), {"data": 1, "model": -1}, "mesh.model 8 does not divide the 4 .* and mesh.data to -1"),
        ((3, 3), {"model": 2}, "mesh.model 2 does not divide the 3 devices of a slice.*to one of 1, 3,"),
        ((4, 4), {"data": 3}, "mesh.data 3 does not divide the 8 devices"),
    ],
)
def test_mesh_that_does_not_fit_the_slices_is_refused(sizes, mesh, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(slices(*sizes), **mesh)
