"""The model of a run, and the weights it begins with."""

import logging
from typing import Any

from ml_collections import ConfigDict

from vit_jax.data.class_names import class_names, moved_names, wordnet_ids
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.run.facts import describe_class_changes
from vit_jax.weights import ModelSpec, Weights, get_checkpoint, list_checkpoints
from vit_jax.weights import load as load_weights
from vit_jax.weights.addresses import cached_path

logger = logging.getLogger(__name__)


def find_weights(place: str, model: str | None, *, allow_missing: bool) -> tuple[ModelSpec, Weights | None]:
    """Loads weights.

    Args:
      place: as `config.weights`.
      model: name of the model that they should be of; None: as they say.
      allow_missing: do without released weights that were not fetched yet.

    Returns:
      the model, and the weights, None if they are missing.
    """
    if allow_missing and place in list_checkpoints():
        released = get_checkpoint(place)
        if not cached_path(released.url).exists():
            logger.warning("weights %s are not here yet; a run will fetch them", place)
            size = (released.image_size, released.image_size)
            return ModelSpec(released.model, released.num_classes, released.model_overrides, size), None
    weights = load_weights(place, model=model)
    for note in weights.notes:
        logger.info("weights %s: %s", place, note)
    return weights.spec, weights


def choose_num_classes(config: ConfigDict, spec: ModelSpec | None, train_source: Source | None) -> int:
    """Width of the logits: that of a head that is kept, the config's, or as many as the data have classes.

    Args:
      config: see `vit_jax.config.base_config`.
      spec: of the model that the weights are of, if there are any.
      train_source: training examples; None if they are missing.

    Raises:
      UserError: it is not known, or does not fit.
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
            f"model.num_classes {num_classes} is less than the data set's {known}. Leave it out, or use at least "
            f"{known}."
        )
    return num_classes


def num_kept_classes(config: ConfigDict, place: str, spec: ModelSpec, source: Source | None, remedy: str) -> int:
    """Width of a head that is kept.

    Args:
      config: see `vit_jax.config.base_config`.
      place: of the weights, for messages.
      spec: of the model that they are of.
      source: what is classified, if it is known.
      remedy: what to do instead, for messages.

    Raises:
      UserError: there is no head, or it is of another width than the data or the config want.
    """
    kept, asked = spec.num_classes, config.model.num_classes
    known = source.num_classes if source else None
    if not kept:
        raise UserError(f"{place} has no head to classify with. {remedy}.")
    if asked and asked != kept:
        raise UserError(f"the head of {place} has {kept} classes, but model.num_classes={asked}. {remedy}.")
    if known and kept < known:
        raise UserError(f"{kept} classes, of the head of {place}, are less than the data set's {known}. {remedy}.")
    if known and kept > known and not asked:
        raise UserError(
            f"the head of {place} has {kept} classes, and the data set {known}, so they are hardly the same. {remedy}. "
            f"If the data set's are the first of the head's, say so: --config.model.num_classes={kept}."
        )
    return kept


def check_class_names(weights: Weights, source: Source | None, remedy: str) -> None:
    """Compares the classes that a head was trained on with those of the data, where both are known by name.

    Only a run of this project is sure to call its classes as its data do. Of other weights names that mean another
    label are an error, and names that differ a warning.

    Raises:
      UserError: they are others, or in another order; `remedy` says what to do instead.
    """
    if source is None or source.class_names is None or weights.class_names is None:
        return
    names, its_names = tuple(source.class_names), weights.class_names
    changes = describe_class_changes(its_names, names)
    if changes is None or (names, its_names) == (wordnet_ids("imagenet2012"), class_names("imagenet2012")):
        return
    if weights.format == "run" or moved_names(names, its_names):
        raise UserError(
            f"{weights.source} was trained on other classes than those of {source.name} ({changes}), so its head means "
            f"something else. {remedy}."
        )
    logger.warning(
        "the head of %s calls its classes otherwise than %s (%s); labels are taken in order",
        *(weights.source, source.name, changes),
    )


def get_model_fields(config: ConfigDict, num_classes: int, spec: ModelSpec | None) -> dict[str, Any]:
    """What the model is made with: the config's fields, and where these are None, what the weights say.

    Raises:
      UserError: neither names the model.
    """
    overrides: dict[str, Any] = {}
    if spec:
        # At fine-tuning the whole head goes, with its hidden layer (section 3.2), unless the config asks for that.
        left_out = () if config.keep_head else ("pre_logits",)
        overrides = {"name": spec.name} | {key: value for key, value in spec.overrides.items() if key not in left_out}
    overrides |= {name: value for name, value in config.model.items() if value is not None}
    if "name" not in overrides:
        raise UserError("set model.name, such as --config.model.name=ViT-B/16, or weights, which tell the model.")
    return overrides | {"num_classes": num_classes}
