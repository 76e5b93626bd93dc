"""Weights of tiny models with random parameters."""

import functools

import flax.traverse_util
import numpy as np

from tests.models.tiny import apply
from vit_jax.weights import from_params
from vit_jax.weights.identify import ModelSpec, expected_shapes

TINY = {"num_layers": 2, "hidden_dim": 16, "mlp_dim": 16, "num_heads": 2}


@functools.cache
def make_weights(name="ViT-Ti/4", size=(8, 12), num_classes=3, dtype="float32", **overrides):
    """A ViT has 2 x 3 patches of 4 x 4 pixels."""
    attributes = ({"stages": (1,)} if name.startswith("R50x") else TINY) | overrides
    rng = np.random.default_rng(0)
    params = {
        path: (0.5 * rng.normal(size=shape)).astype(dtype)
        for path, shape in expected_shapes(ModelSpec(name, num_classes, attributes), size).items()
    }
    return from_params(name, flax.traverse_util.unflatten_dict(params, sep="/"), image_size=size, **attributes)


def make_pixels(*shape):
    return np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)


def attention_of(weights, pixels):
    """The attention weights of each layer, float64 `[images, heads, tokens, tokens]`, and all intermediates."""
    model = weights.spec.create(return_attention=True)
    _, out = apply(model, weights.params, weights.preprocessing.normalize(pixels))
    return [np.float64(out[f"attention_{layer}"]) for layer in range(model.num_layers)], out
