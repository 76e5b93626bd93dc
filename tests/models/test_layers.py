"""Activations stay on the devices of their examples for any split of the parameters."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from tests.conftest import DEVICES
from tests.models.tiny import fast_jit, make_images, random_params, tiny
from vit_jax.models import create_model
from vit_jax.models.layers import keep_on_batch_axis, platform

BATCH = 64
WIDTH = 32


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=DEVICES[:8])


def sizes_of_collectives(mesh, **attributes):
    """Numbers of elements that devices exchange for a model's gradients, with parameters split over `data`."""
    model = create_model(
        "ViT-Ti/16", num_classes=8, num_layers=2, hidden_dim=WIDTH, mlp_dim=2 * WIDTH, num_heads=2, **attributes
    )
    images = jax.ShapeDtypeStruct((BATCH, 64, 64, 3), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))

    def split(leaf):
        axis = next((axis for axis, length in enumerate(leaf.shape) if length % 8 == 0), None)
        spec = PartitionSpec(*([None] * axis + ["data"] if axis is not None else []))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(split, jax.eval_shape(model.init, jax.random.key(0), images)["params"])

    def loss(params, images):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return (model.apply({"params": params}, images)[0] ** 2).sum()

    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    program = jax.jit(jax.grad(loss), out_shardings=shardings).lower(params, images).compile().as_text()
    sent = re.findall(r"= (.*) (?:all-gather|all-to-all|all-reduce|collective-permute)\(", program)
    shapes = [shape for line in sent for shape in re.findall(r"\w+\[([\d,]*)\]", line)]
    return [math.prod(int(length) for length in shape.split(",") if length) for shape in shapes]


def test_with_split_parameters_no_activation_leaves_its_device(mesh):
    sent = sizes_of_collectives(mesh, scan_layers=True)
    one_tensor_of_tokens = BATCH * 17 * WIDTH
    assert 0 < max(sent) < one_tensor_of_tokens


def test_without_a_mesh_the_activation_is_unchanged():
    x = jnp.ones((2, 3))
    assert keep_on_batch_axis(x) is x


@pytest.fixture
def tpu():
    device = AbstractDevice(device_kind="TPU v3", num_cores=1, platform="tpu")
    return AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)


def test_platform_is_the_meshs_or_else_the_processes(tpu):
    with jax.sharding.use_abstract_mesh(tpu):
        assert platform() == "tpu"
    assert platform() == "cpu"


def test_a_model_laid_out_for_tpus_computes_the_same_without_flattening_tokens(tpu):
    model, images = tiny(num_layers=1), make_images(2, 8, 8, 3)
    params = random_params(model)

    def apply(params, images):
        return model.apply({"params": params}, images)[0]

    def apply_for_tpu(params, images):
        with jax.sharding.use_abstract_mesh(tpu):
            return apply(params, images)

    flattened = "tensor<2x5x16xf32>) -> tensor<10x16xf32>"  # 2 images of 5 tokens
    assert flattened not in jax.jit(apply_for_tpu).lower(params, images).as_text()
    assert flattened in jax.jit(apply).lower(params, images).as_text()
    actual, expected = (fast_jit(function)(params, images) for function in (apply_for_tpu, apply))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
