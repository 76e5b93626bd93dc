"""Builds the training objective of a run. A new one is a function of the config and a line in `OBJECTIVES`."""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_jax.errors import UserError, unknown_name
from vit_jax.models import create_model
from vit_jax.objectives import Objective
from vit_jax.objectives.classification import Classification
from vit_jax.objectives.losses import Loss
from vit_jax.objectives.masked_patches import MaskedPatches
from vit_jax.objectives.mixup import Mixing

_OF_LABELS = ("mixup_alpha", "cutmix_alpha", "label_smoothing")


def _classification(config: ConfigDict, _: Mapping[str, Any]) -> tuple[Objective, dict[str, Any]]:
    loss = Loss(config.loss, config.label_smoothing)
    return Classification(loss, Mixing(config.mixup_alpha, config.cutmix_alpha)), {}


def _masked_patches(config: ConfigDict, of_weights: Mapping[str, Any]) -> tuple[Objective, dict[str, Any]]:
    if config.model.name is None:
        raise UserError("masked patch prediction needs a model. Set --config.model.name, such as ViT-B/16.")
    if unused := [name for name in _OF_LABELS if config[name]]:
        raise UserError(
            f"masked patch prediction learns no labels, and {' and '.join(unused)} would change them. Set "
            f"{' '.join(f'--config.{name}=0' for name in unused)}."
        )
    stages = config.model.resnet if config.model.resnet is not None else of_weights.get("resnet")
    overrides = {} if stages is None else {"resnet": stages}
    model = create_model(config.model.name, num_classes=0, **overrides)
    if not hasattr(model, "predict_patches"):
        raise UserError(
            f"masked patch prediction needs patches, and {config.model.name} has none. Set --config.model.name to a "
            "ViT or a hybrid, such as ViT-B/16 or R50+ViT-B/16."
        )
    fields = config.masked_patches
    objective = MaskedPatches(model.pixels_per_token, fields.target, fields.corruption_rate)
    objective.count_patches(config.data.image_size, config.data.image_size)  # or raises
    return objective, {"num_classes": objective.num_outputs, "predict_patches": True, "pre_logits": False}


# By the config's `objective`: its class, and a function that makes it and the attributes of the model that it needs,
# such as `{"num_classes": 0}`, from the config and the attributes of the weights.
Make = Callable[[ConfigDict, Mapping[str, Any]], tuple[Objective, dict[str, Any]]]
OBJECTIVES: dict[str, tuple[type[Objective], Make]] = {
    "classification": (Classification, _classification),
    "masked_patches": (MaskedPatches, _masked_patches),
}


def make_objective(config: ConfigDict, of_weights: Mapping[str, Any] | None = None) -> tuple[Objective, dict[str, Any]]:
    """Makes the objective; see `OBJECTIVES`. Attributes of the model that the config leaves open are `of_weights`.

    Raises:
      UserError: unknown objective, or a wrong field.
    """
    if config.objective not in OBJECTIVES:
        raise unknown_name("objective", config.objective, OBJECTIVES)
    _, make = OBJECTIVES[config.objective]
    return make(config, of_weights or {})


def needs_labels(objective: str) -> bool:
    """Whether the objective of a config needs labels; True if it is unknown."""
    kind, _ = OBJECTIVES.get(objective, OBJECTIVES["classification"])
    return bool(kind.needs_labels)
