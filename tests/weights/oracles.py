"""Shared parts of the comparisons with other libraries."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.weights import from_params, save


def outputs_of(weights, images):
    """Our logits and intermediates."""
    logits, out = jax.jit(weights.spec.create().apply)({"params": weights.params}, images)
    return np.asarray(logits), out


def outputs_and_gradients_of(weights, images, labels):
    """Our logits and intermediates, by name; our gradients of the mean cross-entropy, by our names."""
    model = weights.spec.create()

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients(params):
        logits, out = model.apply({"params": params}, images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array(labels)).mean()
        return loss, {**out, "logits": logits}

    gradients, out = gradients(weights.params)
    return jax.tree.map(np.asarray, out), flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, gradients), sep="/")


def unflatten(arrays):
    return flax.traverse_util.unflatten_dict(arrays, sep="/")


def in_released_layout(weights, gradients, path):
    """Gradients by our names in the released layout, which they are turned into as weights are."""
    spec = weights.spec
    gradients = from_params(spec.name, unflatten(gradients), image_size=spec.image_size or 64, **spec.overrides)
    with np.load(save(gradients, path)) as file:
        return dict(file)


def assert_same_arrays(actual, expected):
    """Same names, and same bits under each."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def is_key_bias(name):
    """Whether an array shifts all keys equally, which softmax ignores: its gradient is only rounding."""
    return name.endswith("key/bias")
