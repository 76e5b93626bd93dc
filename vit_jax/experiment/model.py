"""The model of a run, and its initial weights."""

import logging
from typing import Any

from ml_collections import ConfigDict

from vit_jax.data.class_names import class_names, moved_names, wordnet_ids
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.run.facts import describe_class_changes
from vit_jax.weights import ModelSpec, Weights, get_checkpoint, list_checkpoints
from vit_jax.weights import load as load_weights
from vit_jax.weights.download import cached_path

logger = logging.getLogger(__name__)


def find_weights(
    place: str, model: str | None, *, allow_missing: bool, predicts_patches: bool = False
) -> tuple[ModelSpec, Weights | None]:
    """Loads weights (`place` as `config.weights`) and the description of their model, which must be `model` if given.

    With `allow_missing` the weights are None if they are released ones that are not downloaded yet. `predicts_patches`
    is as in `weights.load`.
    """
    if allow_missing and place in list_checkpoints():
        released = get_checkpoint(place)
        if not cached_path(released.url).exists():
            logger.warning("weights %s are not downloaded yet; a run will do it", place)
            size = (released.image_size, released.image_size)
            return ModelSpec(released.model, released.num_classes, released.model_overrides, size), None
    weights = load_weights(place, model=model, predicts_patches=predicts_patches)
    for note in weights.notes:
        logger.info("weights %s: %s", place, note)
    return weights.spec, weights


def choose_num_classes(config: ConfigDict, spec: ModelSpec | None, train_source: Source | None) -> int:
    """Chooses the width of the logits: that of a kept head, the config's, or the number of classes of the data.

    Raises:
      UserError: the width is unknown, or does not fit the data.
    """
    if spec and config.keep_head:
        return num_kept_classes(config, config.weights, spec, train_source, "Set keep_head=False, for a new head")
    known = train_source.num_classes if train_source else None
    num_classes = config.model.num_classes or known
    if num_classes is None:
        why = f"{train_source.name} does not say how many classes it has" if train_source else "the data set is missing"
        raise UserError(f"{why}: set model.num_classes.")
    if known and num_classes < known:
        raise UserError(
            f"model.num_classes {num_classes} is less than the data set's {known}. Set None, or at least {known}."
        )
    return num_classes


def num_kept_classes(config: ConfigDict, place: str, spec: ModelSpec, source: Source | None, remedy: str) -> int:
    """Returns the width of a kept head, after comparing it with the config and the data.

    Raises:
      UserError: there is no head, or it does not fit; the message ends with `remedy`.
    """
    kept, asked = spec.num_classes, config.model.num_classes
    known = source.num_classes if source else None
    if not kept:
        raise UserError(f"{place} has no head to classify with. {remedy}.")
    if asked and asked != kept:
        raise UserError(f"the head of {place} has {kept} classes, but model.num_classes={asked}. {remedy}.")
    if known and kept < known:
        raise UserError(f"the head of {place} has {kept} classes, fewer than the data set's {known}. {remedy}.")
    if known and kept > known and not asked:
        raise UserError(
            f"the head of {place} has {kept} classes, more than the data set's {known}. {remedy}. If the data set has "
            f"the head's first classes, pass --config.model.num_classes={kept}."
        )
    return kept


def check_class_names(weights: Weights, source: Source | None, remedy: str) -> None:
    """Compares the class names of a kept head with those of the data, where both have names.

    Runs of this project have the data's class names, so any difference is an error. Other weights may use other words:
    a name at another position is an error, and other differences give a warning.

    Raises:
      UserError: the classes differ; the message ends with `remedy`.
    """
    if source is None or source.class_names is None or weights.class_names is None:
        return
    names, its_names = tuple(source.class_names), weights.class_names
    changes = describe_class_changes(its_names, names)
    if changes is None or (names, its_names) == (wordnet_ids("imagenet2012"), class_names("imagenet2012")):
        return
    if weights.format == "run" or moved_names(names, its_names):
        raise UserError(
            f"{weights.source} was trained on other classes than those of {source.name} ({changes}), so its logits do "
            f"not mean them. {remedy}."
        )
    names_differ = "the head of %s has other class names than %s (%s); labels are taken in order"
    logger.warning(names_differ, weights.source, source.name, changes)


def get_model_fields(config: ConfigDict, num_classes: int, spec: ModelSpec | None) -> dict[str, Any]:
    """Returns the arguments of `create_model`: the config's fields and, where they are None, those of the weights.

    Raises:
      UserError: neither names the model.
    """
    fields: dict[str, Any] = {"name": spec.name} | spec.overrides if spec else {}
    fields.pop("predict_patches", None)  # only the objective decides
    if not config.keep_head:
        fields.pop("pre_logits", None)  # dropped with the head (section 3.2), unless the config sets it
    fields |= {name: value for name, value in config.model.items() if value is not None}
    if "name" not in fields:
        raise UserError("set model.name, such as --config.model.name=ViT-B/16, or weights.")
    return fields | {"num_classes": num_classes}
