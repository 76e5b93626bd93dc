"""Labels, targets and losses, on the device. An image has one label, several, or none.

Labels are int32 `[batch]`, or `[batch, max_labels]` padded with `NO_LABEL` (-1) if images may have several. An image
without a label has no loss and does not count in averages.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from vit_jax.errors import unknown_name
from vit_jax.objectives.labels import NO_LABEL

__all__ = ["LOSSES", "NO_LABEL", "Loss", "is_correct", "is_labelled", "multi_hot"]


def _rows(labels: jax.Array) -> jax.Array:
    """Labels as `[batch, max_labels]`."""
    return labels if labels.ndim > 1 else labels[:, None]


def multi_hot(labels: jax.Array, num_classes: int) -> jax.Array:
    """Returns float32 `[batch, num_classes]`: 1 for each class of an image, else 0."""
    # A comparison, unlike a scatter, fuses with its consumer and keeps the batch's sharding.
    return (_rows(labels)[:, :, None] == jnp.arange(num_classes)).any(axis=1).astype(jnp.float32)


def is_labelled(labels: jax.Array) -> jax.Array:
    """Returns float32 `[batch]`: 1 for images with a label, else 0."""
    return (_rows(labels) != NO_LABEL).any(axis=1).astype(jnp.float32)


def is_correct(logits: jax.Array, labels: jax.Array, top: int = 1) -> jax.Array:
    """Returns float32 `[batch]`: 1 if one of the likeliest classes is a label (precision@1, ReaL accuracy), else 0.

    Args:
      logits: `[batch, num_classes]`.
      labels: of the images.
      top: number of likeliest classes that count; the first win a tie.
    """
    if top == 1:
        return (_rows(labels) == logits.argmax(axis=-1)[:, None]).any(axis=1).astype(jnp.float32)
    _, likeliest = jax.lax.top_k(logits, min(top, logits.shape[-1]))
    return (_rows(labels)[:, :, None] == likeliest[:, None, :]).any(axis=(1, 2)).astype(jnp.float32)


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns losses `[batch]` of logits `[batch, num_classes]` and target probabilities of the same shape."""
    return optax.losses.softmax_cross_entropy(logits, targets)


def sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns losses `[batch]` of logits `[batch, num_classes]` and targets in [0, 1], summed over classes.

    Used to pre-train on ImageNet-21k and JFT, whose images may have several labels.
    """
    return optax.losses.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "softmax": softmax_cross_entropy,
    "sigmoid": sigmoid_cross_entropy,
}


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss by name, one of `LOSSES`. A call with logits `[batch, num_classes]` and labels returns losses `[batch]`.

    Raises:
      UserError: unknown loss.
    """

    name: str  # "softmax" or "sigmoid"
    label_smoothing: float = 0.0  # share of the target to spread evenly over all classes

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise unknown_name("loss", self.name, LOSSES)

    def targets(self, labels: jax.Array, num_classes: int) -> jax.Array:
        """Returns float32 `[batch, num_classes]`. For softmax, the labels of an image share its probability evenly."""
        targets = multi_hot(labels, num_classes)
        if self.name == "softmax":
            targets /= jnp.maximum(targets.sum(axis=-1, keepdims=True), 1)
        return optax.losses.smooth_labels(targets, self.label_smoothing) if self.label_smoothing else targets

    def of_targets(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """Returns losses `[batch]` for targets `[batch, num_classes]`, which may be mixed."""
        return LOSSES[self.name](logits, targets.astype(logits.dtype))

    def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Returns losses `[batch]`, 0 for images without a label."""
        return self.of_targets(logits, self.targets(labels, logits.shape[-1])) * is_labelled(labels)
