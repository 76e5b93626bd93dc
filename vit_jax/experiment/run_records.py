"""Records each start and the result of a run, and checks the records when the run resumes."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any, cast

from vit_jax import sharding
from vit_jax.data.pipeline import TrainBatches
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.experiment.build import Experiment
from vit_jax.experiment.dry_run import count_parameters
from vit_jax.experiment.evaluations import preprocessing_of
from vit_jax.files import AnyPath, write_atomically
from vit_jax.multihost import processes
from vit_jax.run import workdir
from vit_jax.run.accounting import paper_core_days
from vit_jax.run.facts import (
    RunFacts,
    SplitFacts,
    describe_class_changes,
    describe_split_changes,
    open_as_trained,
    read_facts,
    write_facts,
)
from vit_jax.run.summary import write_summary

logger = logging.getLogger(__name__)


def resume(
    experiment: Experiment,
    batches: TrainBatches,
    path: AnyPath,
    step: int,
    position: Mapping[str, Any],
    *,
    allow_data_change: bool = False,
) -> RunFacts:
    """Continues a run from a checkpoint: moves the training data to its position, and checks that they are the same.

    `position` is the checkpoint's. With `allow_data_change` the evaluation data may have changed. Returns the facts
    about the data that this start records.

    Raises:
      UserError: the run has done more steps than it should have, or its data have changed.
    """
    if step > experiment.num_steps:
        raise UserError(
            f"the run in {path} has done {step:,} steps already, more than the {experiment.num_steps:,} that it should "
            "have. Set at least as many (steps, epochs or images), or choose another --workdir for a shorter run."
        )
    facts, kept, same_examples = describe_facts(experiment), None, True
    try:
        kept = read_facts(path)
    except UserError as error:  # damaged; this start writes new ones
        logger.warning("%s Changes of the data cannot be noticed.", error)
    if kept:
        same_examples = _check_data(kept, facts, experiment, str(path), allow_change=allow_data_change)
    batches.set_state(dict(position))
    if (images := position["images"]) != step * experiment.batch_size:
        epochs = (images + (experiment.num_steps - step) * experiment.batch_size) / experiment.num_train_images
        logger.info("the batch size was different before; at its end the run will have seen %.4g epochs", epochs)
    return dataclasses.replace(facts, eval_since=step if not same_examples else kept.eval_since if kept else 0)


def describe_facts(experiment: Experiment) -> RunFacts:
    """The facts that a run records, to be usable without its data and config."""
    config, data = experiment.config, experiment.config.data
    train_source, eval_source = cast(Source, experiment.train_source), experiment.eval_source
    dataset = ",".join(str(dataset) for dataset, _ in data.mixture) if data.mixture else data.dataset
    return RunFacts(
        num_classes=experiment.num_classes,
        class_names=experiment.class_names,
        max_labels=data.max_labels or train_source.max_labels,
        loss=config.loss,
        preprocessing=preprocessing_of(data).to_json(),
        train=SplitFacts.of(train_source, dataset, data.train_split),
        eval=SplitFacts.of(eval_source, data.dataset, data.eval_split, data.eval_labels)
        if eval_source is not None
        else None,
    )


def _check_data(kept: RunFacts, now: RunFacts, experiment: Experiment, path: str, *, allow_change: bool) -> bool:
    """Refuses to resume a run whose classes or examples have changed since its last start.

    With `allow_change` the evaluation examples may have changed. Training examples must stay the same, because the
    position in the data would mean other examples. Returns whether both starts are known to evaluate on the same ones.
    """
    train_source, eval_source = cast(Source, experiment.train_source), experiment.eval_source
    changes = describe_class_changes(kept.class_names, now.class_names)
    if changes := changes or describe_split_changes(kept.train, train_source, kept.class_names):
        raise UserError(
            f"the data set has changed since the last start of {path} ({changes}). Restore it to resume, or start in a "
            "new workdir."
        )
    if not (kept.eval and now.eval and eval_source):
        return False
    if kept.eval.is_of(now.eval.dataset, now.eval.split, now.eval.labels):
        open_as_trained(lambda _: eval_source, None, kept.eval, what=path, allow_change=allow_change)
    return kept.eval.fingerprint == now.eval.fingerprint


def record_start(experiment: Experiment, path: AnyPath, step: int, facts: RunFacts) -> None:
    """Records in the workdir how a start runs, on what data, and with what model. The main process writes."""
    if not processes.is_main_process():
        return
    workdir.record_start(path, experiment.config, step=step, devices=sharding.describe_devices(experiment.mesh))
    write_atomically(path / "model.json", json.dumps(experiment.model_fields, indent=1) + "\n")
    write_facts(path, facts)
    (path / workdir.FAILURE).unlink(missing_ok=True)


def record_result(
    experiment: Experiment,
    path: AnyPath,
    step: int,
    *,
    images: int,
    overlap: Mapping[str, int],
    seconds: float,
) -> dict[str, Any]:
    """Writes `summary.json` and `summary.md` of a finished run; returns the former's content, {} in other processes.

    Args:
      experiment: of the run.
      path: the workdir.
      step: number of steps made.
      images: number of images seen, counting repetitions.
      overlap: by evaluation, how many of its examples were trained on.
      seconds: how long this start took.
    """
    if not processes.is_main_process():
        return {}
    config = experiment.config
    published = paper_core_days(experiment.model_name, config.data.image_size, images)
    return write_summary(
        path,
        {
            "model": experiment.model_name,
            "parameters": count_parameters(experiment.step.abstract_state.params),
            "dataset": config.data.dataset,
            "steps": step,
            "epochs": images / experiment.num_train_images,
        },
        eval_split=config.data.eval_split,
        flops_per_image=experiment.train_flops,
        paper_core_days=None if config.train_only else published,
        overlap=overlap,
        seconds=seconds,
    )
