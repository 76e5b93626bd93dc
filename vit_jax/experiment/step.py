"""The training step of a run, and its devices."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import sharding
from vit_jax.errors import UserError
from vit_jax.objectives import Objective
from vit_jax.train_step import TrainStep


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices, by default all of them, in a mesh.

    Raises:
      UserError: they do not fit the mesh, or do not divide the batches.
    """
    mesh = sharding.make_mesh(devices, data=config.mesh.data, model=config.mesh.model)
    sharding.check_batch_size(config.batch_size, mesh, config.accumulation_steps)
    sharding.check_batch_size(config.eval_batch_size or config.batch_size, mesh, field="eval_batch_size")
    return mesh


def make_step(
    config: ConfigDict,
    model: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
) -> TrainStep:
    """Makes the step from its parts and the remaining fields of the config.

    Raises:
      UserError: the model does not accept images of this size, sharding rules or `train_only` do not fit its
        parameters, or a compiler option is unknown.
    """
    step = TrainStep(
        model,
        optimizer,
        objective,
        image_size=config.data.image_size,
        schedule=schedule,
        mesh=mesh,
        sharding=config.sharding,
        sharding_rules=config.sharding_rules,
        accumulation_steps=config.accumulation_steps,
        rng=config.rng,
        polyak_decay=config.polyak_decay,
        train_only=config.train_only,
        compiler_options=_compiler_options(config.compiler_options, mesh),
    )
    step.abstract_state  # noqa: B018 (raises what is wrong before anything is computed)
    return step


def _compiler_options(pairs: Sequence[Any], mesh: Mesh) -> dict[str, Any]:
    try:
        options = {str(name): value for name, value in pairs}
    except (TypeError, ValueError) as error:
        raise UserError(f"compiler_options takes pairs of a name and a value, got {pairs!r}.") from error
    if options and mesh.devices.flat[0].client == jax.devices()[0].client:  # a plan's compiler checks its own
        try:
            jax.jit(lambda: 0, compiler_options=options).lower().compile()
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"compiler_options {options}: {error}") from error
    return options
