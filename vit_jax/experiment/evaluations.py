"""From a config to what is evaluated: while a run trains, and of parameters that are not trained."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import sharding
from vit_jax.config import check_fields
from vit_jax.console import Tracked, show_names
from vit_jax.data.class_names import class_names as class_names_of
from vit_jax.data.class_names import wordnet_ids
from vit_jax.data.pipeline import EvalBatches
from vit_jax.data.sources import MissingDataError, Source, find_path, open_source
from vit_jax.data.sources.imagenet_variants import VARIANTS, open_variant
from vit_jax.data.sources.real_labels import NUM_CLASSES as NUM_IMAGENET_CLASSES
from vit_jax.errors import UserError
from vit_jax.evaluators import Evaluator
from vit_jax.evaluators.classification import ClassificationEvaluator
from vit_jax.evaluators.fewshot import FewShotEvaluator, check_splits
from vit_jax.experiment import build
from vit_jax.experiment.data import eval_transform, open_eval_source
from vit_jax.experiment.model import check_class_names, find_weights, get_model_fields, num_kept_classes
from vit_jax.models import create_model
from vit_jax.objectives.losses import make_loss
from vit_jax.run.facts import (
    RunFacts,
    SplitFacts,
    as_trained,
    describe_class_changes,
    describe_split_changes,
    moved_names,
    open_as_trained,
    read_facts,
)
from vit_jax.run.workdir import parse
from vit_jax.weights import Preprocessing, Weights, transfer
from vit_jax.weights.identify import Shapes, check_shapes, expected_shapes
from vit_jax.weights.mapping import unstack_arrays

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TestData:
    """What an evaluation measures, and what else it needs.

    Attributes:
      name: what its metrics' names begin with.
      test: the examples that are measured.
      classes: the only ones of the model's that compete; None: all.
      pool: of a few-shot evaluation, the examples that images are drawn from.
      validation: of a few-shot evaluation, those that l2 is chosen on.
    """

    name: str
    test: Source
    classes: tuple[int, ...] | None = None
    pool: Source | None = None
    validation: Source | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """All data sets that it reads."""
        return tuple(source for source in (self.pool, self.test, self.validation) if source is not None)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluator and when it runs.

    Attributes:
      name: what its metrics' names begin with.
      evaluator: see there.
      data: what it reads.
      every_steps: how often; None: at the end only.
      is_main: whether its accuracy says which parameters are the best.
    """

    name: str
    evaluator: Evaluator
    data: TestData
    every_steps: int | None
    is_main: bool = False


OnMissing = Callable[[str, MissingDataError], None]


def make_evaluations(
    config: ConfigDict,
    model: nn.Module,
    mesh: Mesh,
    eval_source: Source | None,
    *,
    class_names: Sequence[str] | None = None,
    shardings: Any = None,
    before_each_batch: Callable[[], None] = lambda: None,
    on_missing: OnMissing | None = None,
) -> list[Evaluation]:
    """What is evaluated: classification of the evaluation split, then what else the config asks for.

    Args:
      config: see `vit_jax.config.base_config`.
      model: images -> (logits, intermediates).
      mesh: the devices.
      eval_source: evaluation examples; None: there are none.
      class_names: of the logits, where they are known.
      shardings: of the parameters; None: replicated.
      before_each_batch: called between batches; may raise to end an evaluation.
      on_missing: see `open_test_data`.

    Raises:
      UserError: data are missing, or are not as they should be.
    """
    batch_size = config.eval_batch_size or config.batch_size

    def classification(name: str, source: Source, classes: Sequence[int] | None = None) -> ClassificationEvaluator:
        batches = EvalBatches(
            source,
            eval_transform(config.data),
            sharding.batch_sharding(mesh),
            batch_size=batch_size,
            num_classes=model.num_classes,
            num_threads=config.data.num_threads,
            max_bad_records=config.data.max_bad_records,
        )
        progress = Tracked(batches, f"evaluation on {name}", before_each=before_each_batch)
        return ClassificationEvaluator(model, progress, make_loss(config.loss), mesh, shardings, classes)

    for name in VARIANTS:
        if config.variants[name]:
            _check_imagenet(model.num_classes, class_names, f"variants.{name}")
    evaluations = []
    for data in open_test_data(config, eval_source, on_missing):
        evaluator: Evaluator
        if data.pool is not None:
            evaluator = _make_fewshot(config, data.pool, data, model, mesh, shardings, before_each_batch)
            every_steps = config.fewshot.every_steps
        else:
            evaluator = classification(data.name, data.test, data.classes)
            every_steps = config.eval_every_steps if data.test is eval_source else config.variants.every_steps
        evaluations.append(Evaluation(data.name, evaluator, data, every_steps, is_main=data.test is eval_source))
    return evaluations


def open_test_data(
    config: ConfigDict, eval_source: Source | None, on_missing: OnMissing | None = None
) -> list[TestData]:
    """Opens what a config evaluates: the evaluation split, ImageNet's other test sets, few-shot data sets.

    Args:
      config: see `vit_jax.config.base_config`.
      eval_source: evaluation examples; None: there are none.
      on_missing: called with the name and the error of what is missing, which is left out; None: that is an error.

    Raises:
      UserError: data are missing, or are not as they should be.
    """
    found = [] if eval_source is None else [TestData(config.data.eval_split, eval_source)]
    opens: dict[str, Callable[[], TestData]] = {
        name: functools.partial(_open_variant, config, name) for name in VARIANTS if config.variants[name]
    }
    for dataset in config.fewshot.datasets:
        name = f"fewshot/{_short_name(dataset)}"
        if name in opens or name in [each.name for each in found]:
            raise UserError(
                f"two of fewshot.datasets would be called {name} in metrics: {', '.join(config.fewshot.datasets)}. "
                "Evaluate them one after the other, with a --workdir each."
            )
        opens[name] = functools.partial(_open_fewshot, config, name, dataset)
    for name, open_one in opens.items():
        try:
            found.append(open_one())
        except MissingDataError as error:
            if on_missing is None:
                raise
            on_missing(name, error)
    return found


def _open_variant(config: ConfigDict, name: str) -> TestData:
    validation_split = config.data.eval_split or "validation"
    variant = open_variant(
        name, config.variants[name], validation=config.data.dataset, validation_split=validation_split
    )
    return TestData(name, variant.source, variant.classes)


def _open_fewshot(config: ConfigDict, name: str, dataset: str) -> TestData:
    splits = (config.fewshot.train_split, config.fewshot.test_split, config.fewshot.validation_split)
    pool = open_source(dataset, splits[0]) if splits[0] else None
    names = pool.class_names if pool else None
    test, validation = (open_source(dataset, split, class_names=names) if split else None for split in splits[1:])
    if pool is None or test is None:
        raise UserError("fewshot.train_split and fewshot.test_split must be splits, such as 'train' and 'test'.")
    check_splits(pool, test, validation if len(config.fewshot.l2) > 1 else None)
    return TestData(name, test, pool=pool, validation=validation)


def _check_imagenet(num_classes: int, names: Sequence[str] | None, what: str) -> None:
    """Raises unless the classes of a head are ImageNet's, in their usual order as far as names are known."""
    if num_classes != NUM_IMAGENET_CLASSES:
        raise UserError(
            f"{what} is for models with ImageNet's {NUM_IMAGENET_CLASSES:,} classes; this one has {num_classes:,}."
        )
    if names is None:
        return
    ids, words = wordnet_ids("imagenet2012"), class_names_of("imagenet2012")
    if moved_names(names, ids) or moved_names(names, words) or not {*ids, *words} & {*names}:
        raise UserError(
            f"{what} is for models with ImageNet's classes in the order of their WordNet ids; the classes of this one "
            f"are {show_names(names, 3)}. Leave it out."
        )


def describe_data(train_source: Source | None, evaluations: Sequence[Evaluation]) -> str:
    """A line for each of the data sets, in which those of all processes must agree."""
    sources = [] if train_source is None else [("training", train_source)]
    sources += [(each.name, source) for each in evaluations for source in each.data.sources]
    return "\n".join(f"{name}: {len(source):,} images, {source.fingerprint()}" for name, source in sources)


def _preprocessing(data: ConfigDict) -> Preprocessing:
    """What is done to images of an evaluation; `data` is the part of the config about data."""
    return Preprocessing.of_evaluation(data.image_size, data.eval_resize_small, data.eval_resize, data.exif_orientation)


def describe_facts(config: ConfigDict, parts: build.Experiment) -> RunFacts:
    """What a run keeps of its data and its config, to be used without them."""
    data, train_source, eval_source = config.data, parts.train_source, parts.eval_source
    if train_source is None:
        raise ValueError("a run has training data")
    dataset = ",".join(str(dataset) for dataset, _ in data.mixture) if data.mixture else data.dataset
    return RunFacts(
        num_classes=parts.num_classes,
        class_names=parts.class_names,
        max_labels=data.max_labels or train_source.max_labels,
        loss=config.loss,
        preprocessing=_preprocessing(data).to_json(),
        train=SplitFacts.of(train_source, dataset, data.train_split),
        eval=None
        if eval_source is None
        else SplitFacts.of(eval_source, data.dataset, data.eval_split, data.eval_labels),
    )


def check_resumed(
    kept: RunFacts | None, now: RunFacts, parts: build.Experiment, place: str, *, allow_change: bool
) -> bool:
    """Refuses to go on with a run whose classes or examples have changed since its last start.

    What the config says otherwise than at the last start is the affair of `workdir.check_config`.

    Args:
      kept: of the last start; None if that was made by an older version of this code.
      now: of this start.
      parts: of this start.
      place: the workdir, for messages.
      allow_change: go on with today's evaluation examples. Those to train on never may change: the position in them
        would mean others.

    Returns:
      Whether accuracies of the last start and of this one are of the same examples, as far as it is known.

    Raises:
      UserError: they have changed.
    """
    if kept is None or parts.train_source is None:
        return True
    changes = describe_class_changes(kept.class_names, now.class_names)
    if changes := changes or describe_split_changes(kept.train, parts.train_source, kept.class_names):
        raise UserError(
            f"the data set has changed since the last start of {place} ({changes}). Bring back what it was to go on, "
            "or start in a new workdir."
        )
    if (
        kept.eval
        and now.eval
        and parts.eval_source
        and kept.eval.is_of(now.eval.dataset, now.eval.split, now.eval.labels)
    ):
        as_trained(parts.eval_source, None, kept.eval, what=place, allow_change=allow_change)
    return bool(kept.eval and now.eval and kept.eval.fingerprint == now.eval.fingerprint)


def _make_fewshot(
    config: ConfigDict,
    pool: Source,
    data: TestData,
    model: nn.Module,
    mesh: Mesh,
    shardings: Any,
    before_each_batch: Callable[[], None],
) -> FewShotEvaluator:
    fields = config.fewshot
    image_size = fields.image_size or config.data.image_size
    return FewShotEvaluator(
        model,
        pool,
        data.test,
        mesh,
        validation=data.validation,
        shots=fields.shots,
        l2=fields.l2,
        seeds=fields.seeds,
        representations=fields.representations,
        crop_from=fields.crop_from or round(image_size * 256 / 224),
        image_size=image_size,
        resize=config.data.eval_resize,
        exif_orientation=config.data.exif_orientation,
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
      model: images -> (logits, intermediates).
      params: on the host; None if they are missing.
      abstract_params: their shapes, dtypes and shardings.
      description: of the weights, a line.
      evaluations: what is measured.
      missing: messages by name of evaluations whose data are missing.
    """

    mesh: Mesh
    model_fields: dict[str, Any]
    model: nn.Module
    params: Any
    abstract_params: Any
    description: str
    evaluations: list[Evaluation]
    missing: dict[str, str]


def _unstacked_shapes(params: Any) -> Shapes:
    flat = jax.eval_shape(unstack_arrays, flax.traverse_util.flatten_dict(params, sep="/"))
    return {name: array.shape for name, array in flat.items()}


def build_evaluation(
    config: ConfigDict, place: str, *, allow_missing: bool = False, allow_data_change: bool = False
) -> EvaluationOnly:
    """Makes what evaluates weights, head and all, at the config's image size; needs no training data.

    Args:
      config: see `vit_jax.config.base_config`.
      place: of the weights, as `config.weights`.
      allow_missing: do without data that are missing, and without released weights that were not fetched yet; to show
        what would be evaluated.
      allow_data_change: evaluate on today's data, also if they have changed since the weights were trained.

    Raises:
      UserError: something in the config, the weights or the data is not as it should be.
    """
    check_fields(config)
    mesh = sharding.make_mesh(None, data=config.mesh.data, model=config.mesh.model)
    sharding.check_batch_size(config.eval_batch_size or config.batch_size, mesh, field="eval_batch_size")
    spec, weights = find_weights(place, config.model.name, allow_missing=allow_missing)
    if weights:
        _tell_differences(config, weights, place)
    missing: dict[str, str] = {}

    def note(name: str, error: MissingDataError) -> None:
        missing[name] = str(error)

    eval_source, num_classes = None, spec.num_classes
    if config.data.eval_split is not None:
        try:
            eval_source = _open_as_trained(config, weights, allow_change=allow_data_change)
        except MissingDataError as error:
            if not allow_missing:
                raise
            note(config.data.eval_split, error)
        remedy = "Fine-tune it first, or set data.eval_split=None"
        num_classes = num_kept_classes(config, place, spec, eval_source, remedy)
        if weights:
            check_class_names(weights, eval_source, remedy)
    with_head = ConfigDict({**config, "keep_head": True}, type_safe=False)
    model_fields = get_model_fields(with_head, num_classes, spec)
    if model_fields.get("pre_logits") and not spec.overrides.get("pre_logits"):
        del model_fields["pre_logits"]  # asked for by a config of pre-training; the weights' own head has none
    model = create_model(**model_fields)
    size, params = config.data.image_size, None
    if weights:
        params, _ = transfer(weights, model, size, keep_head=True, keep_pre_logits=True)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    else:
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        shapes = jax.eval_shape(lambda images: model.init(jax.random.key(0), images)["params"], images)
        check_shapes(expected_shapes(spec, (size, size)), _unstacked_shapes(shapes))
    specs = sharding.parameter_specs(shapes, mesh, config.sharding, config.sharding_rules)
    shardings = sharding.state_shardings(shapes, mesh, specs)
    on_missing = note if allow_missing else None
    evaluations = make_evaluations(
        config,
        model,
        mesh,
        eval_source,
        class_names=weights.class_names if weights else None,
        shardings=shardings,
        on_missing=on_missing,
    )
    if not evaluations and not missing:
        raise UserError(
            "the config evaluates nothing: set data.eval_split, fewshot.datasets or one of variants (vit_jax/config.py "
            "lists them)."
        )
    return EvaluationOnly(
        mesh=mesh,
        model_fields=model_fields,
        model=model,
        params=params,
        abstract_params=sharding.with_sharding(shapes, shardings),
        description=str(spec),
        evaluations=evaluations,
        missing=missing,
    )


def _open_as_trained(config: ConfigDict, weights: Weights | None, *, allow_change: bool) -> Source:
    """Opens the evaluation split, with labels as the head has them."""
    data = ConfigDict({**config.data}, type_safe=False)
    if weights is None or weights.format != "run":
        names = weights.class_names if weights and allow_change else None
        return open_as_trained(
            lambda known: open_eval_source(data, known),
            names,
            None,
            what=weights.source if weights else "",
            allow_change=allow_change,
        )
    kept = read_facts(parse(weights.source))
    names = kept.class_names if kept else weights.class_names
    splits = () if kept is None else (kept.eval, kept.train)
    recorded = next(
        (each for each in splits if each and each.is_of(data.dataset, data.eval_split, data.eval_labels)), None
    )
    if recorded and find_path(data.dataset) is None:
        data.dataset = recorded.find()  # a relative path, from another working folder
    return open_as_trained(
        lambda known: open_eval_source(data, known),
        names,
        recorded,
        what=weights.source,
        allow_change=allow_change,
    )


def _tell_differences(config: ConfigDict, weights: Weights, place: str) -> None:
    """Says what is measured otherwise than the weights were trained, which is allowed, but seldom meant."""
    if weights.probabilities and weights.probabilities != config.loss:
        logger.warning(
            "%s was trained with the %s loss; the loss that is measured is %s, as config.loss says",
            *(place, weights.probabilities, config.loss),
        )
    if weights.format != "run":
        return
    data = config.data
    now = _preprocessing(data).to_json()
    then = weights.preprocessing.to_json()
    for name, value in now.items():
        if value != then[name]:
            logger.warning("%s was trained and evaluated with %s %s; now %s", place, name, then[name], value)
