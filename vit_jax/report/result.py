"""What was measured of parameters: by the run that trained them, or by an evaluation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vit_jax.report.lineage import Origin
from vit_jax.report.measured import Value, same_images
from vit_jax.report.purposes import FINAL
from vit_jax.run.workdir import AnyPath


@dataclasses.dataclass(frozen=True)
class Record:
    """What was measured of parameters: by the run that trained them, or by an evaluation.

    Attributes:
      path: the run's folder, or that of the evaluation.
      model: its label, such as "ViT-B/16".
      fields: what the model was made with, as far as that is known.
      before: where the weights are from that the training began with; None: it began anew.
      origin: where the measured parameters are from, that training included.
      trained_on: the name of the training's data set; "" for weights that were not trained any further.
      dataset: that `ACCURACY` is of, as the config has it.
      evaluated_on: its name, and the split.
      examples: how many images `ACCURACY` is of.
      image_size: at which it was measured, in pixels.
      setting: the same for what may be averaged: all settings of the training, and all that its values have in common.
      values: what was measured, by name: `ACCURACY`, "top-5", names of `VARIANT_NAMES`, "5-shot <data set>".
      train_split: what the training saw of its data set.
      train_images: how many images that are, and their fingerprint; None for what was not recorded.
      steps: of the training; None where it is not known.
      batch_size: of it.
      seed: of it.
      polyak_decay: of it.
      partial: patterns of the parameters that were trained, if not all.
      training: all settings of the training, by field.
      changes: of the training's config on the way.
      held_out: by which split the training's values were chosen, and what they reached there.
      rules: of fine-tuning that were tried, with what they reached there.
      use: "final", or why it is no result: it only chooses, or was not chosen.
      besides: folders of evaluations whose values are among these.
    """

    path: AnyPath
    model: str
    fields: dict[str, Any]
    before: Origin | None
    origin: Origin
    trained_on: str
    dataset: str
    evaluated_on: tuple[str, str | None]
    examples: int | None
    image_size: int
    setting: str
    values: dict[str, Value]
    train_split: str = ""
    train_images: tuple[int | None, str | None] = (None, None)
    steps: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    polyak_decay: float | None = None
    partial: tuple[str, ...] = ()
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    changes: tuple[str, ...] = ()
    held_out: tuple[str, float] | None = None
    rules: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use: str = FINAL
    besides: tuple[str, ...] = ()

    @property
    def is_result(self) -> bool:
        """Whether it has numbers that are results."""
        return self.use == FINAL

    @property
    def results(self) -> dict[str, Value]:
        """The values that are results."""
        return {name: value for name, value in self.values.items() if not value.flaw} if self.is_result else {}

    @property
    def seeds(self) -> tuple[str, str]:
        """Tells apart what may be averaged."""
        return str(self.seed), self.origin.seeds


def go_together(one: Record, other: Record) -> bool:
    """Whether two records are samples of the same: one setting, the same images, measured in the same way.

    Numbers that are no results play no part.
    """
    pairs = [(one.values[name], other.values[name]) for name in one.values.keys() & other.values.keys()]
    return (
        one.setting == other.setting
        and same_images(one.train_images, other.train_images)
        and all(first.agrees_with(second) for first, second in pairs if not (first.flaw or second.flaw))
    )
