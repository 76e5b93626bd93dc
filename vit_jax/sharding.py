"""The device mesh, and how arrays are split over it. One device is the special case of many.

The mesh has two axes. The batch is split along `data`; the heads and hidden units of each layer are split along `model`
(tensor parallelism). With several slices, `model` stays inside a slice and `data` runs across them. Rules split the
parameters whose names match their pattern, and a preset splits the others:

    replicated     every device holds all of them
    fsdp           each array is split over `data` along its longest divisible axis, and gathered for use
    fsdp+tensor    the same, after splitting heads and hidden units over `model`

The optimizer's moments and the Polyak average are split like their parameters.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError, unknown_name
from vit_jax.models.layers import BATCH_AXIS

T = TypeVar("T")

DATA_AXIS = BATCH_AXIS
MODEL_AXIS = "model"

PRESETS = ("replicated", "fsdp", "fsdp+tensor")

# A pattern to search for in a parameter's name, and for each of the array's last axes the mesh axis that splits it, or
# None.
Rule = tuple[str, Sequence[str | None]]

# As in Megatron-LM (Shoeybi et al., 2019): the first product of a pair is split by columns and the second by rows, so
# that each pair needs one sum over the devices.
TENSOR_RULES: tuple[Rule, ...] = (
    (r"MultiHeadDotProductAttention_\d+/(query|key|value)/kernel$", (None, MODEL_AXIS, None)),
    (r"MultiHeadDotProductAttention_\d+/(query|key|value)/bias$", (MODEL_AXIS, None)),
    (r"MultiHeadDotProductAttention_\d+/out/kernel$", (MODEL_AXIS, None, None)),
    (r"MlpBlock_\d+/Dense_0/kernel$", (None, MODEL_AXIS)),
    (r"MlpBlock_\d+/Dense_0/bias$", (MODEL_AXIS,)),
    (r"MlpBlock_\d+/Dense_1/kernel$", (MODEL_AXIS, None)),
)

# Arrays with fewer values stay whole under "fsdp": they cost little memory, and gathering them would cost time.
SMALLEST_SPLIT = 2**14


def slices_of(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Groups devices by slice: a TPU slice, or a host of GPUs or CPUs, which JAX identifies by its boot id.

    JAX numbers slices in `device.slice_index`. Devices without that attribute (a single process, or a described
    topology of one slice) form one slice.

    Returns:
      The devices of each slice in their order; slices by ascending number.
    """
    groups: dict[int, list[jax.Device]] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", 0), []).append(device)
    return [groups[number] for number in sorted(groups)]


def make_mesh(devices: Sequence[jax.Device] | None = None, *, data: int = -1, model: int = 1) -> Mesh:
    """Makes the mesh of all devices of all processes, or of the given ones.

    Neighbours along `model` are in one slice. The slower network between slices joins devices along `data` only, where
    the first `data / slices` positions are those of the first slice.

    Args:
      devices: None: `jax.devices()`. They may belong to a described topology.
      data: number of parts of the batch; -1: the number of devices divided by `model`.
      model: number of devices that share each layer's heads and hidden units; -1: the number of devices divided by
        `data`.

    Raises:
      UserError: the product of the sizes is not the number of devices, `model` does not divide the devices of a slice,
        or slices differ in size.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"mesh.data": data, "mesh.model": model}
    if any(size < 1 and size != -1 for size in sizes.values()) or data == model == -1:
        raise UserError(f"mesh.data and mesh.model must be at least 1, and one of them may be -1; got {data}, {model}.")
    for name, size in sizes.items():
        if len(devices) % abs(size):
            raise UserError(f"{name} {size} does not divide the {len(devices)} devices.")
    data = len(devices) // model if data == -1 else data
    model = len(devices) // data if model == -1 else model
    if data * model != len(devices):
        raise UserError(
            f"mesh.data {data} x mesh.model {model} are {data * model} devices, but there are {len(devices)}. Set one "
            "of them to -1."
        )
    slices = slices_of(devices)
    _check_slices(slices, model)
    names, types = (DATA_AXIS, MODEL_AXIS), (AxisType.Auto, AxisType.Auto)
    # jax.make_mesh refuses devices of several slices. It finds a good order within each.
    shape = (data // len(slices), model)
    grids = [jax.make_mesh(shape, names, axis_types=types, devices=each).devices for each in slices]
    return Mesh(np.concatenate(grids), names, axis_types=types)


def _check_slices(slices: Sequence[Sequence[jax.Device]], model: int) -> None:
    """Raises `UserError` unless all slices are equally large and `model` divides their size."""
    sizes = [len(each) for each in slices]
    smallest, largest = min(sizes), max(sizes)
    if smallest != largest:
        raise UserError(
            f"the {sum(sizes)} devices are in {len(sizes)} slices (hosts, or TPU slices) of {smallest} to {largest} "
            f"devices; all must have the same number. Use {smallest} of each, for example with CUDA_VISIBLE_DEVICES or "
            "JAX_NUM_CPU_DEVICES, or leave out the small slices."
        )
    if largest % model:
        fitting = ", ".join(str(size) for size in range(1, largest + 1) if largest % size == 0)
        raise UserError(
            f"mesh.model {model} does not divide the {largest} devices of a slice; there are {len(sizes)} slices "
            "(hosts, or TPU slices), and the network between them is too slow for parts of a layer. Set mesh.model to "
            f"one of {fitting}, and mesh.data to -1."
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its leading axis is split along `data` and repeated along `model`."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def within(mesh: Mesh, function: Callable[..., T]) -> Callable[..., T]:
    """Wraps a function to be jitted so that models inside it know the mesh and can pin activations to its axes."""

    @functools.wraps(function)
    def on_mesh(*args: Any) -> T:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return on_mesh


def local_rows(sharding: NamedSharding, length: int) -> np.ndarray:
    """Returns the rows of a global batch of `length` on this process's devices: int64 `[local_batch]`, ascending."""
    slices = sharding.addressable_devices_indices_map((length,)).values()
    return np.unique(np.concatenate([np.arange(length)[index] for index in slices]))


def global_batch(
    batch: Mapping[str, np.ndarray], sharding: NamedSharding, length: int | None = None
) -> dict[str, jax.Array]:
    """Makes global arrays of a batch from this process's rows.

    Args:
      batch: arrays `[local_batch, ...]` with the rows of `local_rows`.
      sharding: from `batch_sharding`.
      length: of the global batch; None if this process has all of it.
    """
    length = length or len(next(iter(batch.values())))
    rows = local_rows(sharding, length)

    def place(array: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(length)
            first = int(np.searchsorted(rows, start))
            return array[first : first + stop - start]

        return jax.make_array_from_callback((length, *array.shape[1:]), sharding, shard)

    return {name: place(array) for name, array in batch.items()}


def place(arrays: Any, like: Any) -> Any:
    """Puts arrays, which every process has, on the devices, with the dtypes and shardings of the tree `like`."""

    def place_one(array: Any, like: Any) -> jax.Array:
        array = np.asarray(array, like.dtype)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])

    return jax.tree.map(place_one, arrays, like)


def name_of(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf of a tree, such as `Transformer/encoder_norm/scale`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_specs(
    params: Any, mesh: Mesh, preset: str = "replicated", rules: Iterable[Rule] = ()
) -> dict[str, PartitionSpec]:
    """Decides how each parameter is split over the mesh, by its name.

    Args:
      params: the parameters, or their shapes.
      mesh: from `make_mesh`.
      preset: one of `PRESETS`.
      rules: the first rule that matches a name decides, and the preset does not change that parameter.

    Raises:
      UserError: unknown preset or axis; a rule matches no parameter, has more axes than the array, or an axis that does
        not divide it; `mesh.model` is more than 1 and nothing is split over it.
    """
    if preset not in PRESETS:
        raise unknown_name("sharding", preset, PRESETS)
    rules = [_checked(rule) for rule in rules]
    shapes = {name_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for pattern, _ in rules:
        if not any(re.search(pattern, name) for name in shapes):
            raise UserError(
                f"sharding rule {pattern!r} matches no parameter. Examples of names: "
                f"{', '.join(repr(name) for name in list(shapes)[:: max(1, len(shapes) // 4)][:4])}."
            )
    num_given = len(rules)
    rules += TENSOR_RULES if preset == "fsdp+tensor" else ()
    specs = {}
    for name, shape in shapes.items():
        number, axes = next(
            ((i, axes) for i, (pattern, axes) in enumerate(rules) if re.search(pattern, name)), (None, ())
        )
        spec = _by_rule(name, shape, axes, mesh)
        of_the_user = number is not None and number < num_given
        if preset != "replicated" and not of_the_user and math.prod(shape) >= SMALLEST_SPLIT:
            spec = _split_over_data(shape, spec, mesh.shape[DATA_AXIS])
        specs[name] = PartitionSpec(*spec) if any(spec) else PartitionSpec()
    if mesh.shape[MODEL_AXIS] > 1 and not any(MODEL_AXIS in spec for spec in specs.values()):
        remedy = (
            "This model has no rules for it, because splitting convolutions has not been shown to pay. Use "
            "mesh.model=1, where 'fsdp' saves the same memory, or give sharding_rules of your own"
            if preset == "fsdp+tensor"
            else "Use sharding='fsdp+tensor', or mesh.model=1"
        )
        raise UserError(
            f"mesh.model is {mesh.shape[MODEL_AXIS]}, but no parameter is split over it, so devices would repeat "
            f"each other's work. {remedy}."
        )
    return specs


def _checked(rule: Any) -> Rule:
    try:
        pattern, axes = rule
        re.compile(pattern)
        if isinstance(axes, str):
            raise TypeError
        axes = tuple(axes)
    except (TypeError, ValueError, re.error) as error:
        raise UserError(
            f"sharding_rules takes pairs of a pattern and axes, such as ('head/kernel', (None, 'model')); got {rule!r}."
        ) from error
    for axis in axes:
        if axis not in (None, DATA_AXIS, MODEL_AXIS):
            raise unknown_name(f"mesh axis in the sharding rule {pattern!r}:", axis, (DATA_AXIS, MODEL_AXIS))
        if axis is not None and axes.count(axis) > 1:
            raise UserError(f"the sharding rule {pattern!r} names mesh axis {axis!r} twice: {axes}.")
    return pattern, axes


def _by_rule(name: str, shape: tuple[int, ...], axes: Sequence[str | None], mesh: Mesh) -> list[str | None]:
    if len(axes) > len(shape):
        raise UserError(f"a sharding rule gives {name} {len(axes)} axes, but its shape is {shape}.")
    spec = [*[None] * (len(shape) - len(axes)), *axes]  # scanned layers have one more axis, in front
    for size, axis in zip(shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"{name}, of shape {shape}, cannot be split over mesh axis {axis!r}: {size} is not divisible by "
                f"{mesh.shape[axis]}. Use a mesh.{axis} that divides it, or another sharding rule."
            )
    return spec


def _split_over_data(shape: tuple[int, ...], spec: list[str | None], parts: int) -> list[str | None]:
    """Splits the longest whole axis that the number of parts divides, if there is one."""
    if DATA_AXIS in spec or parts == 1:
        return spec
    free = [axis for axis, size in enumerate(shape) if spec[axis] is None and size % parts == 0]
    if free:
        # Of equally long axes the last, so that a stack of scanned layers is not split between layers.
        longest = max(free, key=lambda axis: (shape[axis], axis))
        spec = [DATA_AXIS if axis == longest else old for axis, old in enumerate(spec)]
    return spec


def state_shardings(state: Any, mesh: Mesh, specs: Mapping[str, PartitionSpec]) -> Any:
    """Returns the shardings of a training state (arrays or shapes), or of only the parameters.

    An array whose name ends with a parameter's name belongs to it. Arrays of the parameter's shape, such as Adam's
    moments and the Polyak average, are split in the same way. Others, such as Adafactor's factored moments, are small,
    and every device holds them whole. `specs` is from `parameter_specs`.
    """
    params = getattr(state, "params", state)
    shapes = {name_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def find(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        parts = name_of(path).split("/")
        names = ("/".join(parts[first:]) for first in range(len(parts)))
        name = next((name for name in names if name in specs), None)
        return NamedSharding(mesh, specs[name]) if name and shapes[name] == leaf.shape else replicated(mesh)

    return jax.tree_util.tree_map_with_path(find, state)


def with_sharding(abstract: Any, shardings: Any) -> Any:
    """Adds shardings, one or a tree of them, to the `jax.ShapeDtypeStruct`s of a tree."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, abstract)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )


def shardings_of(tree: Any) -> Any:
    """Returns the shardings of a tree's arrays or shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def bytes_per_device(tree: Any) -> int:
    """Counts the bytes that one device holds of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def total_bytes(tree: Any) -> int:
    """Counts the bytes of arrays or shapes as if one device held them."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def check_batch_size(batch_size: int, mesh: Mesh, accumulation_steps: int = 1, field: str = "batch_size") -> None:
    """Raises `UserError` unless the mesh's data axis and accumulation steps split the batch evenly."""
    devices = mesh.shape[DATA_AXIS]
    parts = devices * accumulation_steps
    if accumulation_steps < 1:
        raise UserError(f"accumulation_steps must be at least 1, got {accumulation_steps}.")
    if batch_size < 1 or batch_size % parts:
        nearest = max(parts, round(batch_size / parts) * parts)
        raise UserError(
            f"{field} {batch_size} is not divisible by {parts} ({devices} devices x {accumulation_steps} accumulation "
            f"steps). Use a multiple of {parts}, such as {nearest}."
        )


def describe_devices(mesh: Mesh) -> dict[str, Any]:
    """Returns kind and number of devices, processes and slices, for logs and records."""
    devices = list(mesh.devices.flat)
    return {
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "num_processes": len({device.process_index for device in devices}),
        "num_slices": len(slices_of(devices)),
        "mesh": dict(mesh.shape),
    }
