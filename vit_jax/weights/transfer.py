"""Fits pre-trained weights to a model for fine-tuning (section 3.2): another head, another resolution."""

import dataclasses
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.layers import stack_layers
from vit_jax.models.position_embeddings import interpolate_position_embedding, interpolation_matrix
from vit_jax.weights.identify import Shapes, check_shapes, shapes_of
from vit_jax.weights.mapping import Arrays, unstack_arrays
from vit_jax.weights.model_weights import Weights

_OPTIONAL_PARTS = ("head", "pre_logits", "cls", "MAPHead_0")


@dataclasses.dataclass(frozen=True)
class TransferReport:
    """How each array was used.

    Attributes:
      loaded: names of arrays that were taken unchanged.
      resized: (name, old shape, new shape) of position embeddings that were interpolated.
      dropped: names of the weights' arrays that the model does not use.
      initialised: names of the model's arrays that start from scratch.
    """

    loaded: tuple[str, ...]
    resized: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    dropped: tuple[str, ...]
    initialised: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"loaded       {len(self.loaded):>4}"]
        resized = [f"{name} {old} -> {new}" for name, old, new in self.resized]
        for what, names in (("resized", resized), ("dropped", self.dropped), ("initialised", self.initialised)):
            lines.append(f"{what:<12} {len(names):>4}  {', '.join(names)}".rstrip())
        return "\n".join(lines)


def transfer(
    weights: Weights,
    model: nn.Module,
    image_size: tuple[int, int] | int,
    *,
    keep_head: bool = False,
    keep_pre_logits: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Any], TransferReport]:
    """Fits weights to a model that is to be fine-tuned.

    The head starts at zero, as in the paper; the hidden layer before it is dropped if the model has none. Position
    embeddings are interpolated to the grid of the new images. A class token that only one of the two has is dropped or
    starts from scratch, with its position embedding. All other arrays must exist in both, in the same shape.

    Args:
      weights: from `load`.
      model: from `create_model`; layers scanned or not.
      image_size: height and width, or side, of the new images, in pixels.
      keep_head: whether to take the head as well; it must have the same width.
      keep_pre_logits: whether to take the hidden layer of the head, if the model has one.
      seed: seed of the initialisation.

    Returns:
      The model's parameters, nested, as NumPy arrays of its `param_dtype`, and a report.

    Raises:
      UserError: the architectures differ; the message lists the first differences.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    old_model = weights.spec.create()
    _check_function(old_model, model)

    def init(names: Collection[str] | None = None) -> dict[str, Any]:
        variables = model.init(jax.random.key(seed), jnp.zeros((1, *size, 3)))
        flat: dict[str, Any] = unstack_arrays(flax.traverse_util.flatten_dict(variables["params"], sep="/"))
        return flat if names is None else {name: flat[name] for name in names}

    fresh: dict[str, Any] = jax.eval_shape(init)
    given = _match_prefix_tokens(weights.arrays, old_model, model)
    anew = {"head": not keep_head, "pre_logits": not keep_pre_logits, "cls": "cls" not in given}
    anew |= {"MAPHead_0": "MAPHead_0/probe" not in given, "mask_embedding": "mask_embedding" not in given}
    initialised = sorted(name for name in fresh if anew.get(name.split("/")[0], False))
    dropped = sorted(
        name for name in given if name in initialised or (name not in fresh and name.split("/")[0] in _OPTIONAL_PARTS)
    )
    given = {name: array for name, array in given.items() if name not in dropped}

    resized = []
    for name in sorted(given.keys() & fresh.keys()):
        if "embedding" in name.split("/")[-1]:
            given[name] = _resize(name, given[name], fresh[name].shape, weights, model, size)
            if given[name] is not weights.arrays[name]:
                resized.append((name, weights.arrays[name].shape, given[name].shape))
    expected: Shapes = {name: array.shape for name, array in fresh.items() if name not in initialised}
    check_shapes(shapes_of(given), expected)

    # Compiled, because the compiler then computes only the few arrays that are needed.
    scratch = jax.jit(lambda: init(initialised))() if initialised else {}
    arrays = {
        name: np.asarray(scratch[name]) if name in scratch else given[name].astype(fresh[name].dtype) for name in fresh
    }
    params = flax.traverse_util.unflatten_dict(arrays, sep="/")
    if getattr(model, "scan_layers", False):
        params = jax.tree.map(np.asarray, stack_layers(params))
    loaded = sorted(given.keys() - {name for name, *_ in resized})
    return params, TransferReport(tuple(loaded), tuple(resized), tuple(dropped), tuple(initialised))


def _check_function(old: Any, new: Any) -> None:
    """Raises `UserError` if the models compute differently although their arrays agree."""
    for attribute in ("gelu", "position_embedding_at", "root_padding"):
        before, after = (getattr(model, attribute, None) for model in (old, new))
        if before != after and None not in (before, after):
            raise UserError(
                f"the weights are of a model with {attribute}={before!r}, this one has {after!r}. Make it with "
                f"{attribute}={before!r}."
            )


def _match_prefix_tokens(arrays: Arrays, old: Any, new: Any) -> Arrays:
    """Drops or adds the position embeddings of a class token that only one of the models has."""
    before, after = (getattr(model, "num_prefix_tokens", 0) for model in (old, new))
    arrays = dict(arrays)
    for name, array in arrays.items():
        if name.split("/")[-1] != "pos_embedding" or before == after:
            continue
        if after < before:
            arrays[name] = array[:, before - after :]
        else:
            arrays[name] = np.concatenate([np.zeros_like(array[:, : after - before]), array], axis=1)
    return arrays


def _resize(
    name: str, array: np.ndarray, shape: tuple[int, ...], weights: Weights, model: Any, size: tuple[int, int]
) -> np.ndarray:
    """Interpolates position embeddings to another grid; returns other arrays as they are."""
    leaf = name.rsplit("/", maxsplit=1)[-1]
    old_size = weights.spec.image_size or weights.preprocessing.image_size
    old_model = weights.spec.create()
    if leaf == "pos_embedding" and array.shape[-1] == shape[-1]:
        old_grid = old_model.grid(*old_size)
        return interpolate_position_embedding(
            array, model.grid(*size), num_prefix_tokens=model.num_prefix_tokens, old_grid=old_grid
        )
    is_raster = leaf == "relative_embedding" and "_axis/" not in name
    if is_raster and array.shape[1:] == shape[1:] and model.grid(*size) != old_model.grid(*old_size):
        raise UserError(
            f"{name}: relative embeddings of offsets in raster order mean other distances on another grid. Keep the "
            f"resolution at {old_size[0]}x{old_size[1]}, or choose position embeddings that can be interpolated."
        )
    is_along_axis = leaf in ("pos_embedding_x", "pos_embedding_y", "relative_embedding") and not is_raster
    if array.shape == shape or not is_along_axis or array.shape[1:] != shape[1:]:
        return array
    matrix = interpolation_matrix(array.shape[0], shape[0])
    return np.einsum("no,o...->n...", matrix, array.astype(np.float64)).astype(array.dtype)
