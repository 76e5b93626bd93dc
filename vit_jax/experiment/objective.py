"""Builds the training objective of a run. A new one is a function of the config and a line in `OBJECTIVES`."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from vit_jax.errors import unknown_name
from vit_jax.objectives import Objective
from vit_jax.objectives.classification import Classification
from vit_jax.objectives.losses import Loss
from vit_jax.objectives.mixup import Mixing


def _classification(config: ConfigDict) -> tuple[Objective, dict[str, Any]]:
    loss = Loss(config.loss, config.label_smoothing)
    return Classification(loss, Mixing(config.mixup_alpha, config.cutmix_alpha)), {}


# By the config's `objective`: the objective, and attributes of the model that it needs, such as `{"num_classes": 0}`.
OBJECTIVES: dict[str, Callable[[ConfigDict], tuple[Objective, dict[str, Any]]]] = {"classification": _classification}


def make_objective(config: ConfigDict) -> tuple[Objective, dict[str, Any]]:
    """Makes the objective; see `OBJECTIVES`.

    Raises:
      UserError: unknown objective, or a wrong field.
    """
    if config.objective not in OBJECTIVES:
        raise unknown_name("objective", config.objective, OBJECTIVES)
    return OBJECTIVES[config.objective](config)
