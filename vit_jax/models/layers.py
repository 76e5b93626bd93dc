"""What a model may know of the devices it is computed on: their kind, and that each keeps its examples of the batch."""

import jax
from jax.sharding import PartitionSpec

BATCH_AXIS = "data"


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
