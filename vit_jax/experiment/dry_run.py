"""What a run will do, in words and tables, before it does it."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import sharding
from vit_jax.config import flatten
from vit_jax.costs.flops import forward_flops
from vit_jax.data.transfer_tasks import gap_learning_rate
from vit_jax.experiment.build import Experiment
from vit_jax.experiment.evaluation_only import EvaluationOnly
from vit_jax.experiment.fine_tuning import PAGE_SIZES, dropout_of, fitting_size
from vit_jax.optimizers import decay_mask
from vit_jax.paper.tables import FIGURE_9, TABLE_1, TABLE_3
from vit_jax.sharding import name_of

_FIGURE_9 = f"{FIGURE_9['gap']:g} against {FIGURE_9['cls']:g}"


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """A line of the parameter table."""

    name: str
    shape: str
    dtype: str
    size: int


@dataclasses.dataclass(frozen=True)
class DecayRow(ParameterRow):
    """A line of the parameter table with a column for weight decay."""

    decayed: str


def count_parameters(params: Any) -> int:
    """Number of values in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def describe_run(config: ConfigDict, experiment: Experiment) -> str:
    """A few lines: model, data, length, devices."""
    source = experiment.train_source
    size = config.data.image_size
    classes = experiment.num_classes
    epochs = experiment.num_steps * config.batch_size / experiment.num_train_images
    dataset = source.name if source is not None and config.data.mixture else config.data.dataset
    data = f"{dataset} ({config.data.train_split}): {experiment.num_train_images:,} images"
    if source is None:
        data += " expected, NOT HERE YET"
    if experiment.eval_source is not None:
        data += f"; evaluation on {config.data.eval_split}: {len(experiment.eval_source):,} images"
    layer_decay = "" if config.optimizer.layer_decay is None else f", layer decay {config.optimizer.layer_decay:g}"
    accumulation = f" in {config.accumulation_steps} parts" if config.accumulation_steps > 1 else ""
    parameters = count_parameters(experiment.step.abstract_state.params)
    flops = forward_flops(experiment.model, size)
    images = experiment.num_steps * config.batch_size
    exaflops = experiment.train_flops * images / 1e18
    held = sharding.bytes_per_device(experiment.step.abstract_state) / 1e9
    trained = count_parameters(experiment.step.trained(experiment.step.abstract_state.params))
    begun = []
    if config.weights:
        anew = ", ".join(experiment.transfer_report.initialised) if experiment.transfer_report else "not read yet"
        begun = [f"weights   {config.weights}; new: {anew or 'nothing'}; trained: {trained:,} parameters"]
    lines = [
        f"model     {experiment.model_name}, {classes:,} classes, {parameters:,} parameters, images {size}x{size}",
        *begun,
        *describe_choices(config, experiment),
        f"data      {data}",
        f"training  {experiment.num_steps:,} steps of {config.batch_size:,} images{accumulation}, {epochs:.4g} epochs; "
        f"{config.optimizer.name}{layer_decay}, {config.loss} cross-entropy",
        f"compute   {flops / 1e9:.4g} GFLOP an image forward (multiply-add = 2), {exaflops:.4g} exaFLOP in all at "
        f"{experiment.train_flops / flops:.3g} x forward",
        f"devices   {_describe_mesh(experiment.mesh)}; state {config.sharding}, {held:.3g} GB on each",
    ]
    return "\n".join(lines)


def _describe_mesh(mesh: Mesh) -> str:
    devices = sharding.describe_devices(mesh)
    axes = " x ".join(f"{name} {size}" for name, size in devices["mesh"].items())
    where = f"{devices['num_processes']} process(es)"
    if devices["num_slices"] > 1:
        where += f" on {devices['num_slices']} slices"
    return f"{devices['num_devices']} x {devices['device_kind']} in {where}, mesh {axes}"


def describe_choices(config: ConfigDict, experiment: Experiment) -> list[str]:
    """Lines about what a reader could not guess: where the dropout rate and the image size are from, what GAP needs."""
    lines = []
    model, size = experiment.model, config.data.image_size
    dropout = getattr(model, "dropout_rate", None)
    if config.weights and dropout is not None:
        usual, source = dropout_of(config.weights)
        chosen = "" if dropout == usual else f"{dropout:g}, as the config says; the default for these weights is "
        lines.append(f"dropout   {chosen}{usual:g}: {source}")
    fields = experiment.model_fields
    usual_sizes = [each for each in PAGE_SIZES if each != size and fitting_size(each, fields) == size]
    if config.weights and usual_sizes:
        lines.append(
            f"size      {size} pixels instead of {usual_sizes[0]}, which is not divisible by the patch size "
            f"{model.pixels_per_token}"
        )
    if getattr(model, "pool", None) == "gap" and not config.weights:
        lines.append(f"pool      {_describe_gap(experiment.model_name, config.optimizer.learning_rate)}")
    return lines


def _describe_gap(model_name: str, rate: float) -> str:
    """Compares a learning rate for global average pooling with figure 9."""
    known = {row.learning_rate for row in TABLE_3 if model_name in row.models or row.models == ("*",)}
    if any(math.isclose(rate, gap_learning_rate(each)) for each in known):
        return f"gap, at 3/8 of table 3's learning rate for the class token: the proportion of figure 9, {_FIGURE_9}"
    whose = "table 3's for the class token" if rate in known else "which may have been chosen for a class token"
    return (
        f"gap, at the learning rate {rate:g}, {whose}. GAP needs a lower one to be as good (figure 9: {_FIGURE_9}); in "
        f"that proportion --config.optimizer.learning_rate={gap_learning_rate(rate):g}"
    )


def parameter_table(params: Any, *, decayed: Any = None) -> str:
    """Every parameter with its shape and size, and whether weight decay touches it.

    Args:
      params: arrays or shapes.
      decayed: a tree of bools, from `optimizers.decay_mask`; None: without that column.
    """
    rows: list[ParameterRow] = []
    decay_by_path = dict(jax.tree_util.tree_leaves_with_path(decayed))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        row = ParameterRow(name_of(path), str(tuple(leaf.shape)), str(np.dtype(leaf.dtype)), math.prod(leaf.shape))
        rows.append(row if decayed is None else DecayRow(**vars(row), decayed="yes" if decay_by_path[path] else "no"))
    total = count_parameters(params)
    head = count_parameters(params.get("head", {}))
    return "\n".join([parameter_overview.make_table(rows), f"total {total:,}; head left out {total - head:,}"])


def paper_count(model_name: str) -> str:
    """The paper's parameter count of a model, with what is known of it; "" where it gives none."""
    family = re.match(r"ViT-[BLH](?=/)", model_name)
    if not family:
        return ""
    text = f"the paper's table 1 says {TABLE_1[family[0]].millions}M for {family[0]}"
    if family[0] == "ViT-L":
        # Nor does it come to 307 with 1,000 or 21,843 classes: 304.3 and 325.7.
        return text + (
            ", which no reading of L/16 reaches (303.3M without head, 304.4M with pre-logits); L/32 with pre-logits "
            "has 306.6M"
        )
    return text + ", which counts the pre-logits layer and leaves the head out"


def schedule_table(config: ConfigDict, experiment: Experiment) -> str:
    """The learning rate, and what weight decay takes off a kernel in a step, along the run."""
    num_steps, fields = experiment.num_steps, config.optimizer
    warmup = fields.warmup_steps
    steps = {0, warmup // 2, warmup, num_steps - 1} | {
        warmup + (num_steps - warmup) * quarter // 4 for quarter in range(1, 4)
    }
    rates = {step: float(experiment.schedule(step)) for step in sorted(steps)}
    highest = max(rates.values()) or 1.0
    lines = [
        f"schedule: {fields.schedule}, warm-up {warmup:,} steps; weight decay {fields.weight_decay:g} x learning rate "
        "on kernels",
        f"{'step':>12}  {'learning rate':>13}  {'lr x decay':>10}",
    ]
    for step, rate in rates.items():
        bar = "#" * round(30 * rate / highest)
        lines.append(f"{step:>12,}  {rate:>13.3e}  {rate * fields.weight_decay:>10.3e}  {bar}")
    return "\n".join(lines)


def describe_decay(experiment: Experiment) -> str:
    """How many parameters weight decay touches."""
    params = experiment.step.abstract_state.params
    mask = jax.tree.leaves(decay_mask(params))
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(params)]
    decayed = sum(size for size, chosen in zip(sizes, mask, strict=True) if chosen)
    return (
        f"weight decay touches {sum(mask)} of {len(mask)} arrays (kernels), {decayed:,} of {sum(sizes):,} parameters; "
        "not biases, layer norms, class token and position embeddings"
    )


def dry_run(config: ConfigDict, experiment: Experiment) -> str:
    """All of the above, with the resolved config."""
    params = experiment.step.abstract_state.params
    paper = paper_count(experiment.model_name)
    report = experiment.transfer_report
    return "\n\n".join(
        [
            "# Resolved config\n" + str(config).strip(),
            *([f"# Weights\n{report}"] if report else []),
            "# Parameters\n" + parameter_table(params, decayed=decay_mask(params)) + (f"\n{paper}" if paper else ""),
            "# Weight decay\n" + describe_decay(experiment),
            "# Learning rate\n" + schedule_table(config, experiment),
            "# Sharding\n" + sharding.sharding_table(experiment.step.abstract_state),
            "# What would be trained\n" + describe_run(config, experiment),
        ]
    )


# Fields that an evaluation reads; those of few-shot classifiers and of ImageNet's variants where there are any.
_EVALUATION_FIELDS = (
    *("data.dataset", "data.eval_split", "data.eval_labels", "data.image_key", "data.label_key", "data.max_labels"),
    *("data.image_size", "data.eval_resize_small", "data.eval_resize", "data.num_threads", "data.max_bad_records"),
    *("model.dtype", "model.param_dtype", "loss", "eval_batch_size", "batch_size"),
    *("mesh.data", "mesh.model", "sharding", "sharding_rules"),
)


def evaluation_dry_run(config: ConfigDict, place: str, built: EvaluationOnly) -> str:
    """What `--mode=eval` would do: its fields, the parameters, the weights, the model, and what is measured.

    Args:
      config: see `vit_jax.config.base_config`.
      place: of the weights.
      built: from `evaluations.build_evaluation`.
    """
    entries = tuple(
        f"evals.{name}." for name, entry in config.evals.items() if entry.get("dataset") or entry.get("datasets")
    )
    fields = {
        name: value
        for name, value in flatten(config.to_dict()).items()
        if value is not None and (name in _EVALUATION_FIELDS or name.startswith(entries))
    }
    params = built.abstract_params
    return "\n\n".join(
        [
            "# Fields that count\n" + "\n".join(f"{name}: {value}" for name, value in sorted(fields.items())),
            "# Parameters\n" + parameter_table(params),
            "# What would be evaluated\n" + "\n".join(_describe_evaluation(config, place, built)),
        ]
    )


def _describe_evaluation(config: ConfigDict, place: str, built: EvaluationOnly) -> Iterator[str]:
    size = config.data.image_size
    attributes = {name: value for name, value in built.model_fields.items() if name not in ("name", "num_classes")}
    num_classes = built.model_fields["num_classes"]
    yield f"weights   {place}: {built.description}{'' if built.params else ', NOT HERE YET'}"
    yield (
        f"model     {built.model_fields['name']}, {num_classes:,} classes, "
        f"{count_parameters(built.abstract_params):,} parameters, images {size}x{size}"
    )
    yield f"          {', '.join(f'{name}={value}' for name, value in attributes.items())}"
    num_images = 0
    for each in built.evaluations:
        parts = [f"{len(source):,} images of {source.name} ({source.split})" for source in each.data.sources]
        num_images += len(each.data.test or ())
        yield f"measured  {each.name}: {each.describe()}; {', '.join(parts)}"
    for name, message in built.missing.items():
        yield f"measured  {name}: data NOT HERE YET. " + message.replace("\n", "\n          ")
    flops = forward_flops(built.model, size)
    images = f"; {num_images:,} images in all" if not (built.missing or config.evals.fewshot.datasets) else ""
    yield f"compute   {flops / 1e9:.4g} GFLOP an image forward (multiply-add = 2){images}"
    held = sharding.bytes_per_device(built.abstract_params) / 1e9
    batch = config.eval_batch_size or config.batch_size
    yield (
        f"devices   {_describe_mesh(built.mesh)}; batches of {batch:,} images; parameters {config.sharding}, "
        f"{held:.3g} GB on each"
    )
