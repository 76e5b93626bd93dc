"""AxialResNet (appendix D.6): a ResNet whose 3x3 convolutions are axial attention (Axial-DeepLab; Wang et al., 2020).

    conv_root/kernel, gn_root/{scale,bias}
    block<s>/unit<uu>/{conv1,conv3,conv_proj}/kernel, {gn1,gn3,gn_proj}/{scale,bias}
    block<s>/unit<uu>/{height_axis,width_axis}/qkv/kernel, {gn_qkv,gn_out}/{scale,bias}, relative_embedding
    head/{kernel,bias}

Wang et al. define the attention (equation 3) and the unit (their figure 2): attention along the height axis, then along
the width axis, eight heads, queries and keys half as wide as values, embeddings that all heads share. They normalise
with batch statistics. The ViT paper names their code and says no more. We follow a port by one of its authors (scenic's
`axial_resnet.py`): group normalisation and standardised kernels, as in the paper's other ResNets (section 4.1), the
widths of ResNet-50, and no normalisation of the attention's logits. So the model has no running statistics, and an
image's logits do not depend on the other images of its batch. That port's third term takes the key of the position o
for every p; ours is equation 3's.
"""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.models.axial import along_columns, along_rows
from vit_jax.models.layers import check_names, linear_head
from vit_jax.models.resnet import EXPANSION, REMATS, ROOT_WIDTH, UNITS_BY_DEPTH, Stage, bit_layers


class PositionSensitiveAttention(nn.Module):
    """Position-sensitive self-attention along one axis, and its normalisations (Wang et al., 2020, equation 3).

    For each head, the output at position o is the sum over all positions p of

        softmax_p(q_o . k_p + q_o . r^q_{p-o} + k_p . r^k_{p-o}) (v_p + r^v_{p-o})

    The logits are not scaled by the width. There are neither biases nor an output projection: the outputs of the heads
    are concatenated. Queries, keys and values are normalised together, and so is the output, for each sequence.

    Parameters: `qkv/kernel` `[width, 2 * width]`, whose outputs are the query, key and value of the first head, then of
    the second; `relative_embedding` `[2 * length - 1, 2 * width / num_heads]`, r^q, r^k and r^v of the offsets p - o =
    1 - length, ..., length - 1; `gn_qkv` and `gn_out`.

    Attributes:
      num_heads: number of heads; twice as many divide the width.
      dtype, param_dtype: dtypes of the computation and of the parameters; logits and softmax are float32.
    """

    num_heads: int = 8
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, length, width]` to the same shape."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, length, width = x.shape
        value_dim = width // self.num_heads
        norm = _norm(**dtypes)
        qkv = norm(name="gn_qkv")(nn.Dense(2 * width, use_bias=False, name="qkv", **dtypes)(x))
        qkv = qkv.reshape(batch, length, self.num_heads, 2 * value_dim)
        table = self.param(
            "relative_embedding",
            nn.initializers.normal(stddev=value_dim**-0.5),  # as in Axial-DeepLab's code
            (2 * length - 1, 2 * value_dim),
            self.param_dtype,
        )
        position = jnp.arange(length)
        relative = table.astype(self.dtype)[position[None, :] - position[:, None] + length - 1]  # [o, p, 2 * value_dim]
        ends = (value_dim // 2, value_dim)
        query, key, value = jnp.split(qkv, ends, axis=-1)
        relative_query, relative_key, relative_value = jnp.split(relative, ends, axis=-1)

        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        logits = product("bohd,bphd->bhop", query, key)
        logits += product("bohd,opd->bhop", query, relative_query)
        logits += product("bphd,opd->bhop", key, relative_key)
        weights = nn.softmax(logits).astype(value.dtype)
        y = jnp.einsum("bhop,bphd->bohd", weights, value) + jnp.einsum("bhop,opd->bohd", weights, relative_value)
        return norm(name="gn_out")(y.reshape(batch, length, width))


class AxialUnit(nn.Module):
    """A bottleneck unit whose 3x3 convolution is attention within each column and then within each row.

    Normalisation comes after each product, as in Axial-DeepLab. If the unit reduces the resolution, attention works at
    the full resolution, and averages of 2x2 positions follow; of fewer at the end of an odd side, which is our choice.

    Attributes:
      width: width of the attention; the output is `EXPANSION` times as wide.
      stride: 1 or 2.
      dtype, param_dtype: dtypes of the computation and of the parameters.
    """

    width: int
    stride: int = 1
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height / stride, width / stride, 4 * self.width]`."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm, (_, conv) = _norm(**dtypes), bit_layers(self.dtype, self.param_dtype)
        residual = x
        if x.shape[-1] != EXPANSION * self.width or self.stride != 1:
            residual = conv(EXPANSION * self.width, 1, stride=self.stride, padding=0, name="conv_proj")(x)
            residual = norm(name="gn_proj")(residual)
        x = nn.relu(norm(name="gn1")(conv(self.width, 1, name="conv1")(x)))
        x = along_columns(PositionSensitiveAttention(name="height_axis", **dtypes), x)
        x = along_rows(PositionSensitiveAttention(name="width_axis", **dtypes), x)
        if self.stride != 1:
            window = (self.stride, self.stride)
            x = nn.avg_pool(x, window, strides=window, padding="SAME", count_include_pad=False)
        x = conv(EXPANSION * self.width, 1, name="conv3")(nn.relu(x))
        # Each unit begins as the identity.
        return nn.relu(norm(name="gn3", scale_init=nn.initializers.zeros)(x) + residual)


def _norm(dtype: DTypeLike, param_dtype: DTypeLike) -> Any:
    """Group normalisation with this model's epsilon."""
    dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
    return functools.partial(nn.GroupNorm, num_groups=32, epsilon=1e-4, use_fast_variance=False, **dtypes)


class AxialResNet(nn.Module):
    """AxialResNet.

    Attributes:
      num_classes: width of the logits; 0 omits the head and returns the representation instead.
      stages: number of units of each stage.
      width_factor: multiplies all widths.
      head_bias: initial value of the head's bias.
      remat: "full" recomputes each unit's activations in the backward pass; "none" keeps them.
      dtype, param_dtype: dtypes of the computation and of the parameters; the logits are float32.
    """

    num_classes: int
    stages: tuple[int, ...]
    width_factor: int = 1
    head_bias: float = 0.0
    remat: str = "none"
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    def __post_init__(self):
        super().__post_init__()
        check_names(self, remat=REMATS)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Classifies images.

        Args:
          images: `[batch, height, width, channels]`, floating point, values in [-1, 1].
          train: has no effect: there is neither dropout nor batch normalisation.

        Returns:
          logits `[batch, num_classes]`, float32, and intermediates by name: `root` and `block<s>` `[batch, rows,
          columns, channels]`, `feature_map`, which is the last block, and `pre_logits` `[batch, channels]`, its mean
          over rows and columns.
        """
        del train
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm, (_, conv) = _norm(**dtypes), bit_layers(self.dtype, self.param_dtype)
        width = ROOT_WIDTH * self.width_factor
        out = {}
        x = nn.relu(norm(name="gn_root")(conv(width, 7, stride=2, name="conv_root")(images)))
        x = out["root"] = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, num_units in enumerate(self.stages):
            x = out[f"block{stage + 1}"] = Stage(
                AxialUnit,
                num_units,
                width * 2**stage,
                stride=1 if stage == 0 else 2,
                unit_name="unit{:02d}",
                remat=self.remat != "none",
                name=f"block{stage + 1}",
                **dtypes,
            )(x)
        out["feature_map"] = x
        x = out["pre_logits"] = x.mean(axis=(1, 2))
        if self.num_classes:
            x = linear_head(self.num_classes, self.head_bias, **dtypes)(x)
        return x.astype(jnp.float32), out


def axial_resnet_names() -> list[str]:
    """Names of this family's models; the other depths of ResNets work too."""
    return ["AxialResNet-50"]


def create_axial_resnet(name: str, **attributes: Any) -> AxialResNet | None:
    """Makes the AxialResNet with this name, such as "AxialResNet-50"; None if the name is of another family."""
    match = re.fullmatch(r"AxialResNet-([1-9]\d*)", name)
    if not match or int(match[1]) not in UNITS_BY_DEPTH:
        return None
    by_name: dict[str, Any] = {"stages": UNITS_BY_DEPTH[int(match[1])]}
    return AxialResNet(**(by_name | attributes))
