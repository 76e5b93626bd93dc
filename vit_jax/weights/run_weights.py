"""Reads the parameters of a run, with what its workdir records about them."""

import dataclasses
from typing import Any

import jax

from vit_jax.checkpoints import read_extra, read_parameters
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.files import AnyPath
from vit_jax.json_files import Fields, read_optional
from vit_jax.run.facts import read_facts
from vit_jax.weights.mapping import MAX_LAYERS
from vit_jax.weights.model_weights import Weights, from_params, read_attributes
from vit_jax.weights.preprocessing import MAX_SIDE, Preprocessing

_TRAINING_ATTRIBUTES = ("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate", "head_bias")


def read_run(workdir: AnyPath) -> Weights:
    """Reads the best parameters of a run; the last ones if it kept no best ones.

    Raises:
      UserError: the folder is not the workdir of a run, has no checkpoint, or a file in it is damaged.
    """
    config = read_optional(workdir / "config.json")
    fields = Fields(config, str(workdir / "config.json"))
    if "data" not in config:
        raise UserError(f"{workdir} is the workdir of a run, but config.json is missing or is not that of a run.")
    found = read_parameters(workdir / "best") or read_parameters(workdir / "checkpoints")
    if found is None:
        raise UserError(f"{workdir} has no parameters yet: no checkpoint was saved.")
    _, params, _ = found
    # A config need not name the model if its weights determine it.
    made = workdir / "model.json"
    model = Fields(read_optional(made), str(made)) if made.exists() else fields.fields("model")
    overrides = read_attributes(model, sum(leaf.size for leaf in jax.tree.leaves(params)), MAX_LAYERS)
    name = overrides.pop("name", None)
    if name is None:
        raise UserError(f"{workdir} does not say which model it trained: model.json is missing or damaged.")
    for attribute in ("num_classes", *_TRAINING_ATTRIBUTES):
        overrides.pop(attribute, None)
    notes: tuple[str, ...] = ()
    if facts := read_facts(workdir):
        names, loss, preprocessing = facts.class_names, facts.loss, Preprocessing.from_json(facts.preprocessing)
    else:
        data = fields.fields("data")
        names, notes = _class_names_of_old_run(workdir, config["data"])
        loss = fields.text("loss", "softmax", choices=("softmax", "sigmoid"))
        preprocessing = Preprocessing.of_evaluation(
            data.integer("image_size", at_least=1, at_most=MAX_SIDE),
            data.integer("eval_resize_small", None, at_least=1, at_most=MAX_SIDE),
            data.text("eval_resize", "bilinear"),
            data.flag("exif_orientation", False),  # a run without the field ignored EXIF
        )
    size = preprocessing.image_size
    weights = from_params(name, params, image_size=size, preprocessing=preprocessing, probabilities=loss, **overrides)
    if names is not None and len(names) != weights.spec.num_classes:
        notes += (f"the head has {weights.spec.num_classes:,} classes, and the data had {len(names):,}: no names",)
        names = None
    return dataclasses.replace(weights, class_names=names, format="run", notes=notes)


def _class_names_of_old_run(workdir: AnyPath, data: dict[str, Any]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Finds class names for a run older than facts.json in its data set, if that has not changed; adds a note."""
    older = f"{workdir} was written before runs recorded class names, and its data set"
    if data.get("mixture"):
        return None, (f"{older} is a mixture: labels have no names",)
    options: dict[str, Any] = {key: data.get(key) for key in ("image_key", "label_key", "max_labels")}
    try:
        source = open_source(data["dataset"], data["train_split"], **options)
    except UserError:
        return None, (f"{older} {data['dataset']!r} cannot be read: labels have no names",)
    trained_on = ((read_extra(workdir / "checkpoints") or {}).get("data") or {}).get("examples")
    if trained_on != source.fingerprint():
        return None, (f"{older} {data['dataset']!r} may have changed since: labels have no names",)
    if source.class_names is None:
        return None, ()
    return tuple(source.class_names), (f"{older} has not changed: names of classes are from {data['dataset']!r}",)
