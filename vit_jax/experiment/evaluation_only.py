"""Builds the evaluation of given parameters, without training, from a config."""

import dataclasses
import logging
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import sharding
from vit_jax.config import check_fields
from vit_jax.data.sources import MissingDataError, Source, find_path
from vit_jax.errors import UserError
from vit_jax.experiment.data import open_eval_source
from vit_jax.experiment.evaluations import Evaluation, make_evaluations, make_setup, preprocessing_of
from vit_jax.experiment.model import check_class_names, find_weights, get_model_fields, num_kept_classes
from vit_jax.experiment.objective import make_objective
from vit_jax.files import parse_path
from vit_jax.models import create_model
from vit_jax.run.facts import open_as_trained, read_facts
from vit_jax.weights import Weights, transfer
from vit_jax.weights.identify import check_shapes, expected_shapes
from vit_jax.weights.mapping import unstack_arrays

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EvaluationOnly:
    """Parameters and their evaluations."""

    mesh: Mesh  # the devices
    model_fields: dict[str, Any]  # arguments of `create_model`
    model: nn.Module  # images -> (logits, intermediates)
    params: Any  # on the host; None if they are not downloaded yet
    abstract_params: Any  # their shapes, dtypes and shardings
    description: str  # one line about the weights
    evaluations: list[Evaluation]  # the evaluations to run
    missing: dict[str, str]  # error messages of missing data, by entry


def build_evaluation(
    config: ConfigDict, weights_path: str, *, allow_missing: bool = False, allow_data_change: bool = False
) -> EvaluationOnly:
    """Builds the evaluation of weights with their head, at the config's image size. Needs no training data.

    Args:
      config: see `vit_jax.config.base_config`.
      weights_path: see `config.weights`.
      allow_missing: for a dry run: accept missing data, and released weights that are not downloaded yet.
      allow_data_change: evaluate on the current data even if they have changed since training.

    Raises:
      UserError: the config, the weights and the data do not fit together.
    """
    check_fields(config)
    mesh = sharding.make_mesh(None, data=config.mesh.data, model=config.mesh.model)
    sharding.check_batch_size(config.eval_batch_size or config.batch_size, mesh, field="eval_batch_size")
    objective, needed_of_model = make_objective(config)
    predicts_patches = needed_of_model.get("predict_patches", False)
    spec, weights = find_weights(
        weights_path, config.model.name, allow_missing=allow_missing, predicts_patches=predicts_patches
    )
    if predicts_patches and not spec.overrides.get("predict_patches"):
        raise UserError(
            f"{weights_path} has no head that predicts patches: masked patch prediction did not train it. Set "
            "--config.objective=classification."
        )
    objective, needed_of_model = make_objective(config, spec.overrides)
    if weights:
        _warn_of_differences(config, weights, weights_path)
    missing: dict[str, str] = {}

    def on_missing(name: str, error: MissingDataError) -> None:
        if not allow_missing:
            raise error
        missing[name] = str(error)

    eval_source, num_classes = None, spec.num_classes
    if config.data.eval_split is not None:
        try:
            eval_source = _open_as_trained(
                config, weights, allow_change=allow_data_change, labelled=objective.needs_labels
            )
        except MissingDataError as error:
            on_missing(config.data.eval_split, error)
        if objective.needs_labels:
            remedy = "Fine-tune it first, or set data.eval_split=None"
            num_classes = num_kept_classes(config, weights_path, spec, eval_source, remedy)
            if weights:
                check_class_names(weights, eval_source, remedy)
    with_head = ConfigDict({**config, "keep_head": True}, type_safe=False)
    model_fields = get_model_fields(with_head, num_classes, spec) | needed_of_model
    if model_fields.get("pre_logits") and not spec.overrides.get("pre_logits"):
        del model_fields["pre_logits"]  # from a config of pre-training; the weights' head has no hidden layer
    model = create_model(**model_fields)
    size, params = config.data.image_size, None
    if weights:
        params, _ = transfer(weights, model, size, keep_head=True, keep_pre_logits=True)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    else:
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        shapes = jax.eval_shape(lambda images: model.init(jax.random.key(0), images)["params"], images)
        flat = jax.eval_shape(unstack_arrays, flax.traverse_util.flatten_dict(shapes, sep="/"))
        check_shapes(expected_shapes(spec, (size, size)), {name: array.shape for name, array in flat.items()})
    specs = sharding.parameter_specs(shapes, mesh, config.sharding, config.sharding_rules)
    shardings = sharding.state_shardings(shapes, mesh, specs)
    setup = make_setup(config, model, objective, mesh, weights.class_names if weights else None, shardings)
    evaluations = make_evaluations(config, setup, eval_source, on_missing)
    if not evaluations and not missing:
        raise UserError(
            "the config evaluates nothing: set data.eval_split, evals.fewshot.datasets, or the dataset of another of "
            f"config.evals ({', '.join(config.evals)})."
        )
    abstract_params = sharding.with_sharding(shapes, shardings)
    return EvaluationOnly(mesh, model_fields, model, params, abstract_params, str(spec), evaluations, missing)


def _open_as_trained(config: ConfigDict, weights: Weights | None, *, allow_change: bool, labelled: bool) -> Source:
    """Opens the evaluation split with the head's labels."""
    data, recorded = ConfigDict({**config.data}, type_safe=False), None
    if weights is not None and weights.format == "run":
        facts = read_facts(parse_path(weights.source))
        names = facts.class_names if facts else weights.class_names
        for split in (facts.eval, facts.train) if facts else ():
            if recorded is None and split and split.is_of(data.dataset, data.eval_split, data.eval_labels):
                recorded = split
        if recorded and find_path(data.dataset) is None:
            data.dataset = recorded.find()  # a relative path, from another working folder
    else:
        names = weights.class_names if weights and allow_change else None
    return open_as_trained(
        lambda known: open_eval_source(data, known, labelled=labelled),
        names,
        recorded,
        what=weights.source if weights else "",
        allow_change=allow_change,
    )


def _warn_of_differences(config: ConfigDict, weights: Weights, weights_path: str) -> None:
    """Warns if the loss or preprocessing differs from training, which is seldom intended."""
    if weights.probabilities and weights.probabilities != config.loss:
        logger.warning(
            "%s was trained with the %s loss; the loss that is measured is %s (config.loss)",
            *(weights_path, weights.probabilities, config.loss),
        )
    if weights.format != "run":
        return
    trained = weights.preprocessing.to_json()
    for name, value in preprocessing_of(config.data).to_json().items():
        if value != trained[name]:
            logger.warning("%s was trained and evaluated with %s %s; now %s", weights_path, name, trained[name], value)
