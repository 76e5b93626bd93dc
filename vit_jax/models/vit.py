"""The Vision Transformer (Dosovitskiy et al., 2021, section 3.1) and its hybrids with a ResNet.

Parameters bear the names of the released checkpoints, so that a released file fits without renaming:

    conv_root/kernel, gn_root/{scale,bias}, block<s>/unit<u>/...    a hybrid's ResNet, see `models.resnet`
    embedding/{kernel,bias}                                         E in equation 1
    cls                                                             x_class in equation 1
    Transformer/posembed_input/pos_embedding                        E_pos in equation 1
    Transformer/encoderblock_<l>/LayerNorm_0/{scale,bias}           equation 2
    Transformer/encoderblock_<l>/MultiHeadDotProductAttention_1/{query,key,value,out}/{kernel,bias}
    Transformer/encoderblock_<l>/LayerNorm_2/{scale,bias}           equation 3
    Transformer/encoderblock_<l>/MlpBlock_3/Dense_{0,1}/{kernel,bias}
    Transformer/encoder_norm/{scale,bias}                           equation 4
    MAPHead_0/...                                                   attention pooling
    pre_logits/{kernel,bias}                                        hidden layer of the pre-training head
    head/{kernel,bias}

With `scan_layers=True` the blocks are one stack, `Transformer/encoderblock/...`, whose arrays have a leading axis of
length `num_layers`; `stack_layers` and `unstack_layers` convert.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vit_jax.errors import UserError, unknown_name
from vit_jax.models import attention, position_embeddings, resnet
from vit_jax.models.attention import MultiHeadDotProductAttention
from vit_jax.models.heads import linear_head
from vit_jax.models.layers import keep_on_batch_axis, platform
from vit_jax.models.position_embeddings import PositionEmbedding

LAYER_NORM_EPSILON = 1e-6  # as in the released code
POOLS = ("cls", "gap", "map")
GELUS = ("tanh", "exact")

# Which activations of a block are kept for the backward pass; the others are computed again.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A size of the Vision Transformer."""

    num_layers: int
    hidden_dim: int
    mlp_dim: int
    num_heads: int


# Table 1; Ti and S are from Steiner et al., 2021 (AugReg). "b" is B with all hidden dimensions halved (figure 4); heads
# are no dimension, so that it keeps 12.
VARIANTS = {
    "Ti": Variant(num_layers=12, hidden_dim=192, mlp_dim=768, num_heads=3),
    "S": Variant(num_layers=12, hidden_dim=384, mlp_dim=1536, num_heads=6),
    "b": Variant(num_layers=12, hidden_dim=384, mlp_dim=1536, num_heads=12),
    "B": Variant(num_layers=12, hidden_dim=768, mlp_dim=3072, num_heads=12),
    "L": Variant(num_layers=24, hidden_dim=1024, mlp_dim=4096, num_heads=16),
    "H": Variant(num_layers=32, hidden_dim=1280, mlp_dim=5120, num_heads=16),
}


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between them (the MLP of equation 3).

    Attributes:
      mlp_dim: width of the hidden layer.
      gelu: "tanh", the approximation of the released models, or "exact", by the error function.
      dropout_rate: dropout after each dense layer.
      deterministic: whether dropout is off.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
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
        dense: dict[str, Any] = {
            "kernel_init": nn.initializers.xavier_uniform(),
            "bias_init": nn.initializers.normal(stddev=1e-6),
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        *batch, hidden_dim = x.shape
        gelu: Callable[[jax.Array], jax.Array] = functools.partial(nn.gelu, approximate=self.gelu == "tanh")
        # XLA for TPUs does better if left alone (docs/tpu_speed.md).
        if platform() != "tpu":
            # As one matrix: with more axes XLA transposes the activations for the kernels' gradients (10 % of the time
            # on a CPU).
            x = x.reshape(-1, hidden_dim)
            # Computed again in the backward pass: keeping what lies within costs more time than it saves, and memory.
            gelu = jax.checkpoint(gelu)
        x = nn.Dense(self.mlp_dim, name="Dense_0", **dense)(x)
        x = gelu(x)
        x = nn.Dropout(self.dropout_rate, deterministic=self.deterministic)(x)
        x = nn.Dense(hidden_dim, name="Dense_1", **dense)(x)
        x = nn.Dropout(self.dropout_rate, deterministic=self.deterministic)(x)
        return x.reshape(*batch, hidden_dim)


class EncoderBlock(nn.Module):
    """One pre-norm Transformer layer (equations 2 and 3).

    Attributes:
      mlp_dim: width of the MLP's hidden layer.
      num_heads: number of attention heads; divides `hidden_dim`.
      gelu: see `MlpBlock`.
      position_embedding: attributes of a `PositionEmbedding` that this layer learns and adds to its input, or None.
      relative: whether the attention has embeddings of relative positions of its own.
      dropout_rate: dropout after the attention's output projection and each dense layer of the MLP.
      attention_dropout_rate: dropout of the attention weights; 0 in the paper.
      has_stochastic_depth: whether the second argument of the call is to be heeded.
      deterministic: whether dropout and stochastic depth are off.
      attention: how attention is computed; one of `attention.IMPLEMENTATIONS`.
      return_attention: whether to return the attention weights as well.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    mlp_dim: int
    num_heads: int
    gelu: str = "tanh"
    position_embedding: dict[str, Any] | None = None
    relative: bool = False
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    has_stochastic_depth: bool = False
    deterministic: bool = True
    attention: str = "auto"
    return_attention: bool = False
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        drop_rate: jax.Array | float = 0.0,
        shared_embedding: jax.Array | None = None,
        relative_embedding: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the layer.

        Args:
          x: `[batch, num_tokens, hidden_dim]`.
          drop_rate: how often an example skips each of the layer's two branches (stochastic depth).
          shared_embedding: position embeddings to add, `[1, num_tokens, hidden_dim]`.
          relative_embedding: see `MultiHeadDotProductAttention`.

        Returns:
          An array of x's shape, and named arrays for the record, as `nn.scan` wants it (carry, output).
        """
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = keep_on_batch_axis(x)
        if self.position_embedding is not None:
            x = x + PositionEmbedding(**self.position_embedding, name="posembed", **dtypes)()
        if shared_embedding is not None:
            x = x + shared_embedding

        y = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name="LayerNorm_0", **dtypes)(x)
        y, weights = MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            relative=self.relative,
            dropout_rate=self.attention_dropout_rate,
            deterministic=self.deterministic,
            implementation=self.attention,
            return_weights=self.return_attention,
            name="MultiHeadDotProductAttention_1",
            **dtypes,
        )(y, relative_embedding=relative_embedding)
        y = nn.Dropout(self.dropout_rate, deterministic=self.deterministic)(y)
        x = keep_on_batch_axis(x + self._drop_path(y, drop_rate))

        y = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name="LayerNorm_2", **dtypes)(x)
        y = MlpBlock(self.mlp_dim, self.gelu, self.dropout_rate, self.deterministic, name="MlpBlock_3", **dtypes)(y)
        x = keep_on_batch_axis(x + self._drop_path(y, drop_rate))
        return x, {"block": x} | ({} if weights is None else {"attention": weights})

    def _drop_path(self, branch: jax.Array, rate: jax.Array | float) -> jax.Array:
        """Stochastic depth (Huang et al., 2016): leaves the branch out of some examples and scales up the rest."""
        if not self.has_stochastic_depth or self.deterministic:
            return branch
        keep_rate = jnp.asarray(1.0 - rate, jnp.float32)
        keep = jax.random.bernoulli(self.make_rng("dropout"), keep_rate, (branch.shape[0], 1, 1))
        return jnp.where(keep, branch / keep_rate, 0).astype(branch.dtype)


class Encoder(nn.Module):
    """Position embeddings, the Transformer layers, and the final layer norm (equations 1 to 4).

    Attributes:
      num_layers: number of `EncoderBlock`s.
      grid: rows and columns of patches.
      num_prefix_tokens: tokens before those of the patches.
      position_embedding: what is added; one of `position_embeddings.KINDS`.
      position_embedding_at: where; one of `position_embeddings.PLACES`. Relative embeddings are at home in the
        attention: "stem" and "every_layer" both mean a table for each layer, "shared" one for all.
      stochastic_depth_rate: how often an example skips a branch of the last layer; the rate grows linearly from 0 in
        the first.
      dropout_rate: dropout after the position embeddings are added and within the blocks.
      scan_layers: one compiled block looped over stacked parameters, instead of `num_layers` copies.
      remat: which activations the backward pass computes again; a key of `REMAT_POLICIES`.
      block: the remaining attributes of `EncoderBlock`, by name.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    num_layers: int
    grid: tuple[int, int]
    num_prefix_tokens: int
    position_embedding: str
    position_embedding_at: str
    stochastic_depth_rate: float
    dropout_rate: float
    scan_layers: bool
    remat: str
    block: dict[str, Any]
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps tokens `[batch, num_tokens, hidden_dim]` to encoded tokens of the same shape and intermediates."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        out: dict[str, jax.Array] = {}

        add = self.position_embedding not in ("none", "relative")
        embedding: dict[str, Any] = {
            "kind": self.position_embedding,
            "grid": self.grid,
            "num_prefix_tokens": self.num_prefix_tokens,
            "width": x.shape[-1],
        }
        shared_embedding = relative_embedding = None
        if add and self.position_embedding_at == "stem":
            x = x + PositionEmbedding(**embedding, name="posembed_input", **dtypes)()
        elif add and self.position_embedding_at == "shared":
            shared_embedding = PositionEmbedding(**embedding, name="posembed_input", **dtypes)()
        elif self.position_embedding == "relative" and self.position_embedding_at == "shared":
            heads = self.block["num_heads"]
            relative_embedding = self.param(
                "relative_embedding",
                nn.initializers.normal(stddev=0.02),
                (2 * x.shape[1] - 1, heads, x.shape[-1] // heads),
                self.param_dtype,
            )
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        out["encoder_input"] = x

        block = EncoderBlock
        if self.remat != "none":
            # Inside a scan the loop already keeps the compiler from merging the two computations.
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        block_arguments: dict[str, Any] = {
            "position_embedding": embedding if add and self.position_embedding_at == "every_layer" else None,
            "relative": self.position_embedding == "relative" and self.position_embedding_at != "shared",
            "dropout_rate": self.dropout_rate,
            "has_stochastic_depth": self.stochastic_depth_rate > 0,
            "deterministic": not train,
            **self.block,
            **dtypes,
        }
        drop_rates = np.linspace(0.0, self.stochastic_depth_rate, self.num_layers, dtype=np.float32)
        if self.scan_layers:
            blocks = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=self.num_layers,
            )
            x, outputs = blocks(name="encoderblock", **block_arguments)(
                x, jnp.asarray(drop_rates), shared_embedding, relative_embedding
            )
            for name, stacked in outputs.items():
                out |= {f"{name}_{layer}": stacked[layer] for layer in range(self.num_layers)}
        else:
            for layer in range(self.num_layers):
                x, outputs = block(name=f"encoderblock_{layer}", **block_arguments)(
                    x, drop_rates[layer], shared_embedding, relative_embedding
                )
                out |= {f"{name}_{layer}": array for name, array in outputs.items()}

        x = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name="encoder_norm", **dtypes)(x)
        out["encoded"] = x
        return x, out


class AttentionPool(nn.Module):
    """Attention pooling: a learned query attends to all tokens (MAP head; Zhai et al., 2022).

    Attributes:
      mlp_dim: width of its MLP's hidden layer.
      num_heads: number of attention heads.
      gelu: see `MlpBlock`.
      attention: how attention is computed; one of `attention.IMPLEMENTATIONS`.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    mlp_dim: int
    num_heads: int
    gelu: str = "tanh"
    attention: str = "auto"
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, num_tokens, hidden_dim]` to `[batch, hidden_dim]`."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, _, width = x.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width), self.param_dtype)
        probe = jnp.broadcast_to(probe.astype(self.dtype), (batch, 1, width))
        x, _ = MultiHeadDotProductAttention(
            self.num_heads, implementation=self.attention, name="MultiHeadDotProductAttention_0", **dtypes
        )(probe, x)
        y = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name="LayerNorm_0", **dtypes)(x)
        x = x + MlpBlock(self.mlp_dim, self.gelu, name="MlpBlock_0", **dtypes)(y)
        return x[:, 0]


class VisionTransformer(nn.Module):
    """ViT: patches, a linear embedding, a Transformer encoder and a linear head (figure 1).

    Attributes:
      num_classes: width of the logits; 0 leaves the head out and returns the representation in its place.
      patch_size: side of the square patches, in pixels (P), or in positions of a hybrid's feature map.
      num_layers: depth of the encoder (L).
      hidden_dim: width of the tokens (D).
      mlp_dim: width of the MLPs' hidden layers.
      num_heads: number of attention heads.
      resnet: for a hybrid, how many units each stage of the ResNet has whose feature map is cut into patches; () is its
        root alone, None no ResNet.
      pool: the representation: "cls", the class token's output (equation 4); "gap", the mean over the tokens of an
        encoder without class token (appendix D.3); "map", attention pooling, without class token.
      position_embedding: what tells tokens where they are; see `Encoder`.
      position_embedding_at: where it is added; see `Encoder`.
      pre_logits: whether the head has a hidden tanh layer of width `hidden_dim`, as at pre-training.
      head_bias: initial value of the head's bias; -10 for sigmoid pre-training on ImageNet-21k.
      gelu: see `MlpBlock`.
      dropout_rate: dropout after the position embeddings and each dense layer but the qkv projections. As in the
        released code, the head has none.
      attention_dropout_rate: dropout of the attention weights; 0 in the paper.
      stochastic_depth_rate: see `Encoder`; 0 in the paper, 0.1 in some of AugReg's.
      attention: how attention is computed; one of `attention.IMPLEMENTATIONS`.
      return_attention: whether the intermediates include the attention weights.
      scan_layers: see `Encoder`.
      remat: see `Encoder`.
      dtype: dtype of the computation; the logits are float32.
      param_dtype: dtype of the parameters.
    """

    num_classes: int
    patch_size: int
    num_layers: int
    hidden_dim: int
    mlp_dim: int
    num_heads: int
    resnet: tuple[int, ...] | None = None
    pool: str = "cls"
    position_embedding: str = "learned_1d"
    position_embedding_at: str = "stem"
    pre_logits: bool = False
    head_bias: float = 0.0
    gelu: str = "tanh"
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    attention: str = "auto"
    return_attention: bool = False
    scan_layers: bool = False
    remat: str = "none"
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    def __post_init__(self):
        super().__post_init__()
        for kind, given, known in (
            ("pool", self.pool, POOLS),
            ("position_embedding", self.position_embedding, position_embeddings.KINDS),
            ("position_embedding_at", self.position_embedding_at, position_embeddings.PLACES),
            ("gelu", self.gelu, GELUS),
            ("attention", self.attention, attention.IMPLEMENTATIONS),
            ("remat policy", self.remat, REMAT_POLICIES),
        ):
            if given not in known:
                raise unknown_name(kind, given, known)
        check_sizes(self)

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens come before those of the patches."""
        return 1 if self.pool == "cls" else 0

    @property
    def pixels_per_token(self) -> int:
        """Side of the square of pixels that a token stands for."""
        return self.patch_size * (1 if self.resnet is None else resnet.downsampling(self.resnet))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of so many pixels.

        Raises:
          UserError: the patches do not tile the image.
        """
        if self.resnet is None:
            check_divisible_by_patch(height, width, self.patch_size)
            return height // self.patch_size, width // self.patch_size
        # A ResNet rounds up; only its feature map must be divisible.
        rows, columns = (-(-side // resnet.downsampling(self.resnet)) for side in (height, width))
        if rows % self.patch_size or columns % self.patch_size:
            check_divisible_by_patch(height, width, self.pixels_per_token)
        return rows // self.patch_size, columns // self.patch_size

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Classifies images.

        Args:
          images: `[batch, height, width, channels]`, floating point, values in [-1, 1].
          train: whether dropout and stochastic depth are on; they draw from the "dropout" RNG.

        Returns:
          logits `[batch, num_classes]`, float32, and intermediates by name: `feature_map` (hybrids only) `[batch, rows,
          columns, channels]`; `patch_embeddings` `[batch, rows, columns, hidden_dim]`; `encoder_input`, `block_<l>` and
          `encoded` `[batch, num_tokens, hidden_dim]`; `attention_<l>` `[batch, num_heads, num_tokens, num_tokens]` if
          asked for; `pre_logits` `[batch, hidden_dim]`, the input of the linear head.

        Raises:
          UserError: the patches do not tile the images.
        """
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, height, width, _ = images.shape
        grid = self.grid(height, width)
        x = images.astype(self.dtype)
        resnet_out = {}
        if self.resnet is not None:
            x = resnet.hybrid_feature_map(x, self.resnet, remat=self.remat != "none", **dtypes)
            resnet_out["feature_map"] = x

        patches = nn.Conv(
            self.hidden_dim,
            kernel_size=(self.patch_size, self.patch_size),
            strides=(self.patch_size, self.patch_size),
            padding="VALID",
            name="embedding",
            **dtypes,
        )(x)
        x = patches.reshape(batch, -1, self.hidden_dim)

        if self.pool == "cls":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_dim), self.param_dtype)
            cls = jnp.broadcast_to(cls.astype(self.dtype), (batch, 1, self.hidden_dim))
            x = jnp.concatenate([cls, x], axis=1)

        x, out = Encoder(
            num_layers=self.num_layers,
            grid=grid,
            num_prefix_tokens=self.num_prefix_tokens,
            position_embedding=self.position_embedding,
            position_embedding_at=self.position_embedding_at,
            stochastic_depth_rate=self.stochastic_depth_rate,
            dropout_rate=self.dropout_rate,
            scan_layers=self.scan_layers,
            remat=self.remat,
            block={
                "mlp_dim": self.mlp_dim,
                "num_heads": self.num_heads,
                "gelu": self.gelu,
                "attention_dropout_rate": self.attention_dropout_rate,
                "attention": self.attention,
                "return_attention": self.return_attention,
            },
            name="Transformer",
            **dtypes,
        )(x, train=train)
        out |= {"patch_embeddings": patches, **resnet_out}

        if self.pool == "cls":
            x = x[:, 0]
        elif self.pool == "gap":
            x = x.mean(axis=1)
        else:
            x = AttentionPool(self.mlp_dim, self.num_heads, self.gelu, self.attention, name="MAPHead_0", **dtypes)(x)
        if self.pre_logits:
            x = nn.tanh(nn.Dense(self.hidden_dim, name="pre_logits", **dtypes)(x))
        out["pre_logits"] = x

        if self.num_classes:
            x = linear_head(self.num_classes, self.head_bias, **dtypes)(x)
        return x.astype(jnp.float32), out


def check_sizes(model: Any) -> None:
    """Raises `UserError` where a Transformer's dimensions or rates are impossible."""
    for attribute in ("patch_size", "num_layers", "hidden_dim", "mlp_dim", "num_heads"):
        if (value := getattr(model, attribute)) < 1:
            raise UserError(f"{attribute} must be at least 1, got {value}.")
    if model.hidden_dim % model.num_heads:
        raise UserError(f"hidden_dim {model.hidden_dim} is not divisible by num_heads {model.num_heads}.")
    for attribute in ("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate"):
        if not 0 <= (value := getattr(model, attribute, 0.0)) < 1:
            raise UserError(f"{attribute} must be at least 0 and less than 1, got {value}.")


def check_divisible_by_patch(height: int, width: int, patch_size: int) -> None:
    """Raises `UserError` unless the patches tile the image."""
    if height % patch_size or width % patch_size:
        below = height - height % patch_size
        raise UserError(
            f"image size {height}x{width} is not divisible by the patch size {patch_size}. "
            f"Use a multiple of it, such as {below or patch_size} or {below + patch_size}."
        )


# The ResNet of a hybrid, and the side of a patch on its feature map, by what stands in the name. "R50+ViT-B/32" has a
# whole ResNet-50; "R50+ViT-B/16" has its last stage's units moved into the third (section 4.1), which makes the
# sequence four times as long. "R+Ti/16" (AugReg) has the root alone; its token is 32 pixels wide in the released
# weights, whatever its name says.
_HYBRIDS = {
    ("", 16): ((), 8),
    ("26", 32): (resnet.UNITS_BY_DEPTH[26], 1),
    ("50", 32): (resnet.UNITS_BY_DEPTH[50], 1),
    ("50", 16): ((3, 4, 9), 1),
}
_PATCH_SIZES = (8, 14, 16, 32)
_PAPER_HYBRIDS = ("R50+ViT-B/16", "R50+ViT-B/32", "R50+ViT-L/16", "R50+ViT-L/32")
_AUGREG_HYBRIDS = ("R+Ti/16", "R26+S/32", "R50+L/32")


def names() -> list[str]:
    """Names of this family's models; ViTs take any other patch size too."""
    plain = [f"ViT-{size}/{patch}" for size in VARIANTS for patch in _PATCH_SIZES]
    return [*plain, *_PAPER_HYBRIDS, *_AUGREG_HYBRIDS]


def create_vit(name: str, **attributes: Any) -> VisionTransformer | None:
    """Makes the ViT or hybrid of that name; None if the name is not of this family's form.

    Args:
      name: such as "ViT-L/16", "R50+ViT-B/16" or, as AugReg writes it, "R50+L/32".
      **attributes: of `VisionTransformer`; they override those of the name.
    """
    match = re.fullmatch(r"(?:R(\d*)\+)?(ViT-)?(\w+)/([1-9]\d*)", name)
    if not match or match[3] not in VARIANTS:
        return None
    depth, prefix, size, number = match.groups()
    if depth is None:
        if not prefix:
            return None
        by_name: dict[str, Any] = {"patch_size": int(number)}
    elif (depth, int(number)) in _HYBRIDS:
        stages, patch_size = _HYBRIDS[depth, int(number)]
        by_name = {"resnet": stages, "patch_size": patch_size}
    else:
        return None
    return VisionTransformer(**(by_name | dataclasses.asdict(VARIANTS[size]) | attributes))


def stack_layers(params: dict) -> dict:
    """Converts parameters of unrolled layers to those of `scan_layers=True`.

    Args:
      params: a ViT's parameter tree with `Transformer/encoderblock_<l>`.

    Returns:
      The same tree with one `Transformer/encoderblock`, arrays `[num_layers, ...]`. The input is left as it is.
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
