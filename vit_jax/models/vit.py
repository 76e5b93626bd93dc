"""The Vision Transformer (Dosovitskiy et al., 2021, section 3.1) and its hybrids with a ResNet.

Parameters have the names of the released checkpoints:

    conv_root/kernel, gn_root/{scale,bias}, block<s>/unit<u>/...    a hybrid's ResNet, see `models.resnet`
    embedding/{kernel,bias}                                         E in equation 1
    cls                                                             x_class in equation 1
    mask_embedding                                                  for masked patch prediction (B.1.2)
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
length `num_layers`; `layers.stack_layers` and `layers.unstack_layers` convert.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vit_jax.models import attention, position_embeddings, resnet
from vit_jax.models.attention import AttentionPool, MultiHeadDotProductAttention, relative_embedding_table
from vit_jax.models.layers import (
    GELUS,
    LAYER_NORM_EPSILON,
    REMAT_POLICIES,
    MlpBlock,
    check_names,
    check_sizes,
    drop_branch,
    keep_on_batch_axis,
    linear_head,
)
from vit_jax.models.patches import corrupt_patches, embed_patches, patch_grid, pixels_per_token
from vit_jax.models.position_embeddings import PositionEmbedding

POOLS = ("cls", "gap", "map")
# Attributes of the model that its encoder and each block have too.
_OF_ENCODER = (
    *("num_layers", "num_prefix_tokens", "position_embedding", "position_embedding_at"),
    *("stochastic_depth_rate", "dropout_rate", "scan_layers", "remat"),
)
_OF_BLOCK = ("mlp_dim", "num_heads", "gelu", "attention_dropout_rate", "attention", "return_attention")


class EncoderBlock(nn.Module):
    """One pre-norm Transformer layer (equations 2 and 3).

    Attributes: those of `VisionTransformer`, and
      position_embedding: attributes of the `PositionEmbedding` that this layer learns and adds to its input, or None.
      relative: whether the attention learns embeddings of relative positions.
      has_stochastic_depth: whether the call's `drop_rate` is used.
      deterministic: whether dropout and stochastic depth are off.
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
          drop_rate: probability that an example skips each of the two branches (stochastic depth).
          shared_embedding: position embeddings to add, `[1, num_tokens, hidden_dim]`.
          relative_embedding: see `MultiHeadDotProductAttention`.

        Returns:
          The layer's output, of the shape of x, and intermediates by name.
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
        x = keep_on_batch_axis(x + self._drop_branch(y, drop_rate))

        y = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name="LayerNorm_2", **dtypes)(x)
        y = MlpBlock(self.mlp_dim, self.gelu, self.dropout_rate, self.deterministic, name="MlpBlock_3", **dtypes)(y)
        x = keep_on_batch_axis(x + self._drop_branch(y, drop_rate))
        return x, {"block": x} | ({} if weights is None else {"attention": weights})

    def _drop_branch(self, branch: jax.Array, rate: jax.Array | float) -> jax.Array:
        if not self.has_stochastic_depth or self.deterministic:
            return branch
        return drop_branch(branch, rate, self.make_rng("dropout"))


class Encoder(nn.Module):
    """Position embeddings, the Transformer layers, and the final layer norm (equations 1 to 4).

    Attributes: those of `VisionTransformer`, and
      grid: rows and columns of patches.
      num_prefix_tokens: number of tokens before those of the patches.
      block: the remaining attributes of `EncoderBlock`, by name.
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
        kind, place = self.position_embedding, self.position_embedding_at
        embedding: dict[str, Any] = {"kind": kind, "grid": self.grid, "width": x.shape[-1]}
        embedding["num_prefix_tokens"] = self.num_prefix_tokens
        is_added = kind not in ("none", "relative")
        shared_embedding = relative_embedding = None
        if is_added and place == "stem":
            x = x + PositionEmbedding(**embedding, name="posembed_input", **dtypes)()
        elif is_added and place == "shared":
            shared_embedding = PositionEmbedding(**embedding, name="posembed_input", **dtypes)()
        elif kind == "relative" and place == "shared":
            relative_embedding = relative_embedding_table(self, x.shape[1], self.block["num_heads"], x.shape[-1])
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        out = {"encoder_input": x}

        block_type = EncoderBlock
        if self.remat != "none":
            # Inside a scan, the loop already keeps the compiler from merging the recomputation with the forward pass.
            block_type = nn.remat(block_type, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        block: dict[str, Any] = {
            "position_embedding": embedding if is_added and place == "every_layer" else None,
            "relative": kind == "relative" and place != "shared",
            "dropout_rate": self.dropout_rate,
            "has_stochastic_depth": self.stochastic_depth_rate > 0,
            "deterministic": not train,
            **self.block,
            **dtypes,
        }
        drop_rates = np.linspace(0.0, self.stochastic_depth_rate, self.num_layers, dtype=np.float32)
        if self.scan_layers:
            blocks = nn.scan(
                block_type,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=self.num_layers,
            )(name="encoderblock", **block)
            x, stacked = blocks(x, jnp.asarray(drop_rates), shared_embedding, relative_embedding)
            out |= {f"{name}_{i}": array[i] for name, array in stacked.items() for i in range(self.num_layers)}
        else:
            for i, drop_rate in enumerate(drop_rates):
                layer = block_type(name=f"encoderblock_{i}", **block)
                x, arrays = layer(x, drop_rate, shared_embedding, relative_embedding)
                out |= {f"{name}_{i}": array for name, array in arrays.items()}

        x = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name="encoder_norm", **dtypes)(x)
        return x, out | {"encoded": x}


class VisionTransformer(nn.Module):
    """ViT: patches, a linear embedding, a Transformer encoder and a linear head (figure 1).

    Attributes:
      num_classes: width of the logits; 0 omits the head and returns the representation instead.
      patch_size: side of the square patches, in pixels (P), or in positions of a hybrid's feature map.
      num_layers: depth of the encoder (L).
      hidden_dim: width of the tokens (D).
      mlp_dim: width of the MLPs' hidden layers.
      num_heads: number of attention heads.
      resnet: number of units in each stage of a hybrid's ResNet, whose feature map is cut into patches; (): only the
        ResNet's root; None: no ResNet.
      pool: the representation: "cls", the class token's output (equation 4); "gap", the mean over the tokens of an
        encoder without class token (appendix D.3); "map", attention pooling, without class token.
      position_embedding: one of `position_embeddings.KINDS`.
      position_embedding_at: where they are added; one of `position_embeddings.PLACES`. Relative embeddings belong to
        the attention: "stem" and "every_layer" both mean a table for each layer, "shared" one table for all.
      predict_patches: whether the head predicts `num_classes` values of each patch, from its encoded token.
      pre_logits: whether the head has a hidden tanh layer of width `hidden_dim`, as at pre-training.
      head_bias: initial value of the head's bias; -10 for sigmoid pre-training on ImageNet-21k.
      gelu: "tanh", the approximation of the released models, or "exact".
      dropout_rate: dropout after the position embeddings and each dense layer except the qkv projections and, as in the
        released code, the head.
      attention_dropout_rate: dropout of the attention weights; 0 in the paper.
      stochastic_depth_rate: probability that an example skips a branch of the last layer; it grows linearly from 0 in
        the first layer. 0 in the paper, 0.1 in some AugReg models.
      attention: how attention is computed; one of `attention.IMPLEMENTATIONS`.
      return_attention: whether the intermediates include the attention weights.
      scan_layers: compiles one block and loops over stacked parameters, instead of `num_layers` copies.
      remat: which activations the backward pass recomputes; a key of `REMAT_POLICIES`.
      dtype, param_dtype: dtypes of the computation and of the parameters; the logits are float32.
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
    predict_patches: bool = False
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
        check_names(
            self,
            pool=POOLS,
            position_embedding=position_embeddings.KINDS,
            position_embedding_at=position_embeddings.PLACES,
            gelu=GELUS,
            attention=attention.IMPLEMENTATIONS,
            remat=REMAT_POLICIES,
        )
        check_sizes(self)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before those of the patches."""
        return 1 if self.pool == "cls" else 0

    @property
    def pixels_per_token(self) -> int:
        """Side of the square of pixels that a token covers."""
        return pixels_per_token(self.patch_size, self.resnet)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image; raises `UserError` if the patches do not tile it."""
        return patch_grid(height, width, self.patch_size, self.resnet)

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, corruption: tuple[jax.Array, jax.Array] | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Classifies images, or their patches.

        Args:
          images: `[batch, height, width, channels]`, floating point, values in [-1, 1].
          train: whether dropout and stochastic depth are on; they draw from the "dropout" RNG.
          corruption: `masked` and `source` of `corrupt_patches`, with `predict_patches`.

        Returns:
          logits `[batch, num_classes]`, or `[batch, num_patches, num_classes]`, float32, and intermediates by name:
          `feature_map` (hybrids only) `[batch, rows, columns, channels]`; `patch_embeddings` `[batch, rows, columns,
          hidden_dim]`; `encoder_input`, `block_<l>` and `encoded` `[batch, num_tokens, hidden_dim]`; `attention_<l>`
          `[batch, num_heads, num_tokens, num_tokens]` with `return_attention`; `pre_logits` `[batch, hidden_dim]`.

        Raises:
          UserError: the patches do not tile the images.
        """
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, height, width, _ = images.shape
        out: dict[str, jax.Array] = {}
        x = images.astype(self.dtype)
        if self.resnet is not None:
            x = resnet.hybrid_feature_map(x, self.resnet, remat=self.remat != "none", **dtypes)
            out["feature_map"] = x
        out["patch_embeddings"] = x = embed_patches(x, self.patch_size, self.hidden_dim, **dtypes)
        x = x.reshape(batch, -1, self.hidden_dim)

        if self.predict_patches:
            mask = self.param("mask_embedding", nn.initializers.normal(0.02), (1, 1, self.hidden_dim), self.param_dtype)
            x = x if corruption is None else corrupt_patches(x, *corruption, mask)
        if self.pool == "cls":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_dim), self.param_dtype)
            cls = jnp.broadcast_to(cls.astype(self.dtype), (batch, 1, self.hidden_dim))
            x = jnp.concatenate([cls, x], axis=1)

        x, encoder_out = Encoder(
            grid=self.grid(height, width),
            block={name: getattr(self, name) for name in _OF_BLOCK},
            name="Transformer",
            **{name: getattr(self, name) for name in _OF_ENCODER},
            **dtypes,
        )(x, train=train)
        out |= encoder_out

        if self.pool == "cls":
            x = x[:, 0]
        elif self.pool == "gap":
            x = x.mean(axis=1)
        else:
            x = AttentionPool(self.mlp_dim, self.num_heads, self.gelu, self.attention, name="MAPHead_0", **dtypes)(x)
        if self.pre_logits:
            x = nn.tanh(nn.Dense(self.hidden_dim, name="pre_logits", **dtypes)(x))
        out["pre_logits"] = x

        if self.predict_patches:
            x = out["encoded"][:, self.num_prefix_tokens :]
        if self.num_classes:
            x = linear_head(self.num_classes, self.head_bias, **dtypes)(x)
        return x.astype(jnp.float32), out
