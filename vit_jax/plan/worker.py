"""Compiles one step for one topology in its own process, so that a crash costs one row of the table.

    python -m vit_jax.plan.worker request.json answer.json

`compiling.compile_step` writes the request: the config, the topology, the number of devices, the task. The answer is a
dictionary of numbers, or an error message.
"""

import collections
import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from vit_jax import sharding
from vit_jax.config import base_config
from vit_jax.costs.flops import forward_flops, train_step_flops
from vit_jax.errors import UserError
from vit_jax.experiment import build as experiments
from vit_jax.experiment.build import Experiment
from vit_jax.files import write_atomically
from vit_jax.models.layers import normalize_images
from vit_jax.optimizers import is_trained, merge_parameters
from vit_jax.plan import hlo

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_SIZE = r"([\d.]+)([KMGTP]?)i?B?"
_OUT_OF_MEMORY = (rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", rf"Used {_SIZE} of {_SIZE} hbm")  # new, old


def parse_out_of_memory(message: str) -> tuple[int, int] | None:
    """Reads the bytes per device that a program needs and has from a compiler message; None for other messages."""
    for pattern in _OUT_OF_MEMORY:
        if match := re.search(pattern, message):
            return round(float(match[1]) * _UNITS[match[2]]), round(float(match[3]) * _UNITS[match[4]])
    return None


def restore_config(fields: dict[str, Any]) -> ConfigDict:
    """Restores a config from its JSON, in which tuples have become lists."""

    def fill(config: ConfigDict, fields: dict[str, Any]) -> None:
        for name, value in fields.items():
            if isinstance(value, dict):
                fill(config[name], value)
            elif isinstance(value, list):
                config[name] = tuple(tuple(each) if isinstance(each, list) else each for each in value)
            else:
                with config.ignore_type():
                    config[name] = value

    config = base_config()
    fill(config, fields)
    return config


class CannotCompileError(Exception):
    """This version of libtpu, or of JAX, does not compile for a topology."""


# JAX's error about programs of a much newer libtpu, which it cannot read.
_UNREADABLE = "RET_CHECK failure (external/xla/xla/hlo/ir"


def topology_devices(name: str, options: dict[str, Any]) -> list[jax.Device]:
    """Describes the devices of absent TPU slices; raises `CannotCompileError` if libtpu does not know the topology."""
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise CannotCompileError(f"it does not know the topology: {error}") from error


def usable_memory(device: jax.Device) -> int | None:
    """Finds the bytes that a program may use on a TPU, by compiling one that cannot fit."""
    too_large = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda array: array * 2).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        parsed = parse_out_of_memory(str(error))
        return parsed[1] if parsed else None
    return None


def lower(experiment: Experiment, task: str) -> jax.stages.Lowered:
    """Lowers the step that trains, or the forward pass of the same model, from shapes only."""
    if task == "train":
        return experiment.step.lower(experiment.batch_shapes)

    def infer(params: Any, images: jax.Array) -> jax.Array:
        return experiment.model.apply({"params": params}, normalize_images(images), train=False)[0]

    params = sharding.with_sharding(experiment.step.abstract_state.params, sharding.replicated(experiment.mesh))
    infer = sharding.within(experiment.mesh, infer)
    outputs = sharding.batch_sharding(experiment.mesh)
    return jax.jit(infer, out_shardings=outputs).lower(params, experiment.batch_shapes["image"])


def facts(experiment: Experiment, task: str) -> dict[str, Any]:
    """Collects numbers that need no compilation."""
    step = experiment.step
    params, size = step.abstract_state.params, step.image_size
    flops = least = forward_flops(experiment.model, size)
    if task == "train":
        flops = experiment.train_flops
        # The paper's count, three times the forward pass, includes the gradient of the pixels, which is never computed.
        least = train_step_flops(experiment.model, size, is_trained(step.train_only))
    return {
        "num_steps": experiment.num_steps,
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "parameter_bytes": sharding.total_bytes(params),
        "gradient_bytes": sharding.total_bytes(step.trained(params)),
        "versions": versions(),
        "flops": flops * experiment.batch_size,
        "least_flops": least * experiment.batch_size,
    }


def versions() -> dict[str, str | None]:
    """Versions of JAX, and of libtpu if it is installed."""
    try:
        libtpu = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        libtpu = None
    return {"jax": jax.__version__, "libtpu": libtpu}


def compile_for_tpu(request: dict[str, Any], known_path: pathlib.Path) -> dict[str, Any]:
    """Compiles for a TPU topology and reads the program; first writes `facts` to `known_path`."""
    config = restore_config(request["config"])
    devices = topology_devices(request["topology"], request["topology_options"])[: request["num_devices"]]
    experiment = experiments.build(config, allow_missing_data=True, devices=devices)
    answer = {"usable": usable_memory(devices[0])} | facts(experiment, request["task"])
    write_atomically(known_path, json.dumps(answer))
    start = time.perf_counter()
    lowered = lower(experiment, request["task"])
    lowered_at = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if _UNREADABLE in message:
            raise CannotCompileError(f"JAX {jax.__version__} cannot read its program") from error
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        needed, usable = parse_out_of_memory(message) or (None, answer["usable"])
        return answer | {"status": "does not fit", "needed": needed, "usable": usable, "message": message}
    compiled_at = time.perf_counter()
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        raise CannotCompileError(f"JAX {jax.__version__} cannot read its program") from error
    memory, costs, program = compiled.memory_analysis(), compiled.cost_analysis() or {}, hlo.parse(text)
    if memory is None:
        raise RuntimeError("the compiler does not report the memory of the program")
    return answer | {
        "status": "fits",
        "lower_seconds": lowered_at - start,
        "compile_seconds": compiled_at - lowered_at,
        "cpu_seconds": time.process_time(),
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "compiler_flops": costs.get("flops"),
        "optimal_seconds": costs.get("optimal_seconds"),
        "program": dataclasses.asdict(program),
    }


def estimate_by_formula(request: dict[str, Any]) -> dict[str, Any]:
    """Estimates the memory of a step from shapes and shardings, for devices without a compiler here.

    Temporaries are the gradients and what the forward pass keeps for the backward pass, before a compiler fuses or
    frees anything.
    """
    config = restore_config(request["config"])
    devices = jax.devices("cpu")[: request["num_devices"]]
    experiment = experiments.build(config, allow_missing_data=True, devices=devices)
    step, mesh = experiment.step, experiment.mesh
    state, batch = step.abstract_state, experiment.batch_shapes
    model_axis, per_slice = mesh.shape[sharding.MODEL_AXIS], request["num_devices"] // request.get("num_slices", 1)
    if per_slice % model_axis:
        raise UserError(f"mesh.model {model_axis} does not divide the {per_slice} devices of a slice.")
    rows = experiment.batch_size // step.accumulation_steps // mesh.shape[sharding.DATA_AXIS]
    size = step.image_size

    def keep(params: Any, images: jax.Array) -> Any:
        def apply(trained: Any) -> jax.Array:
            variables, rngs = {"params": merge_parameters(params, trained)}, {"dropout": jax.random.key(0)}
            return experiment.model.apply(variables, normalize_images(images), train=True, rngs=rngs)[0]

        return jax.vjp(apply, step.trained(params))[1]

    kept = jax.tree.leaves(jax.eval_shape(keep, state.params, jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8)))
    # All but the parameters among them, and keys of random numbers.
    parameters = collections.Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state.params))
    arrays = [leaf for leaf in kept if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)]
    others = collections.Counter((leaf.shape, leaf.dtype) for leaf in arrays) - parameters
    temporaries = sum(math.prod(shape) * dtype.itemsize * count for (shape, dtype), count in others.items())
    return facts(experiment, "train") | {
        "status": "formula",
        "arguments": sharding.bytes_per_device(state) + sharding.bytes_per_device(batch),
        "temporaries": sharding.bytes_per_device(step.trained(state.params)) + temporaries,
    }


def end_with(parent: int, folder: pathlib.Path, seconds: float = 1.0) -> None:
    """Starts a thread that ends this process, and deletes its temporary folder, once its parent has died."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def main(request_path: str, answer_path: str) -> None:
    """Reads a request and writes the answer."""
    logging.disable(logging.WARNING)  # a plan may lack its data set
    request = json.loads(pathlib.Path(request_path).read_text())
    if "parent" in request:
        end_with(request["parent"], pathlib.Path(request_path).parent)
    try:
        if request["topology"] is None:
            answer = estimate_by_formula(request)
        else:
            answer = compile_for_tpu(request, pathlib.Path(answer_path).with_suffix(".known"))
    except UserError as error:
        answer = {"status": "refused", "message": str(error)}
    except CannotCompileError as error:
        answer = {"status": "not compiled", "message": f"libtpu {versions()['libtpu']} does not compile it: {error}"}
    except Exception as error:  # any error is a row of the table
        answer = {"status": "failed", "message": f"{type(error).__name__}: {error}"}
    write_atomically(pathlib.Path(answer_path), json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
