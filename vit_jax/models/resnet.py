"""ResNets with group normalisation and weight-standardised convolutions: BiT (Kolesnikov et al., 2020) and hybrids.

`BitResNet` is pre-activation ("v2"), as released for BiT; the feature map of hybrids is post-activation ("v1"), as
released for ViT. Their parameters:

    BiT      root_block/conv_root/kernel
             block<s>/unit<uu>/{gn1,gn2,gn3}/{scale,bias}, {conv1,conv2,conv3,conv_proj}/kernel
             norm_pre_head/{scale,bias}
             head/{kernel,bias}
    hybrids  conv_root/kernel, gn_root/{scale,bias}
             block<s>/unit<u>/{conv1,conv2,conv3,conv_proj}/kernel, {gn1,gn2,gn3,gn_proj}/{scale,bias}

Hybrids have the released names; `weights` maps BiT's TensorFlow names.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.models.layers import check_names, keep_on_batch_axis, linear_head

# Units of the four stages (He et al., 2016; R26 is AugReg's, R200 is of table 6).
UNITS_BY_DEPTH = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
ROOT_WIDTH = 64  # at width factor 1
EXPANSION = 4  # width of a unit's output over that of its 3x3 convolution
REMATS = ("none", "full")
ROOT_PADDINGS = ("zeros", "lowest")
HYBRID_EPSILONS = {"std_epsilon": 1e-5}  # of `standardize_kernel`


def standardize_kernel(kernel: jax.Array, *, std_epsilon: float = 0.0, variance_epsilon: float = 0.0) -> jax.Array:
    """Weight standardisation (Qiao et al., 2019): mean 0 and variance 1 for each output channel.

    The two families of released weights were trained with different guards against division by 0.

    Args:
      kernel: `[height, width, in_channels, out_channels]`.
      std_epsilon: added to the standard deviation (the hybrids').
      variance_epsilon: added to the variance (BiT's).
    """
    kernel = kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)
    variance = jnp.square(kernel).mean(axis=(0, 1, 2), keepdims=True)
    return kernel / (jnp.sqrt(variance + variance_epsilon) + std_epsilon)


class StdConv(nn.Module):
    """A convolution without bias whose kernel is standardised.

    Attributes:
      features: output channels.
      kernel_size: side of the kernel.
      stride: stride of rows and columns.
      padding: on each side, in pixels; None pads as TensorFlow's "SAME" does.
      epsilons: arguments of `standardize_kernel`.
      dtype: dtype of the convolution; kernels are standardised in the parameters' dtype.
      param_dtype: dtype of the kernel.
    """

    features: int
    kernel_size: int
    epsilons: dict[str, float]
    stride: int = 1
    padding: int | None = None
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height / stride, width / stride, features]`."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
        kernel = standardize_kernel(kernel, **self.epsilons)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME" if self.padding is None else [(self.padding, self.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class BitUnit(nn.Module):
    """A bottleneck unit of BiT: normalisation and activation come before each convolution.

    Attributes:
      width: width of the 3x3 convolution; the output is `EXPANSION` times as wide.
      stride: stride of the 3x3 convolution.
      dtype, param_dtype: dtypes of the computation and of the parameters.
    """

    width: int
    stride: int = 1
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height / stride, width / stride, 4 * self.width]`."""
        norm, conv = bit_layers(self.dtype, self.param_dtype)
        residual = x
        x = nn.relu(norm(name="gn1")(x))
        if residual.shape[-1] != EXPANSION * self.width or self.stride != 1:
            residual = conv(EXPANSION * self.width, 1, stride=self.stride, padding=0, name="conv_proj")(x)
        x = conv(self.width, 1, padding=0, name="conv1")(x)
        x = nn.relu(norm(name="gn2")(x))
        x = conv(self.width, 3, stride=self.stride, padding=1, name="conv2")(x)
        x = nn.relu(norm(name="gn3")(x))
        x = conv(EXPANSION * self.width, 1, padding=0, name="conv3")(x)
        return x + residual


class BitRoot(nn.Module):
    """BiT's root: a 7x7 convolution and a max-pooling, both of stride 2.

    Attributes:
      width: output channels.
      padding: values around the input of the max-pooling. "zeros", so that no border pixel is negative, as in the
        released BiT; or "lowest", the lowest number, which never wins, as in big_vision.
      dtype, param_dtype: dtypes of the computation and of the parameters.
    """

    width: int
    padding: str = "zeros"
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height / 4, width / 4, self.width]`."""
        _, conv = bit_layers(self.dtype, self.param_dtype)
        x = conv(self.width, 7, stride=2, padding=3, name="conv_root")(x)
        if self.padding == "zeros":
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            return nn.max_pool(x, (3, 3), strides=(2, 2))
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def bit_layers(dtype: DTypeLike, param_dtype: DTypeLike) -> tuple[Any, Any]:
    """Group normalisation and convolution with BiT's constants."""
    dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
    norm = functools.partial(nn.GroupNorm, num_groups=32, epsilon=1e-5, use_fast_variance=False, **dtypes)
    return norm, functools.partial(StdConv, epsilons={"variance_epsilon": 1e-10}, **dtypes)


class BitResNet(nn.Module):
    """BiT: the ResNet that the paper compares with (section 4.1).

    Attributes:
      num_classes: width of the logits; 0 omits the head and returns the representation instead.
      stages: number of units of each stage.
      width_factor: multiplies all widths.
      head_bias: initial value of the head's bias.
      root_padding: padding of the root's max-pooling, "zeros" or "lowest"; see `BitRoot`.
      remat: "full" recomputes each unit's activations in the backward pass; "none" keeps them.
      dtype, param_dtype: dtypes of the computation and of the parameters; the logits are float32.
    """

    num_classes: int
    stages: tuple[int, ...]
    width_factor: int = 1
    head_bias: float = 0.0
    root_padding: str = "zeros"
    remat: str = "none"
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    def __post_init__(self):
        super().__post_init__()
        check_names(self, remat=REMATS, root_padding=ROOT_PADDINGS)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Classifies images.

        Args:
          images: `[batch, height, width, channels]`, floating point, values in [-1, 1].
          train: has no effect: there is neither dropout nor batch normalisation.

        Returns:
          logits `[batch, num_classes]`, float32, and intermediates by name: `root` and `block<s>` `[batch, rows,
          columns, channels]`, `feature_map` after the last normalisation, `pre_logits` `[batch, channels]`, its mean
          over rows and columns.
        """
        del train
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm, _ = bit_layers(self.dtype, self.param_dtype)
        width = ROOT_WIDTH * self.width_factor
        out = {}
        x = out["root"] = BitRoot(width, self.root_padding, name="root_block", **dtypes)(images.astype(self.dtype))
        for stage, num_units in enumerate(self.stages):
            x = out[f"block{stage + 1}"] = Stage(
                BitUnit,
                num_units,
                width * 2**stage,
                stride=1 if stage == 0 else 2,
                unit_name="unit{:02d}",
                remat=self.remat != "none",
                name=f"block{stage + 1}",
                **dtypes,
            )(x)
        x = out["feature_map"] = nn.relu(norm(name="norm_pre_head")(x))
        x = out["pre_logits"] = x.mean(axis=(1, 2))
        if self.num_classes:
            x = linear_head(self.num_classes, self.head_bias, **dtypes)(x)
        return x.astype(jnp.float32), out


class Stage(nn.Module):
    """Units at one resolution; the first may reduce it.

    Attributes:
      unit_type: `BitUnit`, `HybridUnit`, or another with the same attributes.
      num_units: number of units.
      width: width of the units.
      stride: stride of the first unit.
      unit_name: template of the units' names, numbered from 1.
      remat: whether units recompute their activations in the backward pass.
      dtype, param_dtype: dtypes of the computation and of the parameters.
    """

    unit_type: type[nn.Module]
    num_units: int
    width: int
    stride: int
    unit_name: str
    remat: bool = False
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height / stride, width / stride, 4 * self.width]`."""
        unit_type: Any = nn.remat(self.unit_type) if self.remat else self.unit_type
        for unit in range(self.num_units):
            x = unit_type(
                self.width,
                stride=self.stride if unit == 0 else 1,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=self.unit_name.format(unit + 1),
            )(x)
            x = keep_on_batch_axis(x)
        return x


class HybridUnit(nn.Module):
    """A bottleneck unit of the hybrids: normalisation comes after each convolution.

    Attributes: see `BitUnit`.
    """

    width: int
    stride: int = 1
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height / stride, width / stride, 4 * self.width]`."""
        norm, conv = _hybrid_layers(self.dtype, self.param_dtype)
        residual = x
        if x.shape[-1] != EXPANSION * self.width or self.stride != 1:
            residual = conv(EXPANSION * self.width, 1, stride=self.stride, name="conv_proj")(x)
            residual = norm(name="gn_proj")(residual)
        x = nn.relu(norm(name="gn1")(conv(self.width, 1, name="conv1")(x)))
        x = nn.relu(norm(name="gn2")(conv(self.width, 3, stride=self.stride, name="conv2")(x)))
        # Each unit begins as the identity.
        x = norm(name="gn3", scale_init=nn.initializers.zeros)(conv(EXPANSION * self.width, 1, name="conv3")(x))
        return nn.relu(x + residual)


def _hybrid_layers(dtype: DTypeLike, param_dtype: DTypeLike) -> tuple[Any, Any]:
    """Group normalisation and convolution with the hybrids' constants."""
    dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
    norm = functools.partial(nn.GroupNorm, num_groups=32, epsilon=1e-6, use_fast_variance=False, **dtypes)
    return norm, functools.partial(StdConv, epsilons=HYBRID_EPSILONS, **dtypes)


def hybrid_feature_map(
    x: jax.Array, stages: Sequence[int], *, remat: bool, dtype: DTypeLike, param_dtype: DTypeLike
) -> jax.Array:
    """The ResNet in front of a hybrid's Transformer. Call it inside a module, which gets the parameters.

    Args:
      x: images `[batch, height, width, channels]`.
      stages: number of units of each stage; empty: only the root.
      remat: whether units recompute their activations in the backward pass.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.

    Returns:
      `[batch, rows, columns, channels]`, height and width divided by `downsampling(stages)` and rounded up.
    """
    norm, conv = _hybrid_layers(dtype, param_dtype)
    x = conv(ROOT_WIDTH, 7, stride=2, name="conv_root")(x)
    x = nn.relu(norm(name="gn_root")(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
    for stage, num_units in enumerate(stages):
        x = Stage(
            HybridUnit,
            num_units,
            ROOT_WIDTH * 2**stage,
            stride=1 if stage == 0 else 2,
            unit_name="unit{}",
            remat=remat,
            dtype=dtype,
            param_dtype=param_dtype,
            name=f"block{stage + 1}",
        )(x)
    return x


def downsampling(stages: Sequence[int]) -> int:
    """The factor by which the feature map is smaller than the image, in height and width."""
    return 4 * 2 ** max(len(stages) - 1, 0)


def resnet_names() -> list[str]:
    """Names of this family's models; any other width factor works too."""
    return [f"R{depth}x{width}" for depth in UNITS_BY_DEPTH for width in (1, 2, 3, 4)]


def create_resnet(name: str, **attributes: Any) -> BitResNet | None:
    """Makes the BiT ResNet with this name, such as "R152x4"; None if the name is of another family."""
    match = re.fullmatch(r"R([1-9]\d*)x([1-9]\d*)", name)
    if not match or int(match[1]) not in UNITS_BY_DEPTH:
        return None
    by_name: dict[str, Any] = {"stages": UNITS_BY_DEPTH[int(match[1])], "width_factor": int(match[2])}
    return BitResNet(**(by_name | attributes))
