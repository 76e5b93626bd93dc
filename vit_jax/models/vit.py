"""The Vision Transformer (Dosovitskiy et al., 2021, section 3.1).

Parameters bear the names of the released checkpoints, so that a released file fits without renaming:

    embedding/{kernel,bias}                                         E in equation 1
    cls                                                             x_class in equation 1
    Transformer/posembed_input/pos_embedding                        E_pos in equation 1
    Transformer/encoderblock_<l>/LayerNorm_0/{scale,bias}           equation 2
    Transformer/encoderblock_<l>/MultiHeadDotProductAttention_1/{query,key,value,out}/{kernel,bias}
    Transformer/encoderblock_<l>/LayerNorm_2/{scale,bias}           equation 3
    Transformer/encoderblock_<l>/MlpBlock_3/Dense_{0,1}/{kernel,bias}
    Transformer/encoder_norm/{scale,bias}                           equation 4
    pre_logits/{kernel,bias}                                        hidden layer of the pre-training head
    head/{kernel,bias}

With `scan_layers=True` the blocks are one stack, `Transformer/encoderblock/...`, whose arrays have a leading axis of
length `num_layers`; `stack_layers` and `unstack_layers` convert.
"""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.errors import UserError, unknown_name
from vit_jax.models.position_embeddings import AddPositionEmbedding

LAYER_NORM_EPSILON = 1e-6  # as in the released code

# Which activations of a block are kept for the backward pass; the others are computed again.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A size of the Vision Transformer (table 1; Ti and S are from Steiner et al., 2021)."""

    num_layers: int
    hidden_dim: int
    mlp_dim: int
    num_heads: int


VARIANTS = {
    "Ti": Variant(num_layers=12, hidden_dim=192, mlp_dim=768, num_heads=3),
    "S": Variant(num_layers=12, hidden_dim=384, mlp_dim=1536, num_heads=6),
    "B": Variant(num_layers=12, hidden_dim=768, mlp_dim=3072, num_heads=12),
    "L": Variant(num_layers=24, hidden_dim=1024, mlp_dim=4096, num_heads=16),
    "H": Variant(num_layers=32, hidden_dim=1280, mlp_dim=5120, num_heads=16),
}


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between them (the MLP of equation 3).

    Attributes:
      mlp_dim: width of the hidden layer.
      dropout_rate: dropout after each dense layer.
      deterministic: whether dropout is off.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    mlp_dim: int
    dropout_rate: float = 0.0
    deterministic: bool = True
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, num_tokens, hidden_dim]` to the same shape."""
        dense: dict[str, Any] = {
            "kernel_init": nn.initializers.xavier_uniform(),
            "bias_init": nn.initializers.normal(stddev=1e-6),
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        hidden_dim = x.shape[-1]
        x = nn.Dense(self.mlp_dim, name="Dense_0", **dense)(x)
        x = nn.gelu(x, approximate=True)
        x = nn.Dropout(self.dropout_rate, deterministic=self.deterministic)(x)
        x = nn.Dense(hidden_dim, name="Dense_1", **dense)(x)
        x = nn.Dropout(self.dropout_rate, deterministic=self.deterministic)(x)
        return x


class EncoderBlock(nn.Module):
    """One pre-norm Transformer layer (equations 2 and 3).

    Attributes:
      mlp_dim: width of the MLP's hidden layer.
      num_heads: number of attention heads; divides `hidden_dim`.
      dropout_rate: dropout after the attention's output projection and each dense layer of the MLP.
      attention_dropout_rate: dropout of the attention weights; 0 in the paper.
      deterministic: whether dropout is off.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    mlp_dim: int
    num_heads: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    deterministic: bool = True
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, jax.Array]:
        """Maps `[batch, num_tokens, hidden_dim]` to the same shape; twice, as `nn.scan` wants (carry, output)."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        y = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name="LayerNorm_0", **dtypes)(x)
        y = nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            kernel_init=nn.initializers.xavier_uniform(),
            dropout_rate=self.attention_dropout_rate,
            broadcast_dropout=False,
            deterministic=self.deterministic,
            name="MultiHeadDotProductAttention_1",
            **dtypes,
        )(y)
        y = nn.Dropout(self.dropout_rate, deterministic=self.deterministic)(y)
        x = x + y

        y = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name="LayerNorm_2", **dtypes)(x)
        y = MlpBlock(self.mlp_dim, self.dropout_rate, self.deterministic, name="MlpBlock_3", **dtypes)(y)
        x = x + y
        return x, x


class Encoder(nn.Module):
    """Position embeddings, the Transformer layers, and the final layer norm (equations 1 to 4).

    Attributes:
      num_layers: number of `EncoderBlock`s.
      mlp_dim: width of the MLPs' hidden layers.
      num_heads: number of attention heads.
      dropout_rate: dropout after the position embeddings are added and within the blocks.
      attention_dropout_rate: dropout of the attention weights.
      scan_layers: one compiled block looped over stacked parameters, instead of `num_layers` copies.
      remat: which activations the backward pass computes again; a key of `REMAT_POLICIES`.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
    """

    num_layers: int
    mlp_dim: int
    num_heads: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    scan_layers: bool = False
    remat: str = "none"
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps tokens `[batch, num_tokens, hidden_dim]` to encoded tokens of the same shape and intermediates."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        out = {}

        x = AddPositionEmbedding(name="posembed_input", **dtypes)(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        out["encoder_input"] = x

        block = EncoderBlock
        if self.remat != "none":
            # Inside a scan the loop already keeps the compiler from merging the two computations.
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        block_arguments: dict[str, Any] = {
            "mlp_dim": self.mlp_dim,
            "num_heads": self.num_heads,
            "dropout_rate": self.dropout_rate,
            "attention_dropout_rate": self.attention_dropout_rate,
            "deterministic": not train,
            **dtypes,
        }
        if self.scan_layers:
            blocks = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.num_layers,
            )
            x, outputs = blocks(name="encoderblock", **block_arguments)(x, None)
            out |= {f"block_{layer}": outputs[layer] for layer in range(self.num_layers)}
        else:
            for layer in range(self.num_layers):
                x, _ = block(name=f"encoderblock_{layer}", **block_arguments)(x)
                out[f"block_{layer}"] = x

        x = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name="encoder_norm", **dtypes)(x)
        out["encoded"] = x
        return x, out


class VisionTransformer(nn.Module):
    """ViT: patches, a linear embedding, a Transformer encoder and a linear head (figure 1).

    Attributes:
      num_classes: width of the logits; 0 leaves the head out and returns the representation in its place.
      patch_size: side of the square patches, in pixels (P).
      num_layers: depth of the encoder (L).
      hidden_dim: width of the tokens (D).
      mlp_dim: width of the MLPs' hidden layers.
      num_heads: number of attention heads.
      pool: the representation: "cls", the class token's output (equation 4), or "gap", the mean over the tokens of an
        encoder without class token (appendix D.3).
      pre_logits: whether the head has a hidden tanh layer of width `hidden_dim`, as at pre-training.
      head_bias: initial value of the head's bias; -10 for sigmoid pre-training on ImageNet-21k.
      dropout_rate: dropout after the position embeddings and each dense layer but the qkv projections. As in the
        released code, the head has none.
      attention_dropout_rate: dropout of the attention weights; 0 in the paper.
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
    pool: str = "cls"
    pre_logits: bool = False
    head_bias: float = 0.0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    scan_layers: bool = False
    remat: str = "none"
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    def __post_init__(self):
        super().__post_init__()
        if self.pool not in ("cls", "gap"):
            raise unknown_name("pool", self.pool, ["cls", "gap"])
        if self.remat not in REMAT_POLICIES:
            raise unknown_name("remat policy", self.remat, REMAT_POLICIES)
        if self.hidden_dim % self.num_heads:
            raise UserError(f"hidden_dim {self.hidden_dim} is not divisible by num_heads {self.num_heads}.")

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Classifies images.

        Args:
          images: `[batch, height, width, channels]`, floating point, values in [-1, 1].
          train: whether dropout is on; it draws from the "dropout" RNG.

        Returns:
          logits `[batch, num_classes]`, float32, and intermediates by name: `patch_embeddings`
          `[batch, height/P, width/P, hidden_dim]`; `encoder_input`, `block_<l>` and `encoded`
          `[batch, num_tokens, hidden_dim]`; `pre_logits` `[batch, hidden_dim]`, the input of the linear head.

        Raises:
          UserError: the patch size does not divide the images.
        """
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, height, width, _ = images.shape
        check_divisible_by_patch(height, width, self.patch_size)

        patches = nn.Conv(
            self.hidden_dim,
            kernel_size=(self.patch_size, self.patch_size),
            strides=(self.patch_size, self.patch_size),
            padding="VALID",
            name="embedding",
            **dtypes,
        )(images.astype(self.dtype))
        x = patches.reshape(batch, -1, self.hidden_dim)

        if self.pool == "cls":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_dim), self.param_dtype)
            cls = jnp.broadcast_to(cls.astype(self.dtype), (batch, 1, self.hidden_dim))
            x = jnp.concatenate([cls, x], axis=1)

        x, out = Encoder(
            num_layers=self.num_layers,
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            dropout_rate=self.dropout_rate,
            attention_dropout_rate=self.attention_dropout_rate,
            scan_layers=self.scan_layers,
            remat=self.remat,
            name="Transformer",
            **dtypes,
        )(x, train=train)
        out["patch_embeddings"] = patches

        x = x[:, 0] if self.pool == "cls" else x.mean(axis=1)
        if self.pre_logits:
            x = nn.tanh(nn.Dense(self.hidden_dim, name="pre_logits", **dtypes)(x))
        out["pre_logits"] = x

        if self.num_classes:
            x = nn.Dense(
                self.num_classes,
                kernel_init=nn.initializers.zeros,
                bias_init=nn.initializers.constant(self.head_bias),
                name="head",
                **dtypes,
            )(x)
        return x.astype(jnp.float32), out


def check_divisible_by_patch(height: int, width: int, patch_size: int) -> None:
    """Raises `UserError` unless the patches tile the image."""
    if height % patch_size or width % patch_size:
        below = height - height % patch_size
        raise UserError(
            f"image size {height}x{width} is not divisible by the patch size {patch_size}. "
            f"Use a multiple of it, such as {below or patch_size} or {below + patch_size}."
        )


def create_vit(name: str, *, num_classes: int, **overrides: Any) -> VisionTransformer | None:
    """Makes the ViT of that name, such as "ViT-L/16"; None if the name is not of this family's form."""
    match = re.fullmatch(r"ViT-(\w+)/([1-9]\d*)", name)
    if not match or match[1] not in VARIANTS:
        return None
    arguments = {"patch_size": int(match[2]), **dataclasses.asdict(VARIANTS[match[1]]), **overrides}
    known = {field.name for field in dataclasses.fields(VisionTransformer) if field.name not in ("parent", "name")}
    for argument in arguments:
        if argument not in known:
            raise unknown_name(f"argument of model {name!r}:", argument, known)
    return VisionTransformer(num_classes=num_classes, **arguments)


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
