"""Layers shared by several models, and all that models know about devices: their kind, and the mesh's batch axis."""

import math
import re
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from vit_jax.errors import UserError, unknown_name

BATCH_AXIS = "data"
LAYER_NORM_EPSILON = 1e-6  # as in the released code
GELUS = ("tanh", "exact")

# The activations of a block that are kept for the backward pass; the others are recomputed.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def normalize_images(images: jax.Array) -> jax.Array:
    """Maps images with values from 0 to 255, uint8 or float, of any shape to the models' input, float32 in [-1, 1].

    Runs on the device, because transferring bytes takes a quarter of the time.
    """
    return images.astype(jnp.float32) / 127.5 - 1.0


def platform() -> str:
    """The platform that the traced computation is compiled for: "cpu", "gpu" or "tpu".

    It is that of the mesh in use (`jax.sharding.use_abstract_mesh`), because a plan compiles for other devices; without
    a mesh, that of this process's default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def keep_on_batch_axis(x: jax.Array) -> jax.Array:
    """Pins the batch, the leading axis of an activation, to the mesh's axis `data`.

    If parameters are split along `data` too, XLA chooses which operand of a product to gather. By itself, it gathers
    the examples of all devices instead of one layer's parameters. XLA still chooses the other axes.

    Args:
      x: `[batch, ...]`.

    Returns:
      The same values; `x` itself if no mesh is in use.
    """
    if BATCH_AXIS not in jax.sharding.get_abstract_mesh().axis_names:
        return x
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXIS, *others))


class Dense(nn.Module):
    """A dense layer over one or several trailing axes, in the form that suits the platform.

    XLA for CPUs and GPUs multiplies matrices: with more axes it transposes the activations for the kernel's gradient,
    which costs 10 % of the time on a CPU. XLA for TPUs keeps the axes: it stores arrays in tiles, and flattening tokens
    of 197 rows per image would move them.

    Attributes:
      inputs: trailing axes of the input, such as `(width,)` or `(num_heads, head_dim)`.
      outputs: trailing axes of the output.
      bias_init: initializer of the bias.
      dtype, param_dtype: dtypes of the computation and of the parameters.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bias_init: Initializer = nn.initializers.zeros
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., *inputs]` to `[..., *outputs]`."""
        batch = x.shape[: x.ndim - len(self.inputs)]
        matrix = (math.prod(self.inputs), math.prod(self.outputs))

        def kernel_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
            return nn.initializers.xavier_uniform()(key, matrix, dtype).reshape(shape)  # the matrix sets Xavier's bound

        kernel = self.param("kernel", kernel_init, (*self.inputs, *self.outputs), self.param_dtype)
        bias = self.param("bias", self.bias_init, self.outputs, self.param_dtype)
        x, kernel, bias = (array.astype(self.dtype) for array in (x, kernel, bias))
        if platform() == "tpu":
            return jnp.tensordot(x, kernel, axes=len(self.inputs)) + bias
        y = x.reshape(-1, matrix[0]) @ kernel.reshape(matrix) + bias.reshape(-1)
        return y.reshape(*batch, *self.outputs)


def gelu(x: jax.Array, kind: str) -> jax.Array:
    """GELU: "tanh" is the approximation of the released models, "exact" uses the error function.

    Except on TPUs (docs/tpu_speed.md), the backward pass recomputes it: keeping its intermediates costs memory, and
    more time than it saves.
    """

    def compute(x: jax.Array) -> jax.Array:
        return nn.gelu(x, approximate=kind == "tanh")

    return compute(x) if platform() == "tpu" else jax.checkpoint(compute)(x)


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between them (the MLP of equation 3).

    Attributes:
      mlp_dim: width of the hidden layer.
      gelu: "tanh", the approximation of the released models, or "exact".
      dropout_rate: dropout after each dense layer.
      deterministic: whether dropout is off.
      dtype, param_dtype: dtypes of the computation and of the parameters.
    """

    mlp_dim: int
    gelu: str = "tanh"
    dropout_rate: float = 0.0
    deterministic: bool = True
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., hidden_dim]` to the same shape."""
        hidden_dim, bias_init = x.shape[-1], nn.initializers.normal(stddev=1e-6)
        x = Dense((hidden_dim,), (self.mlp_dim,), bias_init, self.dtype, self.param_dtype, name="Dense_0")(x)
        x = gelu(x, self.gelu)
        x = nn.Dropout(self.dropout_rate, deterministic=self.deterministic)(x)
        x = Dense((self.mlp_dim,), (hidden_dim,), bias_init, self.dtype, self.param_dtype, name="Dense_1")(x)
        return nn.Dropout(self.dropout_rate, deterministic=self.deterministic)(x)


def drop_branch(branch: jax.Array, rate: jax.Array | float, key: jax.Array) -> jax.Array:
    """Stochastic depth (Huang et al., 2016): zeroes the branch of some examples and scales up the rest.

    Args:
      branch: `[batch, num_tokens, width]`.
      rate: the probability that an example skips the branch.
      key: key of the random numbers.
    """
    keep_rate = jnp.asarray(1.0 - rate, jnp.float32)
    keep = jax.random.bernoulli(key, keep_rate, (branch.shape[0], 1, 1))
    return jnp.where(keep, branch / keep_rate, 0).astype(branch.dtype)


def linear_head(num_classes: int, head_bias: float, *, dtype: DTypeLike, param_dtype: DTypeLike) -> nn.Dense:
    """Makes the classification head `head/{kernel,bias}` of all models. Call it inside the module that owns it.

    Args:
      num_classes: width of the logits.
      head_bias: initial value of the bias; the kernel begins at 0 (section 3.2).
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """
    return nn.Dense(
        num_classes,
        kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(head_bias),
        name="head",
        dtype=dtype,
        param_dtype=param_dtype,
    )


def check_names(model: Any, **known: Collection[str]) -> None:
    """Raises `UserError` if an attribute of the model is not one of its known names."""
    for attribute, names in known.items():
        if (given := getattr(model, attribute)) not in names:
            raise unknown_name(attribute, given, names)


def check_sizes(model: Any) -> None:
    """Raises `UserError` if a Transformer's dimensions or rates are impossible."""
    for attribute in ("patch_size", "num_layers", "hidden_dim", "mlp_dim", "num_heads"):
        if (value := getattr(model, attribute)) < 1:
            raise UserError(f"{attribute} must be at least 1, got {value}.")
    if model.hidden_dim % model.num_heads:
        raise UserError(f"hidden_dim {model.hidden_dim} is not divisible by num_heads {model.num_heads}.")
    for attribute in ("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate"):
        if not 0 <= (value := getattr(model, attribute, 0.0)) < 1:
            raise UserError(f"{attribute} must be at least 0 and less than 1, got {value}.")


def stack_layers(params: dict) -> dict:
    """Converts the parameters of unrolled layers to those of `scan_layers=True`.

    Args:
      params: a ViT's parameter tree with `Transformer/encoderblock_<l>`.

    Returns:
      A new tree with one `Transformer/encoderblock`, whose arrays are `[num_layers, ...]`.
    """
    encoder = dict(params["Transformer"])
    num_layers = sum(re.fullmatch(r"encoderblock_\d+", name) is not None for name in encoder)
    layers = [encoder.pop(f"encoderblock_{layer}") for layer in range(num_layers)]
    encoder["encoderblock"] = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    return {**params, "Transformer": encoder}


def unstack_layers(params: dict) -> dict:
    """Inverse of `stack_layers`."""
    encoder = dict(params["Transformer"])
    stack = encoder.pop("encoderblock")
    for layer in range(jax.tree.leaves(stack)[0].shape[0]):
        encoder[f"encoderblock_{layer}"] = jax.tree.map(lambda array, layer=layer: array[layer], stack)
    return {**params, "Transformer": encoder}
