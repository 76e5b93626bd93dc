"""Compares fine-tuning with the paper's, and chooses which of several settings a table shows."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.data.bit_hyper_rule import hyper_rule_sizes
from vit_jax.data.transfer_tasks import TASKS
from vit_jax.data.vtab import TASKS as VTAB_TASKS
from vit_jax.experiment.fine_tuning import VIT_DROPOUT
from vit_jax.paper import tables
from vit_jax.report.lineage import Lineage
from vit_jax.report.measured import ACCURACY, REAL, MeasuredModel
from vit_jax.report.names import data_set_name, kind_of
from vit_jax.report.seeds import SeedGroup

IMAGENET = "ImageNet"
VIT_RULE, BIT_RULE = "table 4's rule", "BiT-HyperRule"
_RULE_OF_CONFIG = {"vit": VIT_RULE, "bit": BIT_RULE}  # by the names in configs/transfer.py
_RULE_OF_SCHEDULE = {"cosine": VIT_RULE, "drops": BIT_RULE}
# Other settings of the two fine-tuning rules; BiT's mixup depends on the length.
_BOTH_RULES = {
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 0.0,
    "optimizer.layer_decay": None,
    "loss": "softmax",
    "label_smoothing": 0.0,
    "cutmix_alpha": 0.0,
    "data.randaugment_layers": 0,
}
_SETTINGS_OF = {
    VIT_RULE: {**_BOTH_RULES, "optimizer.clip_norm": 1.0},
    BIT_RULE: {**_BOTH_RULES, "optimizer.clip_norm": None, "optimizer.learning_rate": 0.003},
}

_BATCH_SIZE = 512
_FINE_TUNING_SIZE = 384
_SIZES_OF_14 = (378, 392)  # the multiples of 14 nearest to 384
_LARGE_BIT = "R152x4"  # the only model that the BiT paper fine-tunes at 480 pixels
_ONLY_FOR_RESNETS = 0.06  # a learning rate of table 4; see its footnote


@dataclasses.dataclass(frozen=True)
class PaperRecipe:
    """The paper's recipe for fine-tuning the model of a cell, in batches of 512.

    Attributes:
      image_sizes: resolutions that count as the paper's; () for any.
      steps: length of fine-tuning.
      train_split: all training images.
      learning_rates: the rates that the paper tried.
      polyak_decay: decay of the parameters' average; None for no average.
      dropout: dropout rate and its source, such as "in the paper"; None if no source gives it.
      bit_size: resolution of BiT-HyperRule in the BiT paper; None if the rule does not apply to the model.
    """

    image_sizes: tuple[int, ...]
    steps: int
    train_split: str
    learning_rates: tuple[float, ...]
    polyak_decay: float | None = None
    dropout: tuple[float, str] | None = None
    bit_size: int | None = None

    def differences(self, model: MeasuredModel) -> list[str]:
        """Notes the differences from the recipe. For a released checkpoint, only the resolution is known."""
        done, rule, paper = model.training, rule_of(model), "in the paper"
        sizes, by, whose = self.image_sizes, "", paper
        if rule == BIT_RULE and self.bit_size is not None:
            sizes, by, whose = (self.bit_size,), "BiT-HyperRule ", "in the BiT paper"
        notes = []
        if sizes and model.image_size not in sizes:
            notes.append(f"{by}at {model.image_size} pixels, {whose} at {sizes[0]}")
        notes += _differences_of_evaluation(model)
        if model.steps is None:
            return [*notes, "a released checkpoint as it is: its fine-tuning was not done here"]
        notes += [f"its config changed during the run, {change}" for change in model.changes]
        own: dict[str, Any] = {"steps": self.steps, "batch_size": _BATCH_SIZE, "polyak_decay": self.polyak_decay}
        own["data.train_split"] = self.train_split
        expected: list[tuple[str, Any, str]] = [(name, value, paper) for name, value in own.items()]
        if self.dropout:
            expected.append(("model.dropout_rate", *self.dropout))
        if rule is None:
            expected.append(("optimizer.schedule", "cosine", paper))
        elif rule == BIT_RULE and self.bit_size is None:
            notes.append("fine-tuned by BiT-HyperRule, which only ResNets try in the paper")
        else:
            whose = paper if rule == VIT_RULE else "in BiT-HyperRule"
            expected += [(name, value, whose) for name, value in _SETTINGS_OF[rule].items()]
            mixup = 0.1 if rule == BIT_RULE and model.steps > 500 else 0.0
            expected.append(("mixup_alpha", mixup, whose))
        rate = done.get("optimizer.learning_rate")
        if rule == VIT_RULE and rate not in self.learning_rates:
            rates = f"one of {', '.join(map(str, self.learning_rates))}"
            expected.append(("optimizer.learning_rate", rates, paper))
        differing = [each for each in expected if done.get(each[0]) != each[1]]
        return notes + [f"{name}={done.get(name)}, {whose} {value}" for name, value, whose in differing]


def _differences_of_evaluation(model: MeasuredModel) -> list[str]:
    """Differences in test images from the released code, which resizes whole images."""
    how = model.values[ACCURACY].settings if ACCURACY in model.values else {}
    notes = []
    if small := how.get("data.eval_resize_small"):
        notes.append(f"evaluated on the centre of images whose shorter side is {small} pixels, not on whole images")
    if (resize := how.get("data.eval_resize", "bilinear")) != "bilinear":
        notes.append(f"images to evaluate on are resized by {resize}, in the released code bilinear")
    return notes


def rule_of(model: MeasuredModel) -> str | None:
    """The rule, of the two, by which a model was fine-tuned; None for neither, or if unknown."""
    return _RULE_OF_SCHEDULE.get(model.training.get("optimizer.schedule", "")) if model.steps is not None else None


def recipe_of(task: str, model: str, *, table_2: bool = False, lineage: Lineage | None = None) -> PaperRecipe:
    """Returns the paper's recipe for a task, as in table 5, or the id of one of VTAB's.

    For table 2, ImageNet has a higher resolution and Polyak averaging. The lineage of the pre-trained weights
    determines the dropout rate.
    """
    kind = kind_of(model)
    # BiT's numbers in table 2 are at the resolutions of its own paper.
    sizes: tuple[int, ...] = () if kind == "BiT" and table_2 else (_FINE_TUNING_SIZE,)
    sizes += _SIZES_OF_14 if model.endswith("/14") else ()
    if task in VTAB_TASKS:
        row = tables.TABLE_4["VTAB"]
        return PaperRecipe(sizes, row.steps, "train800val200", row.learning_rates)
    name = IMAGENET if task == REAL else task
    (transfer,) = (each for each in TASKS.values() if data_set_name(each.dataset) == name)
    row, decay = tables.TABLE_4[name], None
    if table_2 and name == IMAGENET and kind != "BiT":
        sizes, decay = ((518,) if model.endswith("/14") else (512,)), 0.9999
    rates = tuple(rate for rate in row.learning_rates if kind in ("BiT", "hybrid") or rate != _ONLY_FOR_RESNETS)
    dropout = None if lineage is None or kind == "BiT" else _dropout_after(lineage)
    _, bit_size = hyper_rule_sizes(small_images=transfer.small_images, is_large=model == _LARGE_BIT)
    train_split = transfer.splits["final"][0]
    return PaperRecipe(
        sizes, row.steps, train_split, rates, decay, dropout, bit_size if kind in ("BiT", "hybrid") else None
    )


def _dropout_after(lineage: Lineage) -> tuple[float, str] | None:
    """The dropout rate for fine-tuning weights, and its source; None if no source gives it.

    The README of the released code has 0.1 for the paper. No source gives a rate for models pre-trained on JFT-300M,
    which had no dropout.
    """
    if lineage.is_released and lineage.name.startswith("augreg_"):
        return 0.0, "by AugReg"
    is_vit = lineage.is_released and lineage.name.startswith("vit_")
    return (VIT_DROPOUT, "in the paper") if is_vit or (lineage.dropout and not lineage.is_released) else None


def choose(candidates: Sequence[SeedGroup], recipe: PaperRecipe) -> tuple[SeedGroup, list[str]]:
    """Chooses the setting to show in a cell, without looking at test accuracy; also returns notes.

    Takes the one closest to the paper's recipe, then the one with most seeds, then the first by folder.
    """

    def rank(each: SeedGroup) -> tuple[int, int, str]:
        return len(recipe.differences(each.first)), -len(each.models), str(each.first.path)

    ranked = sorted(candidates, key=rank)
    return ranked[0], [*recipe.differences(ranked[0].first), *others_note(ranked)]


def others_note(ranked: Sequence[SeedGroup]) -> list[str]:
    """A note on the settings that a cell does not show, if there are any."""
    return [f"{len(ranked) - 1} more of other settings: see the table of results"] if len(ranked) > 1 else []


def better_rule(candidates: Sequence[SeedGroup], recipe: PaperRecipe) -> tuple[Sequence[SeedGroup], list[str]]:
    """The settings of the better fine-tuning rule, by accuracy on held-out images, and notes.

    A sweep that tried both has chosen. Of two sweeps, takes the one with the better accuracy. If that was not recorded,
    returns all candidates, because test images must not choose.
    """
    if swept := [each for each in candidates if each.first.purpose.rules and each.first.purpose.held_out]:
        best = choose(swept, recipe)[0].first.purpose
        reached = {_RULE_OF_CONFIG.get(rule, rule): value for rule, value in best.rules.items()}
        return swept, [_note_rules(reached, best.held_out[0] if best.held_out else "")]
    by_rule: dict[str | None, list[SeedGroup]] = {}
    for each in candidates:
        by_rule.setdefault(rule_of(each.first), []).append(each)
    by_rule.pop(None, None)
    if len(by_rule) < 2:
        return candidates, []
    held_out = {rule: choose(each, recipe)[0].first.purpose.held_out for rule, each in by_rule.items()}
    splits = {found and found[0] for found in held_out.values()}
    if len(splits) > 1 or None in splits:
        return candidates, ["of two rules; their accuracy on held-out images was not recorded, so neither is chosen"]
    reached = {str(rule): found[1] for rule, found in held_out.items() if found}
    best_rule = max(reached, key=lambda rule: reached[rule])
    return by_rule[best_rule], [_note_rules(reached, str(splits.pop()))]


def _note_rules(reached: Mapping[str, float], split: str) -> str:
    listed = ", ".join(f"{rule} {100 * value:.2f} %" for rule, value in reached.items())
    return f"the better of two rules on {split}: {listed}"
