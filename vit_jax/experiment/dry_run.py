"""Prints what a run would do, for `--dry_run`: a summary, the recipe, and tables of parameters and learning rates."""

import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import sharding
from vit_jax.config import base_config, flatten
from vit_jax.console import format_table
from vit_jax.costs.flops import forward_flops
from vit_jax.data.transfer_tasks import gap_learning_rate
from vit_jax.experiment.build import Experiment
from vit_jax.experiment.evaluation_only import EvaluationOnly
from vit_jax.experiment.evaluations import Evaluation
from vit_jax.experiment.fine_tuning import PAGE_SIZES, dropout_of, fitting_size
from vit_jax.optimizers import decay_mask
from vit_jax.paper.tables import FIGURE_9, TABLE_1, TABLE_3
from vit_jax.sharding import name_of

_COLUMNS = 100
_LAYER = re.compile(r"(encoderblock_|\bunit)\d+")
_FIGURE_9 = f"{FIGURE_9['gap']:g} against {FIGURE_9['cls']:g}"


# ---- Training.


def dry_run(
    experiment: Experiment, evaluations: Sequence[Evaluation], missing: Mapping[str, str], *, full: bool = False
) -> str:
    """Returns the text of `--dry_run`: the summary first, in at most 100 columns.

    `missing` has the error messages of evaluations whose data are missing, by name. `full` adds all fields of the
    config, and lists each array and how it is sharded.
    """
    state, report = experiment.step.abstract_state, experiment.transfer_report
    summary = [describe_run(experiment), *_describe_evaluations(evaluations, missing)]
    decayed = decay_mask(state.params)
    parameters = [parameter_table(state.params, decayed, full=full), paper_count(experiment.model_name)]
    parameters.append(_describe_decay(state.params, decayed))
    parts = {
        "What would be trained": "\n".join(summary),
        "Recipe: fields that differ from the defaults": _recipe(experiment.config),
        "Learning rate": schedule_table(experiment),
        "Weights": str(report) if report else "",
        "Parameters": "\n".join(filter(None, parameters)),
    }
    if full:
        trees = {"all parameters": state.params, "optimizer state": state.opt_state, "Polyak average": state.average}
        rows = [
            (name, f"{sharding.total_bytes(tree):,}", f"{sharding.bytes_per_device(tree):,}")
            for name, tree in (trees | {"all": state}).items()
            if jax.tree.leaves(tree)
        ]
        parts["Sharding"] = format_table(("", "bytes", "a device"), rows, markdown=False)
        parts["All fields"] = _list_fields(flatten(experiment.config.to_dict()))
    return _join(parts, full=full)


def _join(parts: Mapping[str, str], *, full: bool) -> str:
    """Joins headings and parts; wraps long lines with an indent."""

    def wrap(line: str) -> str:
        if full or len(line) <= _COLUMNS:
            return line
        indent = " " * 10 if len(line) > 10 and line[9] == " " else "  "
        wrapped = textwrap.wrap(line, _COLUMNS, subsequent_indent=indent, break_on_hyphens=False)
        return "\n".join(wrapped)

    texts = ("\n".join(map(wrap, text.splitlines())) for text in parts.values())
    shown = [f"# {heading}\n{text}" for heading, text in zip(parts, texts, strict=True) if text]
    hint = [] if full else ["--dry_run=full lists all fields of the config and every array."]
    return "\n\n".join(shown + hint)


def describe_run(experiment: Experiment) -> str:
    """Describes a run in a few lines: model, data, length, cost, devices."""
    config, source, size = experiment.config, experiment.train_source, experiment.config.data.image_size
    images = experiment.num_steps * config.batch_size
    dataset = source.name if source is not None and config.data.mixture else config.data.dataset
    data = f"{dataset} ({config.data.train_split}): {experiment.num_train_images:,} images"
    data += " expected, not prepared yet" if source is None else ""
    layer_decay = "" if config.optimizer.layer_decay is None else f", layer decay {config.optimizer.layer_decay:g}"
    accumulation = f" in {config.accumulation_steps} parts" if config.accumulation_steps > 1 else ""
    params = experiment.step.abstract_state.params
    flops = forward_flops(experiment.model, size)
    lines = [_describe_model(experiment.model_fields, params, size)]
    if config.weights:
        report, trained = experiment.transfer_report, count_parameters(experiment.step.trained(params))
        new = ", ".join(report.initialised) or "nothing" if report else "not read yet"
        lines.append(f"weights   {config.weights}; new: {new}; trained: {trained:,} parameters")
    return "\n".join(
        [
            *lines,
            *describe_choices(experiment),
            f"data      {data}",
            f"training  {experiment.num_steps:,} steps of {config.batch_size:,} images{accumulation}, "
            f"{images / experiment.num_train_images:.4g} epochs; {config.optimizer.name}{layer_decay}, "
            f"{_describe_objective(config)}",
            f"compute   {flops / 1e9:.4g} GFLOP an image forward (multiply-add = 2), "
            f"{experiment.train_flops * images / 1e18:.4g} exaFLOP in all at {experiment.train_flops / flops:.3g} x "
            "forward",
            _describe_devices(experiment.mesh, config.sharding, experiment.step.abstract_state, "state"),
        ]
    )


def _describe_objective(config: ConfigDict) -> str:
    if config.objective == "masked_patches":
        fields = config.masked_patches
        return f"masked patches, target {fields.target}, {100 * fields.corruption_rate:.4g} % corrupted"
    return f"{config.loss} cross-entropy"


def describe_choices(experiment: Experiment) -> list[str]:
    """Explains choices that are not obvious: the dropout rate, the image size, GAP's learning rate."""
    lines = []
    config, model, size = experiment.config, experiment.model, experiment.config.data.image_size
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


def schedule_table(experiment: Experiment) -> str:
    """Tabulates the learning rate, and the share of a kernel that weight decay removes per step, over the run."""
    num_steps, fields = experiment.num_steps, experiment.config.optimizer
    warmup = fields.warmup_steps
    quarters = (warmup + (num_steps - warmup) * quarter // 4 for quarter in range(1, 4))
    rates = {
        step: float(experiment.schedule(step)) for step in sorted({0, warmup // 2, warmup, *quarters, num_steps - 1})
    }
    highest = max(rates.values()) or 1.0
    rows = [
        (f"{step:,}", f"{rate:.3e}", f"{rate * fields.weight_decay:.3e}", "#" * round(30 * rate / highest))
        for step, rate in rates.items()
    ]
    table = format_table(("step", "learning rate", "x weight decay", ""), rows, markdown=False)
    return f"{fields.schedule}, warm-up {warmup:,} steps; weight decay {fields.weight_decay:g} on kernels\n{table}"


# ---- Evaluation alone.

# Fields that an evaluation reads, beside those of the entries of `evals` that are switched on.
_EVALUATION_FIELDS = (
    *("data.dataset", "data.eval_split", "data.eval_labels", "data.image_key", "data.label_key", "data.max_labels"),
    *("data.image_size", "data.eval_resize_small", "data.eval_resize", "data.num_threads", "data.max_bad_records"),
    *("model.dtype", "model.param_dtype", "loss", "eval_batch_size", "batch_size"),
    *("mesh.data", "mesh.model", "sharding", "sharding_rules"),
)


def evaluation_dry_run(config: ConfigDict, weights_path: str, built: EvaluationOnly, *, full: bool = False) -> str:
    """Returns the text of `--mode=eval --dry_run`; `full` lists each array."""
    entries = tuple(
        f"evals.{name}."
        for name, entry in config.evals.items()
        if any(entry.get(field) for field in ("dataset", "datasets", "split"))
    )
    fields = {
        name: value
        for name, value in flatten(config.to_dict()).items()
        if value is not None and (name in _EVALUATION_FIELDS or name.startswith(entries))
    }
    return _join(
        {
            "What would be evaluated": "\n".join(_describe_evaluation(config, weights_path, built)),
            "Fields that count": _list_fields(fields),
            "Parameters": parameter_table(built.abstract_params, full=full),
        },
        full=full,
    )


def _describe_evaluation(config: ConfigDict, weights_path: str, built: EvaluationOnly) -> Iterator[str]:
    size, fields = config.data.image_size, built.model_fields
    yield f"weights   {weights_path}: {built.description}{'' if built.params else ', not downloaded yet'}"
    yield _describe_model(fields, built.abstract_params, size)
    attributes = {name: value for name, value in fields.items() if name not in ("name", "num_classes")}
    yield f"with      {', '.join(f'{name}={value}' for name, value in attributes.items())}"
    yield from _describe_evaluations(built.evaluations, built.missing)
    num_images = sum(len(each.data.test or ()) for each in built.evaluations)
    is_whole = not built.missing and all(each.data.pool is None for each in built.evaluations)
    images = f"; {num_images:,} images in all" if is_whole else ""
    yield f"compute   {forward_flops(built.model, size) / 1e9:.4g} GFLOP an image forward (multiply-add = 2){images}"
    yield f"batches   {config.eval_batch_size or config.batch_size:,} images"
    yield _describe_devices(built.mesh, config.sharding, built.abstract_params, "parameters")


# ---- Parts of both.


def _describe_model(fields: Mapping[str, Any], params: Any, size: int) -> str:
    return (
        f"model     {fields['name']}, {fields['num_classes']:,} classes, {count_parameters(params):,} parameters, "
        f"images {size}x{size}"
    )


def _describe_evaluations(evaluations: Iterable[Evaluation], missing: Mapping[str, str]) -> Iterator[str]:
    for each in evaluations:
        images = [f"{len(source):,} images of {source.name} ({source.split})" for source in each.data.sources]
        cadence = f"; every {each.every_steps:,} steps" if each.every_steps else ""
        yield f"measured  {'; '.join([f'{each.name}: {each.describe()}', ', '.join(images)])}{cadence}"
    for name, message in missing.items():
        yield f"measured  {name}: data not prepared yet. " + message.replace("\n", "\n          ")


def _describe_devices(mesh: Mesh, preset: str, state: Any, what: str) -> str:
    devices = sharding.describe_devices(mesh)
    axes = " x ".join(f"{name} {size}" for name, size in devices["mesh"].items())
    slices = f" on {devices['num_slices']} slices" if devices["num_slices"] > 1 else ""
    return (
        f"devices   {devices['num_devices']} x {devices['device_kind']} in {devices['num_processes']} process(es)"
        f"{slices}, mesh {axes}; {what} {preset}, {sharding.bytes_per_device(state) / 1e9:.3g} GB on each"
    )


def _list_fields(fields: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {value!r}" for name, value in sorted(fields.items()))


def _recipe(config: ConfigDict) -> str:
    """Lists the fields that differ from the defaults, a paragraph for each group."""
    defaults = flatten(base_config().to_dict())
    groups: dict[str, list[str]] = {}
    for name, value in flatten(config.to_dict()).items():
        if name != "data.how_to_prepare" and (name not in defaults or value != defaults[name]):
            group, _, field = name.partition(".") if "." in name else ("run", "", name)
            groups.setdefault(group, []).append(f"{field}={value!r}")
    return "\n".join(f"{group:<9} {', '.join(texts)}" for group, texts in sorted(groups.items()))


def count_parameters(params: Any) -> int:
    """Number of values in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def parameter_table(params: Any, decayed: Any = None, *, full: bool = False) -> str:
    """The parameters with their shapes and sizes; equal layers are one row.

    Args:
      params: arrays or shapes.
      decayed: a tree of bools, from `optimizers.decay_mask`; None: without that column.
      full: lists each array, with the mesh axis that splits each of its axes and its bytes on a device.
    """
    headings = ["array", "number", "shape", "parameters", *(["split over", "a device"] if full else [])]
    headings += [] if decayed is None else ["decays"]
    by_path = dict(jax.tree_util.tree_leaves_with_path(decayed))
    groups: dict[tuple[str, ...], list[Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = name_of(path) if full else _LAYER.sub(r"\1*", name_of(path))
        decays = [] if decayed is None else ["yes" if by_path[path] else "no"]
        groups.setdefault((name, "x".join(map(str, leaf.shape)) or "scalar", *decays), []).append(leaf)
    rows, layer = [], ""
    for (name, shape, *decays), leaves in groups.items():
        above = name[: name.rindex("*") + 1] if "*" in name else ""
        if above and above != layer:
            rows.append([above] + [""] * (len(headings) - 1))
        layer = above
        shown = f"  {name.removeprefix(above + '/')}" if above else name
        split = [_describe_split(leaves[0]), f"{sharding.bytes_per_device(leaves):,}"] if full else []
        rows.append([shown, f"{len(leaves)}", shape, f"{count_parameters(leaves):,}", *split, *decays])
    dtypes = ", ".join(sorted({str(np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(params)}))
    total, head = count_parameters(params), count_parameters(params.get("head", {}))
    table = format_table(headings, rows, num_left=1, markdown=False)
    return f"{table}\ntotal {total:,}; head left out {total - head:,}; {dtypes}"


def _describe_split(leaf: Any) -> str:
    axes = [", ".join(axis) if isinstance(axis, tuple) else axis or "-" for axis in leaf.sharding.spec]
    return " ".join(axes + ["-"] * (leaf.ndim - len(axes))) if any(leaf.sharding.spec) else "whole"


def _describe_decay(params: Any, decayed: Any) -> str:
    mask = jax.tree.leaves(decayed)
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(params)]
    chosen = sum(size for size, decays in zip(sizes, mask, strict=True) if decays)
    return (
        f"weight decay touches {sum(mask)} of {len(mask)} arrays (kernels), {chosen:,} of {sum(sizes):,} parameters; "
        "not biases, layer norms, class token and position embeddings"
    )


def paper_count(model_name: str) -> str:
    """The paper's parameter count of a model, with an explanation; "" if it gives none."""
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
