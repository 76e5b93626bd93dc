"""The device mesh and who holds what of each array. One device is the special case of many.

The mesh has two axes. Along `data` the batch is split; along `model` the heads and hidden units of each layer are
(tensor parallelism). Of several slices, `model` stays inside one and `data` runs across them. How the parameters lie is
said by rules, from patterns of their names to axes, and by presets:

    replicated     every device holds all of them
    fsdp           each array is split over `data` along its longest axis that divides; gathered when it is used
    fsdp+tensor    the same, after heads and hidden units were split over `model`

Whatever belongs to a parameter lies as it does: the optimizer's moments, the Polyak average.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.console import format_table
from vit_jax.errors import UserError, unknown_name
from vit_jax.models.layers import BATCH_AXIS

T = TypeVar("T")

DATA_AXIS = BATCH_AXIS
MODEL_AXIS = "model"

PRESETS = ("replicated", "fsdp", "fsdp+tensor")

# A pattern that is searched for in a parameter's name, and for each of the array's last axes the mesh axis that it is
# split over, or None.
Rule = tuple[str, Sequence[str | None]]

# Megatron-LM's way (Shoeybi et al., 2019): the first product of a pair is split by columns and the second by rows, so
# that each pair needs one sum over the devices.
TENSOR_RULES: tuple[Rule, ...] = (
    (r"MultiHeadDotProductAttention_\d+/(query|key|value)/kernel$", (None, MODEL_AXIS, None)),
    (r"MultiHeadDotProductAttention_\d+/(query|key|value)/bias$", (MODEL_AXIS, None)),
    (r"MultiHeadDotProductAttention_\d+/out/kernel$", (MODEL_AXIS, None, None)),
    (r"MlpBlock_\d+/Dense_0/kernel$", (None, MODEL_AXIS)),
    (r"MlpBlock_\d+/Dense_0/bias$", (MODEL_AXIS,)),
    (r"MlpBlock_\d+/Dense_1/kernel$", (MODEL_AXIS, None)),
)

# Values; smaller arrays stay whole under "fsdp". To gather them would take more time than they take memory.
SMALLEST_SPLIT = 2**14


def slices_of(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Groups devices by slice, the devices that a fast network joins.

    A slice is a TPU slice; of GPUs and CPUs it is a host, which JAX knows by its boot id. JAX numbers them in
    `device.slice_index`. Devices without that attribute are one slice: those of a single process, and those of a
    topology that is described with one slice.

    Returns:
      The devices of each slice, in their order; slices by ascending number.
    """
    groups: dict[int, list[jax.Device]] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", 0), []).append(device)
    return [groups[number] for number in sorted(groups)]


def make_mesh(devices: Sequence[jax.Device] | None = None, *, data: int = -1, model: int = 1) -> Mesh:
    """Makes the mesh of all devices of all processes, or of those given.

    Neighbours along `model` are in one slice. The slower network between slices joins devices along `data` alone, where
    the first `data / slices` positions are those of the first slice.

    Args:
      devices: None: `jax.devices()`. They may be of a topology that is only described.
      data: devices along which the batch is split; -1: as many as there are, divided by `model`.
      model: devices that share each layer's heads and hidden units; -1: as many as there are, divided by `data`.

    Raises:
      UserError: the sizes do not make up the number of devices, `model` does not divide the devices of a slice, or
        slices differ in size.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"mesh.data": data, "mesh.model": model}
    if any(size < 1 and size != -1 for size in sizes.values()) or data == model == -1:
        raise UserError(f"mesh.data and mesh.model must be at least 1, and one of them may be -1; got {data}, {model}.")
    for name, size in sizes.items():
        if len(devices) % abs(size):
            raise UserError(f"{name} {size} does not divide the {len(devices)} devices there are.")
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
            "JAX_NUM_CPU_DEVICES, or leave out the small ones."
        )
    if largest % model:
        fitting = ", ".join(str(size) for size in range(1, largest + 1) if largest % size == 0)
        raise UserError(
            f"mesh.model {model} does not divide the {largest} devices of a slice; there are {len(sizes)} slices "
            "(hosts, or TPU slices), and the network between them is too slow for parts of a layer. Set mesh.model to "
            f"one of {fitting}, and mesh.data to -1."
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Devices hold their share of the leading (batch) axis; those that differ along `model` alone hold the same."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def within(mesh: Mesh, function: Callable[..., T]) -> Callable[..., T]:
    """The function, to be jitted, with the mesh made known inside it: models then pin their activations to its axes."""

    @functools.wraps(function)
    def on_mesh(*args: Any) -> T:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return on_mesh


def local_rows(sharding: NamedSharding, length: int) -> np.ndarray:
    """Which rows of a global batch of so many lie on this process's devices, int64 `[local_batch]`, ascending."""
    slices = sharding.addressable_devices_indices_map((length,)).values()
    return np.unique(np.concatenate([np.arange(length)[index] for index in slices]))


def global_batch(
    batch: Mapping[str, np.ndarray], sharding: NamedSharding, length: int | None = None
) -> dict[str, jax.Array]:
    """Makes this process's rows of a batch into arrays of the global batch.

    Args:
      batch: arrays `[local_batch, ...]`, the rows that `local_rows` lists.
      sharding: from `batch_sharding`.
      length: of the global batch; None: this process has all of it.
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
    """Puts a tree of arrays on the devices.

    Args:
      arrays: on the host; every process has all of them.
      like: a tree of arrays, or shapes, with the dtypes and shardings that they get.
    """

    def place_one(array: Any, like: Any) -> jax.Array:
        array = np.asarray(array, like.dtype)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])

    return jax.tree.map(place_one, arrays, like)


def name_of(path: tuple[Any, ...]) -> str:
    """A leaf's place in a tree, such as `Transformer/encoder_norm/scale`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_specs(
    params: Any, mesh: Mesh, preset: str = "replicated", rules: Iterable[Rule] = ()
) -> dict[str, PartitionSpec]:
    """How each parameter lies on the mesh, by its name.

    Args:
      params: the parameters, or their shapes.
      mesh: from `make_mesh`.
      preset: one of `PRESETS`.
      rules: come before the preset's; of all that match a name the first decides, and the preset changes nothing.

    Raises:
      UserError: unknown preset or axis; one of `rules` matches no parameter, has more axes than the array, or an axis
        that does not divide; `mesh.model` is more than 1 and nothing is split over it.
    """
    if preset not in PRESETS:
        raise unknown_name("sharding", preset, PRESETS)
    rules = [_checked(rule) for rule in rules]
    shapes = {name_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for pattern, _ in rules:
        if not any(re.search(pattern, name) for name in shapes):
            raise UserError(
                f"sharding rule {pattern!r} matches no parameter. Names are such as "
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
            "These models have no rules for it: their convolutions would have to be split, which nobody has shown to "
            "pay. Use mesh.model=1, where 'fsdp' saves the same memory, or give sharding_rules of your own"
            if preset == "fsdp+tensor"
            else "Use sharding='fsdp+tensor', or mesh.model=1"
        )
        raise UserError(
            f"mesh.model is {mesh.shape[MODEL_AXIS]}, but no parameter is split over it, so that devices would repeat "
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
    spec = [*[None] * (len(shape) - len(axes)), *axes]  # scanned layers have an axis more, in front
    for size, axis in zip(shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"{name}, of shape {shape}, cannot be split over mesh axis {axis!r}: {size} is not divisible by "
                f"{mesh.shape[axis]}. Use a mesh.{axis} that divides it, or another sharding rule."
            )
    return spec


def _split_over_data(shape: tuple[int, ...], spec: list[str | None], parts: int) -> list[str | None]:
    """Splits the longest axis that is whole and divides, if there is one."""
    if DATA_AXIS in spec or parts == 1:
        return spec
    free = [axis for axis, size in enumerate(shape) if spec[axis] is None and size % parts == 0]
    if free:
        # Of axes of one length the last: a stack of scanned layers is never cut between layers for its own sake.
        longest = max(free, key=lambda axis: (shape[axis], axis))
        spec = [DATA_AXIS if axis == longest else old for axis, old in enumerate(spec)]
    return spec


def state_shardings(state: Any, mesh: Mesh, specs: Mapping[str, PartitionSpec]) -> Any:
    """Shardings of a training state: parameters as `specs` says, and so the arrays of the optimizer that are like one.

    An array belongs to the parameter whose name its own name ends with. If it has the parameter's shape, as Adam's
    moments and the Polyak average do, it is split in the same way; if not, as Adafactor's factored moments, it is small
    and every device holds all of it.

    Args:
      state: arrays or shapes, with the parameters as `params`; or a tree of parameters alone.
      mesh: from `make_mesh`.
      specs: from `parameter_specs`.
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
    """The shardings of a tree's arrays or shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of arrays, or shapes, that have shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def total_bytes(tree: Any) -> int:
    """Bytes of arrays or shapes, each counted once."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def sharding_table(state: Any) -> str:
    """What is split how, and the bytes that a device holds.

    Args:
      state: a training state, or its shapes, with shardings. Equal layers make one line.
    """
    groups: dict[tuple[str, ...], list[Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = re.sub(r"(encoderblock_|block|unit)\d+", r"\1*", name_of(path))
        spec = leaf.sharding.spec
        axes = [", ".join(axis) if isinstance(axis, tuple) else axis or "-" for axis in spec]
        axes += ["-"] * (leaf.ndim - len(axes))
        how = " ".join(axes) if any(spec) else "whole"
        groups.setdefault((name, str(tuple(leaf.shape)), how), []).append(leaf)
    rows: list[tuple[object, ...]] = []
    for (name, shape, how), leaves in groups.items():
        rows.append((name, len(leaves), shape, how, f"{total_bytes(leaves):,}", f"{bytes_per_device(leaves):,}"))
    for name, part in (
        ("all parameters", state.params),
        ("optimizer state", state.opt_state),
        ("Polyak average", state.average),
        ("all", state),
    ):
        if jax.tree.leaves(part):
            rows.append((name, "", "", "", f"{total_bytes(part):,}", f"{bytes_per_device(part):,}"))
    headings = ("parameters", "number", "shape", "split over", "bytes", "a device")
    return format_table(headings, rows, markdown=False)


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
    """Kind and number of devices, processes and slices, for logs and records."""
    devices = list(mesh.devices.flat)
    return {
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "num_processes": len({device.process_index for device in devices}),
        "num_slices": len(slices_of(devices)),
        "mesh": dict(mesh.shape),
    }
