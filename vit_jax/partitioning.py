"""The device mesh and who holds what of each array. One device is the special case of many."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError

DATA_AXIS = "data"


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices of all processes (or of those given) along one axis, `data`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Every device holds its share of the leading (batch) axis."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def global_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Makes this process's part of a batch, `[local_batch, ...]` arrays, into arrays of the global batch."""
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def with_sharding(abstract: Any, sharding: NamedSharding) -> Any:
    """Adds a sharding to each `jax.ShapeDtypeStruct` of a tree."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract)


def check_batch_size(batch_size: int, mesh: Mesh, accumulation_steps: int = 1, field: str = "batch_size") -> None:
    """Raises `UserError` unless devices and accumulation steps split the batch evenly."""
    devices = mesh.devices.size
    parts = devices * accumulation_steps
    if accumulation_steps < 1:
        raise UserError(f"accumulation_steps must be at least 1, got {accumulation_steps}.")
    if batch_size < 1 or batch_size % parts:
        nearest = max(parts, round(batch_size / parts) * parts)
        raise UserError(
            f"{field} {batch_size} is not divisible by {parts} ({devices} devices x {accumulation_steps} accumulation "
            f"steps). Use a multiple of {parts}, such as {nearest}."
        )


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second start does not compile again."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(cache, "vit_jax", "compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def describe_devices(mesh: Mesh) -> dict[str, Any]:
    """Kind and number of devices and processes, for logs and records."""
    devices = mesh.devices.flat
    return {
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "num_devices": mesh.devices.size,
        "num_processes": jax.process_count(),
    }
