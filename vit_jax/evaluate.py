"""Evaluates parameters in any format, without training, with all evaluations of a config."""

import datetime
import json
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_jax import sharding
from vit_jax.console import format_table, wrap_parts
from vit_jax.errors import UserError
from vit_jax.experiment import leakage
from vit_jax.experiment.evaluation_only import build_evaluation
from vit_jax.experiment.evaluations import describe_data, tested_sources
from vit_jax.files import AnyPath, parse_path, write_atomically
from vit_jax.json_files import read_optional
from vit_jax.multihost import processes
from vit_jax.train_step import TrainState

logger = logging.getLogger(__name__)


def evaluate(
    config: ConfigDict, path: AnyPath | str | None = None, *, allow_data_change: bool = False
) -> dict[str, Any]:
    """Evaluates the run in a workdir, if there is one, or else `config.weights`.

    With several processes (`processes.initialize`), all must call it with the same arguments.

    Args:
      config: see `vit_jax.config.base_config`; only the fields of model, data and evaluations count.
      path: a workdir, for `evaluation.json`; None: write nothing.
      allow_data_change: evaluate on the current data even if they have changed since training.

    Returns:
      "weights", "model", "model_fields" (as in a run's model.json), "image_size", "parameters", "time", "devices",
      "metrics" by name, and by evaluation "overlap", the known number of its examples that were trained on (see
      `leakage`), and "fingerprints" of the examples.

    Raises:
      UserError: something the user can fix.
    """
    path = None if path is None else parse_path(path)
    weights = weights_to_evaluate(config.weights, path)
    built = build_evaluation(config, weights, allow_data_change=allow_data_change)
    processes.check_same("data", describe_data(None, built.evaluations))
    logger.info("%s: %s", weights, built.description)
    tested = tested_sources(built.evaluations)
    overlap = leakage.find_overlap(tested, weights)
    params = sharding.place(built.params, built.abstract_params)
    state = TrainState(step=jnp.int32(0), params=params, opt_state=(), rng=jnp.zeros(2, jnp.uint32))
    metrics: dict[str, float] = {}
    for each in built.evaluations:
        found = {f"{each.name}/{name}": value for name, value in each.run(state).items()}
        logger.info("%s", wrap_parts([f"{name} {value:.5g}" for name, value in found.items()]))
        metrics |= found
    result = {
        "weights": weights,
        "model": built.model_fields["name"],
        "model_fields": built.model_fields,
        "image_size": config.data.image_size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "devices": sharding.describe_devices(built.mesh),
        "metrics": metrics,
        "overlap": overlap,
        "fingerprints": {name: source.fingerprint() for name, source in tested.items()},
    }
    if path is not None and processes.is_main_process():
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "evaluation.json", json.dumps(result | {"config": json.loads(config.to_json())}) + "\n")
    return result


def weights_to_evaluate(weights: str | None, path: AnyPath | None) -> str:
    """Returns the weights to evaluate: the run in a workdir, or else `config.weights`.

    The command that trained a run may also evaluate it; `config.weights` are then the run's initial weights.
    """
    if path is None or not (path / "starts.jsonl").is_file():
        if not weights and not path:
            raise UserError("nothing to evaluate: set --config.weights to a checkpoint, or --workdir to that of a run.")
        return weights or str(path)
    began_with = read_optional(path / "config.json").get("weights")
    if weights is not None and weights != began_with and weights.rstrip("/") != str(path):
        raise UserError(
            f"{path} is the workdir of a run, but weights are {weights}. Pass --config.weights=None to evaluate the "
            "run, or another --workdir to evaluate these weights."
        )
    return str(path)


def format_metrics(metrics: dict[str, float]) -> str:
    """Formats metrics as a markdown table that also reads well in a terminal."""

    def show(name: str, value: float) -> str:
        if name.endswith("examples"):
            return f"{value:,.0f}"
        if name.endswith("_l2") or not math.isfinite(value):
            return f"{value:g}"
        return f"{value:.4f}" if "loss" in name else f"{100 * value:.2f} %"

    return format_table(["", ""], [(name, show(name, value)) for name, value in metrics.items()], num_left=1)
