"""From a config to what is evaluated: while a run trains, and of parameters that are not trained."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import experiment, partitioning
from vit_jax.config import check_fields
from vit_jax.data.pipeline import EvalBatches
from vit_jax.data.sources import Source, open_source
from vit_jax.data.sources.imagenet_variants import VARIANTS, open_variant
from vit_jax.data.sources.real import NUM_CLASSES as NUM_IMAGENET_CLASSES
from vit_jax.errors import UserError
from vit_jax.evaluators import Evaluator
from vit_jax.evaluators.classification import ClassificationEvaluator
from vit_jax.evaluators.fewshot import FewShotEvaluator
from vit_jax.losses import make_loss
from vit_jax.metrics import Progress
from vit_jax.models import create_model
from vit_jax.weights import load as load_weights
from vit_jax.weights import transfer


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluator and when it runs.

    Attributes:
      name: what its metrics' names begin with.
      evaluator: see there.
      sources: the data sets that it reads.
      every_steps: how often; None: at the end only.
      is_main: whether its accuracy says which parameters are the best.
    """

    name: str
    evaluator: Evaluator
    sources: tuple[Source, ...]
    every_steps: int | None
    is_main: bool = False


def make_evaluations(
    config: ConfigDict,
    model: nn.Module,
    mesh: Mesh,
    eval_source: Source | None,
    *,
    shardings: Any = None,
    before_each_batch: Callable[[], None] = lambda: None,
) -> list[Evaluation]:
    """What is evaluated: classification of the evaluation split, then what else the config asks for.

    Args:
      config: see `vit_jax.config.base_config`.
      model: images -> (logits, intermediates).
      mesh: the devices.
      eval_source: evaluation examples; None: there are none.
      shardings: of the parameters; None: replicated.
      before_each_batch: called between batches; may raise to end an evaluation.

    Raises:
      UserError: data are missing, or are not as they should be.
    """
    batch_size = config.eval_batch_size or config.batch_size

    def classification(name: str, source: Source, classes: Sequence[int] | None = None) -> ClassificationEvaluator:
        batches = EvalBatches(
            source,
            experiment.eval_transform(config.data),
            partitioning.batch_sharding(mesh),
            batch_size=batch_size,
            num_classes=model.num_classes,
            num_threads=config.data.num_threads,
            max_bad_records=config.data.max_bad_records,
        )
        progress = Progress(batches, f"evaluation on {name}", before_each=before_each_batch)
        return ClassificationEvaluator(model, progress, make_loss(config.loss), mesh, shardings, classes)

    evaluations = []
    if eval_source is not None:
        name = config.data.eval_split
        evaluator = classification(name, eval_source)
        evaluations.append(Evaluation(name, evaluator, (eval_source,), config.eval_every_steps, is_main=True))
    for name in VARIANTS:
        if place := config.variants[name]:
            if model.num_classes != NUM_IMAGENET_CLASSES:
                raise UserError(
                    f"variants.{name} is for models with ImageNet's {NUM_IMAGENET_CLASSES:,} classes; this one has "
                    f"{model.num_classes:,}."
                )
            variant = open_variant(
                name, place, validation=config.data.dataset, validation_split=config.data.eval_split or "validation"
            )
            evaluator = classification(name, variant.source, variant.classes)
            evaluations.append(Evaluation(name, evaluator, (variant.source,), config.variants.every_steps))
    for dataset in config.fewshot.datasets:
        splits = (config.fewshot.train_split, config.fewshot.test_split, config.fewshot.validation_split)
        sources = tuple(open_source(dataset, split) for split in splits if split)
        fewshot = _make_fewshot(config, sources, model, mesh, shardings, before_each_batch)
        name = f"fewshot/{_short_name(dataset)}"
        if name in [each.name for each in evaluations]:
            raise UserError(
                f"two of fewshot.datasets would be called {name} in metrics: {', '.join(config.fewshot.datasets)}. "
                "Evaluate them one after the other, with a --workdir each."
            )
        evaluations.append(Evaluation(name, fewshot, sources, config.fewshot.every_steps))
    return evaluations


def describe_data(train_source: Source | None, evaluations: Sequence[Evaluation]) -> str:
    """A line for each of the data sets, in which those of all processes must agree."""
    sources = [] if train_source is None else [("training", train_source)]
    sources += [(each.name, source) for each in evaluations for source in each.sources]
    return "\n".join(f"{name}: {len(source):,} images, {source.fingerprint()}" for name, source in sources)


def _make_fewshot(
    config: ConfigDict,
    sources: tuple[Source, ...],
    model: nn.Module,
    mesh: Mesh,
    shardings: Any,
    before_each_batch: Callable[[], None],
) -> FewShotEvaluator:
    fields = config.fewshot
    image_size = fields.image_size or config.data.image_size
    train, test, *validation = sources
    return FewShotEvaluator(
        model,
        train,
        test,
        mesh,
        validation=validation[0] if validation else None,
        shots=fields.shots,
        l2=fields.l2,
        seeds=fields.seeds,
        representations=fields.representations,
        crop_from=fields.crop_from or round(image_size * 256 / 224),
        image_size=image_size,
        resize=config.data.eval_resize,
        whiten=fields.whiten,
        bias=fields.bias,
        batch_size=config.eval_batch_size or config.batch_size,
        shardings=shardings,
        num_threads=config.data.num_threads,
        max_bad_records=config.data.max_bad_records,
        before_each_batch=before_each_batch,
    )


def _short_name(dataset: str) -> str:
    """A data set in the names of metrics: without the folder, or without "tfds:"."""
    prefix, colon, name = dataset.partition(":")
    return name if colon and prefix in ("tfds", "vtab") else dataset.rstrip("/").rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class EvaluationOnly:
    """What there is to evaluate parameters that are not trained.

    Attributes:
      mesh: the devices.
      model_fields: what `create_model` was given.
      params: on the host.
      abstract_params: their shapes, dtypes and shardings.
      description: of the weights, a line.
      evaluations: what is measured.
    """

    mesh: Mesh
    model_fields: dict[str, Any]
    params: Any
    abstract_params: Any
    description: str
    evaluations: list[Evaluation]


def build_evaluation(config: ConfigDict, place: str) -> EvaluationOnly:
    """Makes what evaluates weights, head and all, at the config's image size; needs no training data.

    Args:
      config: see `vit_jax.config.base_config`.
      place: of the weights, as `config.weights`.

    Raises:
      UserError: something in the config, the weights or the data is not as it should be.
    """
    check_fields(config)
    mesh = partitioning.make_mesh(None, data=config.mesh.data, model=config.mesh.model)
    partitioning.check_batch_size(config.eval_batch_size or config.batch_size, mesh, field="eval_batch_size")
    weights = load_weights(place, model=config.model.name)
    eval_source = None
    num_classes = weights.spec.num_classes
    if config.data.eval_split is not None:
        eval_source = experiment.open_eval_source(config.data)
        remedy = "Fine-tune it first, or set data.eval_split=None"
        num_classes = experiment.num_kept_classes(config, place, weights.spec, eval_source, remedy)
        experiment.check_class_names(weights, eval_source, remedy)
    with_head = ConfigDict({**config, "keep_head": True}, type_safe=False)
    model_fields = experiment.get_model_fields(with_head, num_classes, weights.spec)
    model = create_model(**model_fields)
    params, _ = transfer(weights, model, config.data.image_size, keep_head=True, keep_pre_logits=True)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    specs = partitioning.parameter_specs(shapes, mesh, config.sharding, config.sharding_rules)
    shardings = partitioning.state_shardings(shapes, mesh, specs)
    return EvaluationOnly(
        mesh=mesh,
        model_fields=model_fields,
        params=params,
        abstract_params=partitioning.with_sharding(shapes, shardings),
        description=str(weights.spec),
        evaluations=make_evaluations(config, model, mesh, eval_source, shardings=shardings),
    )
