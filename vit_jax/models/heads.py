"""The linear head that all models share."""

import flax.linen as nn
from jax.typing import DTypeLike


def linear_head(num_classes: int, head_bias: float, *, dtype: DTypeLike, param_dtype: DTypeLike) -> nn.Dense:
    """Makes the head `head/{kernel,bias}`; call it inside a module, which gets the parameters.

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
