"""What a model predicts of corrupted patches (masked patch prediction, appendix B.1.2)."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

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
from vit_jax.errors import UserError
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives.masked_patches import NUM_COLOURS, MaskedPatches, colour_of, patches_of, target_of
from vit_jax.predict import params_at
from vit_jax.weights import Weights, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GREY = 127  # of masked patches
_HEADINGS = ("input", "corrupted", "predicted")
_NAME_LENGTH = 28


class MaskedPredictions:
    """Images as a model of masked patch prediction sees and predicts them.

        model = MaskedPredictions("runs/masked")
        model(images)  # [images, 3, height, width, 3]

    Attributes:
      weights: the model's weights, with the head that predicts patches.
      preprocessing: maps an image to the model's input.
      batch_size: images per batch.
    """

    def __init__(
        self,
        weights: Weights | str | pathlib.Path,
        *,
        corruption_rate: float = 0.5,
        seed: int = 0,
        batch_size: int = 32,
        image_size: tuple[int, int] | int | None = None,
        dtype: str = "float32",
    ):
        """Places the parameters on a device.

        Args:
          weights: from `vit_jax.weights.load` with `predicts_patches`, or its argument.
          corruption_rate: share of the patches to corrupt.
          seed: of the choice of patches, which differs from image to image.
          batch_size: images per batch.
          image_size: height and width, or side, of the input, in pixels; None: the weights' own.
          dtype: dtype of the model's computation.

        Raises:
          UserError: the weights do not predict patches, or do not fit the image size.
        """
        weights = weights if isinstance(weights, Weights) else load(weights, predicts_patches=True)
        model: Any = weights.spec.create(dtype=dtype)
        if not isinstance(model, VisionTransformer) or not model.predict_patches:
            raise UserError(
                f"{weights.source or 'this'} ({weights.spec}) has no head that predicts patches. Use a run of "
                "configs/masked_patches.py."
            )
        target = target_of(model.num_classes)
        objective = MaskedPatches(model.pixels_per_token, target, corruption_rate)
        self.weights, self.batch_size = weights, batch_size
        self.preprocessing = weights.preprocessing if image_size is None else weights.preprocessing.at(image_size)
        self._key, self._num_batches = jax.random.key(seed), 0
        self._params = params_at(weights, model, self.preprocessing.image_size)
        normalize = self.preprocessing.normalize

        @jax.jit
        def predict(params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
            arrays = objective.prepare({"image": images}, key).arrays
            outputs, _ = model.apply(
                {"params": params}, normalize(images), corruption=(arrays["masked"], arrays["source"])
            )
            return draw_predictions(images, arrays, outputs, objective)

        self._predict = predict

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Corrupts and predicts images uint8 `[images, height, width, 3]`; see `draw_predictions`."""
        results = []
        for start in range(0, len(images), self.batch_size):
            key = jax.random.fold_in(self._key, self._num_batches)
            results.append(np.asarray(self._predict(self._params, images[start : start + self.batch_size], key)))
            self._num_batches += 1
        return np.concatenate(results)


def draw_predictions(
    images: jax.Array, arrays: dict[str, jax.Array], outputs: jax.Array, objective: MaskedPatches
) -> jax.Array:
    """Makes images of what the model sees and of what it predicts.

    Args:
      images: uint8 `[batch, height, width, 3]`.
      arrays: from `MaskedPatches.prepare`.
      outputs: of the model, `[batch, num_patches, num_outputs]`.
      objective: what it learned.

    Returns:
      uint8 `[batch, 3, height, width, 3]`: the image; the same with masked patches in grey and the pixels of other
      patches where their embeddings are; the image with its corrupted patches as predicted, of colours in classes the
      centre of the likeliest.
    """
    batch, height, width, _ = images.shape
    side = objective.patch_size
    patches = patches_of(images, side)
    seen = jnp.take_along_axis(patches, arrays["source"][:, :, None], axis=1)
    seen = jnp.where(arrays["masked"][:, :, None], jnp.uint8(_GREY), seen)
    if objective.target == "pixels":
        predicted = jnp.clip(jnp.rint((outputs + 1) * 127.5), 0, 255)
    else:
        colours = colour_of(outputs.reshape(*outputs.shape[:2], -1, NUM_COLOURS).argmax(axis=-1))
        cells = round(colours.shape[2] ** 0.5)
        colours = colours.reshape(*colours.shape[:2], cells, cells, 3)
        colours = colours.repeat(side // cells, axis=2).repeat(side // cells, axis=3)
        predicted = colours.reshape(patches.shape)
    predicted = jnp.where(arrays["corrupted"][:, :, None], predicted.astype(jnp.uint8), patches)

    def image_of(patches: jax.Array) -> jax.Array:
        x = patches.reshape(batch, height // side, width // side, side, side, 3)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, 3)

    return jnp.stack([images, image_of(seen), image_of(predicted)], axis=1)


def draw(predictions: Sequence[np.ndarray], names: Sequence[str] = ()) -> "Figure":
    """Draws images, what the model sees of them, and what it predicts.

    Args:
      predictions: uint8 `[3, height, width, 3]` each, from `draw_predictions`.
      names: titles of the images.
    """
    from matplotlib.figure import Figure

    across = min(2, len(predictions))
    down = -(-len(predictions) // across)
    figure = Figure(figsize=(4.5 * across, 1.75 * down + 0.4), layout="constrained")
    axes = figure.subplots(down, 3 * across, squeeze=False)
    for axis in axes.ravel():
        axis.axis("off")
    for number, images in enumerate(predictions):
        row, column = divmod(number, across)
        for position, (image, heading) in enumerate(zip(images, _HEADINGS, strict=True)):
            axis = axes[row, 3 * column + position]
            axis.imshow(image, interpolation="nearest")
            if row == 0:
                axis.annotate(heading, (0.5, 1), (0, 16), "axes fraction", "offset points", ha="center", fontsize=9)
        if names:
            axes[row, 3 * column].set_title(names[number], fontsize=6, parse_math=False)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the subcommand."""
    add_weights(parser)
    add_images(parser)
    parser.set_defaults(max_images=16)
    parser.add_argument("--corruption_rate", type=float, default=0.5, help="share of the patches (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of patches (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Draws the picture; returns the exit status."""
    files = ImageFiles(args)
    weights = load_weights(args.weights, args.model, predicts_patches=True)
    options = model_options(args, files)
    model = MaskedPredictions(weights, corruption_rate=args.corruption_rate, seed=args.seed, **options)
    predictions, names = [], []
    for path, images in files.measure(model, "predict"):
        predictions.append(images)
        names.append(show_name(pathlib.Path(path).name)[-_NAME_LENGTH:])
    figure = draw(predictions, names)
    figure.suptitle(title_of(weights), fontsize=10, parse_math=False)
    write_picture(args.output, figure)
    return files.exit_status()
