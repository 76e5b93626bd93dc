"""The filters of the first linear embedding, as their principal components (figure 7, left)."""

import argparse
import pathlib
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from vit_jax.analysis.attention_model import load_transformer
from vit_jax.analysis.picture_flags import add_weights, load_weights, title_of, write_picture
from vit_jax.errors import UserError
from vit_jax.models.resnet import HYBRID_EPSILONS, standardize_kernel
from vit_jax.weights import Weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_COMPONENTS = 28  # in figure 7
_COLUMNS = 7


def embedding_filters(weights: Weights | str | pathlib.Path) -> np.ndarray:
    """The filters that first see the pixels, float32 `[height, width, 3, filters]`.

    For a ViT, these are the columns of E in equation 1. A hybrid embeds a feature map, so its filters are those of the
    ResNet's first convolution, standardised as the model uses them; the paper shows no hybrid.

    Args:
      weights: from `vit_jax.weights.load`, or its argument.

    Raises:
      UserError: the weights are those of a BiT ResNet.
    """
    arrays = load_transformer(weights, "patch embedding").arrays
    if "conv_root/kernel" in arrays:
        kernel = jnp.asarray(arrays["conv_root/kernel"], jnp.float32)
        return np.asarray(standardize_kernel(kernel, **HYBRID_EPSILONS))
    return arrays["embedding/kernel"].astype(np.float32)


def principal_components(kernel: np.ndarray, count: int = NUM_COMPONENTS) -> tuple[np.ndarray, np.ndarray]:
    """The principal components of filters, by falling variance.

    The filters are the samples, their mean is subtracted, and a component has the shape of a filter. The paper says
    no more than "principal components"; the sign, which is arbitrary, makes the value of largest magnitude positive.

    Args:
      kernel: `[height, width, channels, filters]`.
      count: number of components at most; there are fewer if the filters or their values are fewer.

    Returns:
      components `[count, height, width, channels]`, each of norm 1, and their shares of the variance `[count]`.

    Raises:
      UserError: all filters are equal.
    """
    shape, num_filters = kernel.shape[:-1], kernel.shape[-1]
    samples = kernel.reshape(-1, num_filters).T.astype(np.float64)
    samples = samples - samples.mean(axis=0)
    _, singular_values, components = np.linalg.svd(samples, full_matrices=False)
    variances = singular_values**2
    if not variances.any():
        raise UserError("the filters of these weights are all equal, so they have no principal components.")
    # The mean takes one dimension away.
    components = components[: min(count, num_filters - 1, len(components))]
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    components = components * np.sign(largest)
    return components.reshape(-1, *shape), (variances / variances.sum())[: len(components)]


def draw_filters(components: np.ndarray, title: str = "") -> "Figure":
    """Draws components, in rows of seven; grey is 0, and each has its own scale.

    Args:
      components: `[count, height, width, 3]`.
      title: above the picture.
    """
    from matplotlib.figure import Figure

    rows = -(-len(components) // _COLUMNS)
    figure = Figure(figsize=(0.9 * _COLUMNS, 0.9 * rows + 0.5), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, _COLUMNS)).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, component in zip(axes, components, strict=False):
        axis.imshow(0.5 + 0.5 * component / np.abs(component).max(), interpolation="nearest")
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the subcommand."""
    add_weights(parser)
    text = f"number of principal components (default: {NUM_COMPONENTS}, as in the paper)"
    parser.add_argument("--components", type=int, default=NUM_COMPONENTS, help=text)


def run(args: argparse.Namespace) -> int:
    """Draws the picture; returns the exit status."""
    if args.components < 1:
        raise UserError(f"--components must be at least 1, got {args.components}.")
    weights = load_weights(args.weights, args.model)
    components, shares = principal_components(embedding_filters(weights), args.components)
    title = f"RGB embedding filters\n{title_of(weights)}"
    write_picture(args.output, draw_filters(components, title))
    print(f"The {len(components)} components have {100 * shares.sum():.1f} % of the filters' variance.")
    return 0
