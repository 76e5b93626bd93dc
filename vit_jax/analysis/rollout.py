"""Attention rollout: where in an image its representation comes from (figures 6 and 14; appendix D.8)."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import cv2
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
from vit_jax.console import show_name
from vit_jax.data.transforms import ImageError
from vit_jax.errors import UserError
from vit_jax.weights import Preprocessing, Weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAIRS_PER_ROW = 4
_SHORTEST, _LONGEST = 224, 448  # the longer side of a drawn image, in pixels
_TALLEST = 1.5  # row, over the width of an image
_NAME_LENGTH = 28


def attention_rollout(attention: Sequence[jax.Array]) -> jax.Array:
    """How much of each token's input is in each token's output, by attention rollout (Abnar and Zuidema, 2020).

    The weights of a layer are averaged over its heads. The identity, for the residual connection, is added, each row is
    divided by its sum, and the matrices of all layers are multiplied.

    Args:
      attention: weights of each layer from the first on, `[batch, num_heads, num_tokens, num_tokens]`: of the query
        and of the key.

    Returns:
      float32 `[batch, num_tokens, num_tokens]`: of the output and of the input token; rows sum to 1.
    """
    product = None
    for of_layer in attention:
        weights = of_layer.astype(jnp.float32).mean(axis=1) + jnp.eye(of_layer.shape[-1])
        weights = weights / weights.sum(axis=-1, keepdims=True)
        product = weights if product is None else jnp.matmul(weights, product, precision="highest")
    if product is None:
        raise UserError("attention_rollout needs the attention weights of at least one layer.")
    return product


def rollout_model(weights: Weights | str | pathlib.Path, **options: Any) -> AttentionModel:
    """Makes the function from images uint8 `[images, height, width, 3]` to masks `[images, rows, columns]`.

    A mask is the share of each patch in the representation: the class token's row of the rollout. Without class token,
    it is the mean over the rows of all tokens (`pool="gap"`), or their mean weighted by the attention of the pooling
    head, averaged over its heads (`pool="map"`); these two are ours, since the paper only shows class tokens. A mask
    sums to 1, less the class token's own share.

    Args:
      weights: from `vit_jax.weights.load`, or its argument.
      **options: of `AttentionModel`.
    """

    def measure(attention: list[jax.Array], pooling: jax.Array) -> jax.Array:
        shares = jnp.einsum("bq,bqk->bk", pooling, attention_rollout(attention), precision="highest")
        return shares[:, model.num_prefix_tokens :].reshape(-1, *model.grid)

    model = AttentionModel(weights, measure, **options)
    return model


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Darkens an image where its mask is small.

    As in the code that its author published for figure 6 (google-research/vision_transformer, issue 27), the mask is
    enlarged, blurred by a Gaussian whose standard deviation is a patch, and scaled to values from 0 to 1.

    Args:
      image: uint8 `[height, width, 3]`.
      mask: `[rows, columns]`, over the whole image.

    Returns:
      An array like image.
    """
    (height, width), (rows, columns) = image.shape[:2], mask.shape
    large = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    large = cv2.GaussianBlur(large, (0, 0), sigmaX=width / columns, sigmaY=height / rows)
    smallest, largest = large.min(), large.max()
    is_flat = largest - smallest <= 1e-5 * abs(largest)  # no more than rounding
    scaled = np.ones_like(large) if is_flat else (large - smallest) / (largest - smallest)
    return np.rint(image * scaled[:, :, None]).astype(np.uint8)


def draw_rollouts(images: Sequence[np.ndarray], masks: Sequence[np.ndarray], names: Sequence[str] = ()) -> "Figure":
    """Draws each image, and beside it where the representation comes from.

    Args:
      images: uint8 `[height, width, 3]`, each of its own size.
      masks: `[rows, columns]`, over the whole image each.
      names: titles of the images.
    """
    from matplotlib.figure import Figure

    across = min(_PAIRS_PER_ROW, len(images))
    rows = [images[start : start + across] for start in range(0, len(images), across)]
    heights = [min(_TALLEST, max(image.shape[0] / image.shape[1] for image in row)) for row in rows]
    size = (3.2 * across, 1.6 * sum(heights) + 0.25 * len(rows) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), 2 * across, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis in axes.ravel():
        axis.axis("off")
        axis.set_anchor("N")
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        row, column = divmod(number, across)
        shown = {"input": image, "attention": overlay(image, mask)}
        texts = {"input": names[number] if names else "", "attention": ""}
        for axis, heading in zip(axes[row, 2 * column : 2 * column + 2], shown, strict=True):
            axis.imshow(shown[heading])
            title = f"{heading}\n{texts[heading]}" if row == 0 else texts[heading]
            axis.set_title(title, fontsize=7, parse_math=False)
    return figure


def seen_part(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """The part of an image that the model sees, in the image's proportions and at a size for drawing.

    Args:
      image: uint8 `[height, width, 3]`.
      preprocessing: of the model. If it resizes all images to one shape, this undoes the distortion.
    """
    if preprocessing.resize == "none":
        return image
    sides = np.asarray(image.shape[:2] if preprocessing.resize == "square" else preprocessing.image_size)
    scale = np.clip(sides.max(), _SHORTEST, _LONGEST) / sides.max()
    height, width = np.maximum(1, np.rint(scale * sides).astype(int))
    try:
        return preprocessing.at((int(height), int(width)))(image)
    except ImageError:  # so long that it would be too large at this size
        return preprocessing(image)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the subcommand."""
    add_weights(parser)
    add_images(parser)
    text = "images in a picture; more images make more pictures, rollout_2.png, ... (default: 24)"
    parser.add_argument("--per_picture", type=int, default=24, help=text)


def run(args: argparse.Namespace) -> int:
    """Draws the pictures, each when its images are done; returns the exit status."""
    if args.per_picture < 1:
        raise UserError(f"--per_picture must be at least 1, got {args.per_picture}.")
    files, weights = ImageFiles(args), load_weights(args.weights, args.model)
    model = rollout_model(weights, **model_options(args, files))
    number = 1
    page: list[tuple[str, np.ndarray]] = []

    def write() -> None:
        nonlocal page, number
        images = [seen_part(files.read(path, model.preprocessing), model.preprocessing) for path, _ in page]
        names = [show_name(pathlib.Path(path).name)[-_NAME_LENGTH:] for path, _ in page]
        figure = draw_rollouts(images, [mask for _, mask in page], names)
        figure.suptitle(title_of(weights), fontsize=10, parse_math=False)
        write_picture(args.output if number == 1 else f"{args.output[:-4]}_{number}.png", figure)
        page, number = [], number + 1

    for measured in files.measure(model, "rollout"):
        page.append(measured)
        if len(page) == args.per_picture:
            write()
    if page:
        write()
    return files.exit_status()
