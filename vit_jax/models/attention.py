"""Multi-head dot-product attention (appendix A), with several implementations."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.errors import UserError
from vit_jax.models.layers import LAYER_NORM_EPSILON, Dense, MlpBlock

# "einsum" is written out below; "xla" and "cudnn" are `jax.nn.dot_product_attention`'s; "auto" chooses by the platform.
# "half_logits" is for bfloat16 on TPUs: logits and weights stay in bfloat16, as in the released code. They are most of
# attention's memory traffic. The others compute logits in float32.
IMPLEMENTATIONS = ("auto", "einsum", "xla", "cudnn", "half_logits")


class MultiHeadDotProductAttention(nn.Module):
    """Attention with query, key, value and output projections.

    Parameters have the names of the released checkpoints: `{query,key,value}/kernel` `[width, num_heads, head_dim]`,
    `out/kernel` `[num_heads, head_dim, width]`, and biases.

    Attributes:
      num_heads: divides the width.
      relative: whether to learn an embedding of every 1-D offset between a query and a key (appendix D.4),
        `relative_embedding` `[2 * num_tokens - 1, num_heads, head_dim]`.
      dropout_rate: dropout of the attention weights, which needs "einsum".
      deterministic: whether dropout is off.
      implementation: one of `IMPLEMENTATIONS`; with dropout on, "auto" or "einsum".
      return_weights: whether to return the attention weights too, which uses "einsum" for any `implementation`.
      dtype, param_dtype: dtypes of the computation and of the parameters.
    """

    num_heads: int
    relative: bool = False
    dropout_rate: float = 0.0
    deterministic: bool = True
    implementation: str = "auto"
    return_weights: bool = False
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(
        self, queries: jax.Array, tokens: jax.Array | None = None, relative_embedding: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Attends from queries to tokens.

        Args:
          queries: `[batch, num_queries, width]`.
          tokens: input of keys and values, `[batch, num_tokens, width]`; None: the queries.
          relative_embedding: embeddings of the offsets, `[2 * num_tokens - 1, num_heads, head_dim]`, if another module
            has them.

        Returns:
          `[batch, num_queries, width]`, and the weights `[batch, num_heads, num_queries, num_tokens]` or None.

        Raises:
          UserError: dropout is on, and the implementation does not support it.
        """
        tokens = queries if tokens is None else tokens
        width = queries.shape[-1]
        head_dim = width // self.num_heads
        project = functools.partial(Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        heads = (self.num_heads, head_dim)
        query = project((width,), heads, name="query")(queries)
        key = project((width,), heads, name="key")(tokens)
        value = project((width,), heads, name="value")(tokens)

        if self.relative:
            relative_embedding = relative_embedding_table(self, tokens.shape[1], self.num_heads, width)
        bias = None
        if relative_embedding is not None:
            bias = relative_logits(query, relative_embedding.astype(self.dtype)) / math.sqrt(head_dim)

        has_dropout = self.dropout_rate > 0 and not self.deterministic
        if has_dropout and self.implementation not in ("auto", "einsum"):
            raise UserError(
                f"attention {self.implementation!r} cannot drop attention weights, and attention_dropout_rate is "
                f"{self.dropout_rate:g}. Use 'auto' or 'einsum', or attention_dropout_rate=0."
            )
        weights = None
        if self.return_weights or has_dropout:
            keep = None
            if has_dropout:
                shape = (query.shape[0], self.num_heads, query.shape[1], key.shape[1])
                keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.dropout_rate, shape)
            y, weights = attend_by_einsum(query, key, value, bias, keep=keep, keep_rate=1 - self.dropout_rate)
        else:
            y = attend(query, key, value, bias, implementation=self.implementation)
        y = project(heads, (width,), name="out")(y)
        return y, weights if self.return_weights else None


class AttentionPool(nn.Module):
    """Attention pooling: a learned query attends to all tokens (MAP head; Zhai et al., 2022).

    Attributes:
      mlp_dim: width of its MLP's hidden layer.
      num_heads: number of attention heads.
      gelu: see `MlpBlock`.
      attention: one of `IMPLEMENTATIONS`.
      dtype, param_dtype: dtypes of the computation and of the parameters.
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


def relative_embedding_table(module: nn.Module, num_tokens: int, num_heads: int, width: int) -> jax.Array:
    """The parameter `relative_embedding` of `module`, `[2 * num_tokens - 1, num_heads, width / num_heads]`."""
    shape = (2 * num_tokens - 1, num_heads, width // num_heads)
    dtype = module.param_dtype
    return module.param("relative_embedding", nn.initializers.normal(stddev=0.02), shape, dtype)


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None = None, *, implementation: str = "auto"
) -> jax.Array:
    """Softmax attention.

    Args:
      query: `[batch, num_queries, num_heads, head_dim]`.
      key: `[batch, num_tokens, num_heads, head_dim]`.
      value: as key.
      bias: added to the logits before the softmax, `[batch, num_heads, num_queries, num_tokens]`.
      implementation: one of `IMPLEMENTATIONS`.

    Returns:
      `[batch, num_queries, num_heads, head_dim]`.
    """
    if implementation == "auto":
        # cuDNN's flash attention needs half precision, and heads of up to 128 in steps of 8. Only a GPU knows whether
        # cuDNN is available.
        fits = query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
        platforms: dict[str, Any] = {"cpu": lambda *args: attend_by_einsum(*args)[0]}
        if fits and bias is None and jax.default_backend() == "gpu":
            platforms["cuda"] = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        # Decided at compile time, because programs for TPUs are also compiled on machines without TPUs.
        operands = (query, key, value) if bias is None else (query, key, value, bias)
        return jax.lax.platform_dependent(*operands, default=jax.nn.dot_product_attention, **platforms)
    if implementation == "einsum":
        return attend_by_einsum(query, key, value, bias)[0]
    if implementation == "half_logits":
        logits = jnp.einsum("bqhd,bkhd->bhqk", query / math.sqrt(query.shape[-1]), key)
        return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits if bias is None else logits + bias), value)
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(f"attention 'cudnn' needs an NVIDIA GPU, not {jax.default_backend()}. Use 'auto'.")
    as_named: Any = implementation
    return jax.nn.dot_product_attention(query, key, value, bias, implementation=as_named)


def attend_by_einsum(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    keep: jax.Array | None = None,
    keep_rate: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention, written out; shapes as in `attend`.

    Moves the heads beside the batch first, so that both products are plain batched matrix products. On a CPU that is
    twice as fast as the compiler's choice.

    Args:
      query: see `attend`.
      key: see `attend`.
      value: see `attend`.
      bias: see `attend`.
      keep: the weights that dropout keeps, boolean, in the shape of the weights.
      keep_rate: probability of keeping a weight; kept weights are divided by it.

    Returns:
      `[batch, num_queries, num_heads, head_dim]`, and the weights after the softmax and before dropout,
      `[batch, num_heads, num_queries, num_tokens]`.
    """
    query, key, value = (array.swapaxes(1, 2) for array in (query, key, value))
    scale = 1 / math.sqrt(query.shape[-1])
    logits = jnp.einsum("bhqd,bhkd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias
    weights = nn.softmax(logits).astype(value.dtype)
    kept = weights if keep is None else jnp.where(keep, weights / keep_rate, 0)
    return jnp.einsum("bhqk,bhkd->bhqd", kept, value).swapaxes(1, 2), weights


def relative_logits(query: jax.Array, embedding: jax.Array) -> jax.Array:
    """Products of the queries with the embeddings of the offsets from key to query (appendix D.4).

    Args:
      query: `[batch, num_tokens, num_heads, head_dim]`.
      embedding: of the offsets p_q - p_k = num_tokens - 1, ..., 1 - num_tokens, in this order,
        `[2 * num_tokens - 1, num_heads, head_dim]`.

    Returns:
      `[batch, num_heads, num_tokens, num_tokens]`: for each query and key, the product of the query with the embedding
      of their offset.
    """
    batch, num_tokens, num_heads, _ = query.shape
    # With n tokens, by_offset[..., q, s] belongs to the key k with k - q + n - 1 = s. In the flattened matrix with rows
    # of 2n - 1, the wanted [q, k] is at q (2n - 1) + k - q + n - 1 = q (2n - 2) + k + n - 1: among the first n of a row
    # of 2n - 2 in the same memory, begun n - 1 later. So no gather is needed.
    by_offset = jnp.einsum("bqhd,shd->bhqs", query, embedding)
    flat = by_offset.reshape(batch, num_heads, num_tokens * (2 * num_tokens - 1))
    flat = flat[..., num_tokens - 1 : num_tokens - 1 + num_tokens * (2 * num_tokens - 2)]
    if num_tokens == 1:
        return by_offset
    return flat.reshape(batch, num_heads, num_tokens, 2 * num_tokens - 2)[..., :num_tokens]
