"""Attention weights of a ViT or hybrid, reduced to a measure of each image on the device."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import sharding
from vit_jax.console import format_bytes
from vit_jax.errors import UserError
from vit_jax.models.attention import MultiHeadDotProductAttention
from vit_jax.models.vit import VisionTransformer
from vit_jax.predict import params_at
from vit_jax.weights import Weights, load

# From the attention weights of each layer, float32 `[batch, num_heads, num_tokens, num_tokens]`, and the weights of the
# tokens in the representation, float32 `[batch, num_tokens]`, to an array `[batch, ...]`.
Measure = Callable[[list[jax.Array], jax.Array], jax.Array]

# Attention weights of one layer: for a batch, which is made to fit, and for one image, which may not be split.
_BATCH_BYTES, _IMAGE_BYTES = 2**29, 2**33


def load_transformer(weights: Weights | str | pathlib.Path, what: str) -> Weights:
    """Loads weights unless they are loaded already; raises `UserError` if they are those of a ResNet.

    Args:
      weights: from `vit_jax.weights.load`, or its argument.
      what: what is to be drawn, for the error.
    """
    weights = weights if isinstance(weights, Weights) else load(weights)
    if "embedding/kernel" not in weights.arrays:
        raise UserError(
            f"{weights.source or 'this'} ({weights.spec}) is a ResNet, which has no {what}. Use weights of a ViT or a "
            "hybrid, such as vit_b16_i21k."
        )
    return weights


class AttentionModel:
    """A measure of the attention weights in a ViT or hybrid, compiled once for all batches.

        model = AttentionModel("augreg_b16_i21k_in1k_384", lambda attention, pooling: attention[0].mean(axis=1))
        model(images)  # of the first layer, averaged over heads: [images, num_tokens, num_tokens]

    Attributes:
      weights: the model's weights.
      preprocessing: maps an image to the model's input.
      batch_size: images per batch, a multiple of the number of devices.
      grid: rows and columns of patches.
      pixels_per_token: side of the square of pixels that a token covers.
      num_prefix_tokens: number of tokens before those of the patches: 1 with a class token, or else 0.
    """

    def __init__(
        self,
        weights: Weights | str | pathlib.Path,
        measure: Measure,
        *,
        batch_size: int = 32,
        image_size: tuple[int, int] | int | None = None,
        dtype: str = "float32",
    ):
        """Places the parameters on all devices.

        Args:
          weights: from `vit_jax.weights.load`, or its argument: a name, path or address.
          measure: traced by JAX, in float32 whatever the dtype of the model.
          batch_size: images per batch at most; fewer if a layer's attention weights would be larger than 0.5 GB.
          image_size: height and width, or side, of the input, in pixels; position embeddings are interpolated. None:
            the weights' own.
          dtype: dtype of the model's computation.

        Raises:
          UserError: the weights are of a ResNet or an axial model, or do not fit the image size, or the attention
            weights of an image of this size are larger than 8 GiB.
        """
        weights = load_transformer(weights, "attention weights")
        model = weights.spec.create(dtype=dtype)
        if not isinstance(model, VisionTransformer):
            raise UserError(
                f"{weights.source or 'this'} ({weights.spec}) attends within rows and columns, not from each patch to "
                "all others. Use weights of a ViT or a hybrid, such as vit_b16_i21k."
            )
        model = model.clone(return_attention=True)
        self.weights = weights
        self.preprocessing = weights.preprocessing if image_size is None else weights.preprocessing.at(image_size)
        self.grid = model.grid(*self.preprocessing.image_size)
        self.pixels_per_token, self.num_prefix_tokens = model.pixels_per_token, model.num_prefix_tokens

        mesh = sharding.make_mesh()
        num_tokens = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        image_bytes = 4 * model.num_heads * num_tokens**2
        if image_bytes > _IMAGE_BYTES:
            height, width = self.preprocessing.image_size
            raise UserError(
                f"images of {height}x{width} pixels are {num_tokens:,} tokens, and a layer's attention weights "
                f"{format_bytes(image_bytes)} for each image; at most {format_bytes(_IMAGE_BYTES)} are computed. Use a "
                "smaller image size."
            )
        fitting = max(1, _BATCH_BYTES // image_bytes)
        num_devices = mesh.devices.size
        self.batch_size = -(-min(batch_size, fitting * num_devices) // num_devices) * num_devices
        self._sharding = sharding.batch_sharding(mesh)
        params = params_at(weights, model, self.preprocessing.image_size)
        self._params = jax.device_put(params, sharding.replicated(mesh))
        normalize = self.preprocessing.normalize

        def measured(params: dict[str, Any], images: jax.Array) -> jax.Array:
            _, out = model.apply({"params": params}, normalize(images))
            attention = [out[f"attention_{layer}"].astype(jnp.float32) for layer in range(model.num_layers)]
            return measure(attention, pooling_weights(model, params, out["encoded"]))

        self._measured = jax.jit(measured)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Measures any number of images, uint8 `[images, height, width, 3]`; the result begins with the same axis."""
        results = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            padding = np.zeros((self.batch_size - len(batch), *batch.shape[1:]), batch.dtype)
            placed = sharding.global_batch({"image": np.concatenate([batch, padding])}, self._sharding)["image"]
            results.append(np.asarray(self._measured(self._params, placed))[: len(batch)])
        return np.concatenate(results)


def pooling_weights(model: VisionTransformer, params: dict[str, Any], encoded: jax.Array) -> jax.Array:
    """Weights of the tokens in the representation of an image, float32 `[batch, num_tokens]`; they sum to 1.

    The class token alone, all tokens alike (`pool="gap"`), or the mean over the heads of the pooling attention
    (`pool="map"`).

    Args:
      model: the model.
      params: its parameters.
      encoded: the intermediate of this name, `[batch, num_tokens, hidden_dim]`.
    """
    batch, num_tokens, _ = encoded.shape
    if model.pool == "cls":
        return jnp.zeros((batch, num_tokens)).at[:, 0].set(1.0)
    if model.pool == "gap":
        return jnp.full((batch, num_tokens), 1 / num_tokens)
    head = params["MAPHead_0"]
    probe = jnp.broadcast_to(head["probe"].astype(encoded.dtype), (batch, *head["probe"].shape[1:]))
    attention: Any = MultiHeadDotProductAttention(model.num_heads, return_weights=True, dtype=model.dtype)
    _, weights = attention.apply({"params": head["MultiHeadDotProductAttention_0"]}, probe, encoded)
    return weights.astype(jnp.float32).mean(axis=1)[:, 0]
