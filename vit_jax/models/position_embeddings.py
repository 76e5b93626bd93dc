"""Position embeddings: how tokens know where they are (section 3.1, appendix D.4)."""

import flax.linen as nn
import jax
from jax.typing import DTypeLike


class AddPositionEmbedding(nn.Module):
    """Adds a learned 1-D position embedding to every token (E_pos in equation 1).

    Attributes:
      dtype: dtype of the computation.
      param_dtype: dtype of the embedding.
    """

    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[batch, num_tokens, hidden_dim]` to the same shape."""
        embedding = self.param(
            "pos_embedding",
            nn.initializers.normal(stddev=0.02),
            (1, *tokens.shape[1:]),
            self.param_dtype,
        )
        return tokens + embedding.astype(self.dtype)
