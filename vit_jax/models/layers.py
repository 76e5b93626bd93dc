"""What all models share: the scale of images, and what they may know of the devices they are computed on."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

BATCH_AXIS = "data"


def normalize_images(images: jax.Array) -> jax.Array:
    """Maps images of values from 0 to 255, uint8 or float, of any shape to float32 in [-1, 1], which models take.

    Done on the device: bytes are a quarter of the transfer.
    """
    return images.astype(jnp.float32) / 127.5 - 1.0


def platform() -> str:
    """What the computation being traced is for: "cpu", "gpu" or "tpu".

    That of the mesh it knows (`jax.sharding.use_abstract_mesh`), whose devices may be elsewhere; else of this process.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def keep_on_batch_axis(x: jax.Array) -> jax.Array:
    """Pins the leading axis of an activation, the batch, to the mesh's axis `data`.

    Where parameters are split along `data` as well, XLA has to choose what travels for a product of the two. Left to
    itself it gathers the examples of all devices instead of one layer's parameters. The other axes stay its choice.

    Args:
      x: `[batch, ...]`.

    Returns:
      The same values. Outside of a computation that knows its mesh (`jax.sharding.use_abstract_mesh`), x as it is.
    """
    if BATCH_AXIS not in jax.sharding.get_abstract_mesh().axis_names:
        return x
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXIS, *others))
