"""What fine-tuning does to pre-trained weights (section 3.2): another head, another resolution."""

import dataclasses
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.position_embeddings import interpolate_position_embedding, interpolation_matrix
from vit_jax.models.vit import stack_layers
from vit_jax.weights.identify import Shapes, check_shapes, shapes_of
from vit_jax.weights.mapping import Arrays, unstack_arrays
from vit_jax.weights.model_weights import Weights


@dataclasses.dataclass(frozen=True)
class TransferReport:
    """What became of each array.

    Attributes:
      loaded: names of arrays taken as they are.
      resized: (name, old shape, new shape) of position embeddings that were interpolated.
      dropped: names of the weights' arrays that the model has no use for.
      initialised: names of the model's arrays that begin anew.
    """

    loaded: tuple[str, ...]
    resized: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    dropped: tuple[str, ...]
    initialised: tuple[str, ...]

    def __str__(self) -> str:
        resized = [f"{name} {old} -> {new}" for name, old, new in self.resized]
        return "\n".join(
            f"{what:<12} {len(names):>4}  {'' if what == 'loaded' else ', '.join(names)}".rstrip()
            for what, names in (
                ("loaded", self.loaded),
                ("resized", resized),
                ("dropped", self.dropped),
                ("initialised", self.initialised),
            )
        )


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

    The head begins anew, at zero as the paper has it, and the hidden layer before it is dropped where the model has
    none. Position embeddings are interpolated to the grid of the new images. A class token that only one of the two has
    is dropped or begins anew, with its position embedding. All else must be there, in the same shape.

    Args:
      weights: from `load`.
      model: from `create_model`; layers scanned or not.
      image_size: of the images to come, in pixels.
      keep_head: whether to take over the head as well; it must be as wide.
      keep_pre_logits: whether to take over the hidden layer of the head, if the model has one.
      seed: of what begins anew.

    Returns:
      The model's parameters, nested, as NumPy arrays of its `param_dtype`, and a report.

    Raises:
      UserError: the architectures differ; names the first differences.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    old_model = weights.spec.create()
    _check_function(old_model, model)

    def init(names: Collection[str]) -> dict[str, jax.Array]:
        variables = model.init(jax.random.key(seed), jnp.zeros((1, *size, 3)))
        leaves: dict[str, Any] = flax.traverse_util.flatten_dict(variables["params"], sep="/")
        flat: dict[str, Any] = unstack_arrays(leaves)
        return {name: array for name, array in flat.items() if name in names} if names else flat

    fresh: dict[str, Any] = jax.eval_shape(lambda: init(()))
    given = _match_prefix_tokens(weights.arrays, old_model, model)

    anew = {"head": not keep_head, "pre_logits": not keep_pre_logits}
    begins_anew = {name for name in fresh if anew.get(name.split("/")[0], False)}
    if "cls" in fresh and "cls" not in given:
        begins_anew.add("cls")
    if "MAPHead_0/probe" not in given:
        begins_anew |= {name for name in fresh if name.startswith("MAPHead_0/")}
    dropped = {
        name
        for name in weights.arrays
        if name in begins_anew
        or (name not in fresh and name.split("/")[0] in ("head", "pre_logits", "cls", "MAPHead_0"))
    }
    given = {name: array for name, array in given.items() if name not in dropped}

    resized = []
    for name in sorted(given.keys() & fresh.keys() - begins_anew):
        if "embedding" in name.split("/")[-1]:
            new = _resize(name, given[name], fresh[name].shape, weights, model, size)
            if new is not None:
                given[name] = new
            if given[name] is not weights.arrays[name]:
                resized.append((name, weights.arrays[name].shape, given[name].shape))
    expected: Shapes = {name: array.shape for name, array in fresh.items() if name not in begins_anew}
    check_shapes(shapes_of(given), expected)

    # The compiler leaves out what is not asked for, which is nearly all.
    anew_arrays = jax.jit(lambda: init(begins_anew))() if begins_anew else {}
    arrays: Arrays = {
        name: np.asarray(anew_arrays[name]) if name in begins_anew else given[name].astype(fresh[name].dtype)
        for name in fresh
    }
    params = flax.traverse_util.unflatten_dict(arrays, sep="/")
    if getattr(model, "scan_layers", False):
        params = jax.tree.map(np.asarray, stack_layers(params))
    names = {name for name, *_ in resized}
    report = TransferReport(
        loaded=tuple(sorted(given.keys() - names)),
        resized=tuple(resized),
        dropped=tuple(sorted(dropped)),
        initialised=tuple(sorted(begins_anew)),
    )
    return params, report


def _check_function(old: Any, new: Any) -> None:
    """Raises where models compute differently without any array that shows it."""
    for attribute in ("gelu", "position_embedding_at", "root_padding"):
        before, after = (getattr(model, attribute, None) for model in (old, new))
        if before != after and None not in (before, after):
            raise UserError(
                f"the weights are of a model with {attribute}={before!r}, this one has {after!r}. Make it with "
                f"{attribute}={before!r}."
            )


def _match_prefix_tokens(arrays: Arrays, old: Any, new: Any) -> Arrays:
    """Drops or adds position embeddings of a class token that only one of the models has."""
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
) -> np.ndarray | None:
    """Interpolates embeddings of positions to another grid; None for what is none."""
    leaf = name.rsplit("/", maxsplit=1)[-1]
    old_size = weights.spec.image_size or weights.preprocessing.image_size
    old_model = weights.spec.create()
    if leaf == "pos_embedding" and array.shape[-1] == shape[-1]:
        return interpolate_position_embedding(
            array,
            model.grid(*size),
            num_prefix_tokens=model.num_prefix_tokens,
            old_grid=old_model.grid(*old_size),
        )
    is_raster = leaf == "relative_embedding" and "/row/" not in name and "/column/" not in name
    if array.shape == shape and not (is_raster and model.grid(*size) != old_model.grid(*old_size)):
        return None
    if leaf in ("pos_embedding_x", "pos_embedding_y") and array.shape[1:] == shape[1:]:
        return (interpolation_matrix(array.shape[0], shape[0]) @ array.astype(np.float64)).astype(array.dtype)
    if leaf == "relative_embedding" and array.shape[1:] == shape[1:]:
        if not is_raster:
            # Offsets along one axis, which have an order to interpolate in.
            matrix = interpolation_matrix(array.shape[0], shape[0])
            return np.einsum("no,ohd->nhd", matrix, array.astype(np.float64)).astype(array.dtype)
        raise UserError(
            f"{name}: relative embeddings of offsets in raster order mean other distances on another grid. Keep the "
            f"resolution at {old_size[0]}x{old_size[1]}, or choose position embeddings that can be interpolated."
        )
    return None
