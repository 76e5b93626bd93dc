"""Mean attention distance of each head and layer, in pixels (figure 7, right, and figure 11; appendix D.7)."""

import argparse
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.analysis.attention_model import AttentionModel
from vit_jax.analysis.picture_flags import (
    ImageFiles,
    add_images,
    add_weights,
    load_weights,
    model_options,
    title_of,
    write_picture,
)
from vit_jax.weights import Weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def patch_distances(grid: tuple[int, int], pixels_per_token: int) -> jax.Array:
    """Euclidean distances between the centres of the patches, in pixels, float32 `[num_patches, num_patches]`.

    Args:
      grid: rows and columns of patches.
      pixels_per_token: side of the square of pixels that a token covers.
    """
    y, x = pixels_per_token * jnp.indices(grid, jnp.float32).reshape(2, -1)
    return jnp.hypot(y[:, None] - y, x[:, None] - x)


def attention_distance(
    attention: jax.Array, grid: tuple[int, int], pixels_per_token: int, num_prefix_tokens: int
) -> jax.Array:
    """The distance from a patch to those that it attends to, weighted by attention, averaged over all patches.

    As in the code that its author published for figure 11 (google-research/vision_transformer, issue 162), the class
    token is left out as a query, and attention to it counts as distance 0: the weights of the patches are not scaled
    to sum to 1.

    Args:
      attention: weights after the softmax, `[..., num_tokens, num_tokens]`: of the query and of the key.
      grid: rows and columns of patches.
      pixels_per_token: side of the square of pixels that a token covers. It includes the ResNet of a hybrid.
      num_prefix_tokens: number of tokens before those of the patches.

    Returns:
      float32 `[...]`, in pixels.
    """
    between_patches = attention[..., num_prefix_tokens:, num_prefix_tokens:].astype(jnp.float32)
    return (between_patches * patch_distances(grid, pixels_per_token)).sum(axis=-1).mean(axis=-1)


def distance_model(weights: Weights | str | pathlib.Path, **options: Any) -> AttentionModel:
    """Makes the function from images uint8 `[images, height, width, 3]` to distances `[images, layers, heads]`.

    The figures show the mean over images: `distance_model("vit_l16_i21k")(images).mean(axis=0)`.

    Args:
      weights: from `vit_jax.weights.load`, or its argument.
      **options: of `AttentionModel`.
    """

    def measure(attention: list[jax.Array], _: jax.Array) -> jax.Array:
        tokens = (model.grid, model.pixels_per_token, model.num_prefix_tokens)
        return jnp.stack([attention_distance(layer, *tokens) for layer in attention], axis=1)

    model = AttentionModel(weights, measure, **options)
    return model


def draw_distances(distances: Mapping[str, np.ndarray]) -> "Figure":
    """Draws a dot for each head over the depth of the network, beside each other for several models.

    Args:
      distances: in pixels, `[layers, heads]` by title.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(distances), 3.9), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(distances), sharey=True))
    for axis, (title, of_model) in zip(axes, distances.items(), strict=True):
        for head, of_head in enumerate(np.asarray(of_model).T):
            label = f"head {head + 1}" if head < 3 else "..." if head == 3 else None
            axis.plot(np.arange(len(of_head)), of_head, ".", label=label)
        axis.set_title(title, fontsize=10, parse_math=False)
        axis.set_xlabel("network depth (layer)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="lower right", fontsize=8)
    axes[0].set_ylabel("mean attention distance (pixels)")
    axes[0].set_ylim(0, 1.1 * max(np.max(of_model) for of_model in distances.values()) or 1)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the subcommand."""
    add_weights(parser, several=True)
    add_images(parser)


def run(args: argparse.Namespace) -> int:
    """Measures all images and draws the picture; returns the exit status."""
    files, drawn = ImageFiles(args), {}
    for place in args.weights:
        weights = load_weights(place, args.model)
        model = distance_model(weights, **model_options(args, files))
        total, count = np.zeros(()), 0
        for _, distances in files.measure(model, "distance"):
            total, count = total + distances, count + 1
        height, width = model.preprocessing.image_size
        drawn[f"{title_of(weights)}\nimages {height}x{width}"] = total / count
    write_picture(args.output, draw_distances(drawn))
    print(f"Averaged over {count:,} images.")
    return files.exit_status()
