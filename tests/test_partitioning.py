import jax
import numpy as np
import pytest

from vit_jax import partitioning
from vit_jax.errors import UserError


def test_batches_are_split_over_the_devices_in_order():
    mesh = partitioning.make_mesh()
    batch = partitioning.global_batch({"x": np.arange(16)}, partitioning.batch_sharding(mesh))
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
        partitioning.check_batch_size(batch_size, partitioning.make_mesh(), accumulation_steps)


def test_batch_that_fits_is_accepted():
    partitioning.check_batch_size(64, partitioning.make_mesh(), 4)
    partitioning.check_batch_size(3, partitioning.make_mesh(jax.devices()[:1]))
