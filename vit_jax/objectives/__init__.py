"""What a model learns from a batch. A training step takes any `Objective`; `classification` is the paper's.

Rooms above read `objectives` and not the other way round: it needs JAX and optax alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.struct
import jax

Batch = Mapping[str, jax.Array]

# `apply(images, **inputs)` calls the model in training, on images `[batch, height, width, 3]` of values from 0 to 255,
# uint8 or float, and with inputs by name. Returns what the model returns; for ours, (logits, intermediates).
Apply = Callable[..., Any]


@flax.struct.dataclass
class Examples:
    """A batch, or a part of one, as an objective has prepared it.

    Attributes:
      arrays: what the losses need, by name, `[batch, ...]` each.
      weight: float32 `[batch]`, how much each example counts in the means of the loss and the metrics; 0 leaves it out.
      shared: arrays that hold for the whole batch, such as the share of mixup.
    """

    arrays: dict[str, jax.Array]
    weight: jax.Array
    shared: Any = None


class Objective(Protocol):
    """A training objective. The step that calls it takes means, gradients and parts of a batch.

    Both methods are traced, on the global batch: the result does not depend on the number of devices.
    """

    def prepare(self, batch: Batch, rng: jax.Array) -> Examples:
        """Makes all random choices of a step, once for the whole batch: what is mixed, or masked.

        Args:
          batch: "image" uint8 `[batch, height, width, 3]`, "label" int32 `[batch]` or `[batch, max_labels]`, and
            whatever else the data have.
          rng: a key of this step.
        """

    def losses(self, apply: Apply, examples: Examples) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Computes the loss of each example.

        Args:
          apply: the model with its parameters and dropout key; see `Apply`.
          examples: from `prepare`; with accumulation every `accumulation_steps`-th one of them.

        Returns:
          Losses `[batch]`, and metrics by name, `[batch]` each. A step reports their weighted means.
        """
