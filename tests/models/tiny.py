"""Models so small that a test takes a second, with random parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models import create_model

# A test runs a program once, so that it gains by compiling in half the time.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tiny(**overrides):
    """A ViT with patches of 4x4 pixels."""
    small = {"num_classes": 5, "num_layers": 2, "hidden_dim": 16, "mlp_dim": 32, "num_heads": 2}
    return create_model("ViT-Ti/4", **{**small, **overrides})


def make_images(*shape, seed=7):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@functools.cache
def param_shapes(model, *image_size):
    images = jnp.zeros((1, *(image_size or (8, 8)), 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images))["params"]


def shapes_by_path(tree):
    """Shapes by names such as "head/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(entry.key for entry in path): leaf.shape for path, leaf in leaves}


def fill(shapes, seed=0):
    """Random parameters, without the zeros and ones of the initialisation, which hide mistakes."""
    generator = np.random.default_rng(seed)

    def value(path, leaf):
        array = 0.3 * generator.normal(size=leaf.shape)
        return (array + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(value, shapes)


def random_params(model, *image_size, seed=0):
    return fill(param_shapes(model, *image_size), seed)


@functools.cache
def compiled_apply(model, train):
    return fast_jit(functools.partial(model.apply, train=train))


def apply(model, params, images, *, train=False):
    """Logits and intermediates."""
    return compiled_apply(model, train)({"params": params}, images, rngs={"dropout": jax.random.key(0)})


def loss_and_grads(model, params, images):
    """The sum of the squared logits in training, and its gradient with regard to the parameters."""

    def loss(params):
        return jnp.square(model.apply({"params": params}, images, train=True)[0]).sum()

    return fast_jit(jax.value_and_grad(loss))(params)


def residual_size(model, params, images):
    """How many numbers the forward pass keeps for the backward pass, the parameters themselves included."""

    def loss(params):
        return model.apply({"params": params}, images, train=True)[0].sum()

    backward = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    return sum(leaf.size for leaf in jax.tree.leaves(backward))


def assert_trees_close(actual, expected, **tolerances):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerances), actual, expected)
