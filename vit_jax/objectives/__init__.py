"""What a model learns from a batch. A training step takes any `Objective`; `classification` is the paper's.

Needs only JAX, Flax and optax.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.struct
import jax

Batch = Mapping[str, jax.Array]

# `apply(images, **inputs)` calls the model in training, on images `[batch, height, width, 3]` with values from 0 to
# 255, uint8 or float, and named inputs. Returns the model's output: (logits, intermediates) for our models.
Apply = Callable[..., Any]


@flax.struct.dataclass
class Examples:
    """A batch, or a part of one, prepared by an objective."""

    arrays: dict[str, jax.Array]  # inputs of the losses by name, each `[batch, ...]`
    # float32 `[batch]`, how much each example counts in the means of the loss and the metrics; 0 leaves it out.
    weight: jax.Array
    shared: Any = None  # arrays for the whole batch, such as mixup's share


class Objective(Protocol):
    """A training objective. The step takes the means and gradients of its losses, and splits batches.

    Both methods are traced, on the global batch: the result does not depend on the number of devices.
    """

    @property
    def needs_labels(self) -> bool:
        """Whether the labels of the images matter. If not, any folder of images is training data."""

    def prepare(self, batch: Batch, rng: jax.Array) -> Examples:
        """Makes all random choices of a step, such as which images to mix or mask, once for the whole batch.

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
