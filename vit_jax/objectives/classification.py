"""Classification: labels become targets, mixup and CutMix mix images and targets, a loss compares (tables 3 and 4)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax

from vit_jax.objectives import Apply, Batch, Examples
from vit_jax.objectives.losses import Loss, is_correct, is_labelled
from vit_jax.objectives.mixup import Mixing, neighbours


@dataclasses.dataclass(frozen=True)
class Classification:
    """Cross-entropy of the model's logits. Metrics: `accuracy`.

    Images without a label do not count; a mixed pair counts only if both images have one.
    """

    # Softmax or sigmoid cross-entropy, with label smoothing.
    loss: Loss = dataclasses.field(default_factory=lambda: Loss("softmax"))
    mixing: Mixing = dataclasses.field(default_factory=Mixing)  # mixup and CutMix, of pairs of the whole batch
    needs_labels: ClassVar[bool] = True

    def prepare(self, batch: Batch, rng: jax.Array) -> Examples:
        """Draws the share of each pixel that is mixed in, and finds each image's partner."""
        labelled = is_labelled(batch["label"])
        if not self.mixing:
            return Examples(dict(batch), labelled)
        partners = {f"partner_{name}": neighbours(array) for name, array in batch.items()}
        pixel_shares = self.mixing.weights(rng, *batch["image"].shape[1:3])
        return Examples(dict(batch) | partners, labelled * neighbours(labelled), pixel_shares)

    def losses(self, apply: Apply, examples: Examples) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Computes the cross-entropy of each image, and whether its own label has the largest logit."""
        arrays, pixel_shares = examples.arrays, examples.shared
        images, labels = arrays["image"], arrays["label"]
        if pixel_shares is not None:
            images = pixel_shares * images + (1 - pixel_shares) * arrays["partner_image"]
        logits, _ = apply(images)
        targets = self.loss.targets(labels, logits.shape[-1])
        if pixel_shares is not None:
            share = pixel_shares.mean()
            targets = share * targets + (1 - share) * self.loss.targets(arrays["partner_label"], logits.shape[-1])
        return self.loss.of_targets(logits, targets), {"accuracy": is_correct(logits, labels)}
