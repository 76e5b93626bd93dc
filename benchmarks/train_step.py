r"""How fast models compute and train: images/s, compile time, memory, and the share of the device's matrix rate.

    # Two cores of a laptop, a minute
    python benchmarks/train_step.py --models ViT-Ti/16 --batch=8

    # One GPU, each at the batch that suits it best, beside timm if torch and timm are installed
    python benchmarks/train_step.py --models ViT-S/16 ViT-B/16 ViT-L/16 R50x1 --dtype=bfloat16 --batch=auto \
        --torch_compile --json=a100.json

    # What do options of the model cost? Each --variant is measured beside the model as it is
    python benchmarks/train_step.py --models ViT-L/16@64 --dtype=bfloat16 --what=train --timm=never \
        --variant=scan:scan_layers=true --variant=scan-remat:scan_layers=true,remat=dots

It needs jax, flax and optax alone. "forward" classifies a batch; "train" is `vit_jax.train_step.TrainStep` with
its optimizer: forward, backward, clipping, update, on a donated state. Images are uint8, lie on the device already and
are normalised there. All candidates of a model take turns in one process, so that a machine whose speed drifts treats
them alike; reported are medians over the rounds.

Utilisation is the share of the fastest matrix product that was measured in the same run in the same dtype and
precision. It counts what the model needs: a train step is three forward passes, whatever rematerialisation adds.
Memory is the device's, of the step with its arguments: of vit_jax as the compiler planned it, of timm on a GPU as
PyTorch's allocator saw it at its highest; "-" where nobody knows. Compile times are without any cache of compiled
programs.

timm runs what it is best at: fused optimizer, scaled-dot-product attention, automatic mixed precision for bfloat16
(the parameters are float32 in both), channels-last convolutions on a GPU; with --torch_compile also compiled. Where
the CUDA libraries of jax and torch do not bear each other, measure them apart, with --timm=never and --timm=only.
"""

import argparse
import contextlib
import dataclasses
import enum
import functools
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# So that it runs from a clone that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.console import num_cpus
from vit_jax.errors import UserError, unknown_name
from vit_jax.models import create_model
from vit_jax.models.layers import normalize_images
from vit_jax.objectives.classification import Classification
from vit_jax.optimizers import make_optimizer, make_schedule
from vit_jax.sharding import batch_sharding, check_batch_size, make_mesh, replicated
from vit_jax.train_step import TrainStep

LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
MOMENTUM = 0.9

TURN_SECONDS = 1.0  # what --steps=auto fills
MIN_STEPS = 3
GAIN = 1.03  # --batch=auto goes on while the speed grows by as much
MATMUL_SIZES = (1024, 2048, 4096, 8192, 16384)
MATMUL_SECONDS = 2.0  # the longest that one matrix product may take

# A pool's threads wait for more work actively for a while (GNU OpenMP's about 10 ms, Intel's 0.2 s) and would do so
# in the turn of the next. After this pause they sleep.
PAUSE_SECONDS = 0.3

# Attributes of our models that change how, and not what, they compute: nothing for timm to follow.
HOW = {"scan_layers", "remat", "attention", "param_dtype"}

TIMM_SIZES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}
TIMM_HYBRIDS = {
    "R+Ti/16": "vit_tiny_r_s16_p8_224",
    "R26+S/32": "vit_small_r26_s32_224",
    "R50+B/16": "vit_base_r50_s16_224",
    "R50+L/32": "vit_large_r50_s32_224",
}
BIT_LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all candidates have in common.

    Attributes:
      image_size: side of the square images, in pixels.
      dtype: "float32" or "bfloat16": of the computation; parameters are float32.
      precision: of float32 products: "highest", "tf32" or "default".
      num_classes: width of the head.
      optimizer: "adamw" or "sgd".
      accumulation: parts of the batch of a train step.
      devices: number of devices.
      steps: train steps or forward passes of a turn; None: as many as fill a second.
      timm_alone: whether nothing of ours is measured, so that timm may use a GPU that JAX does not know.
    """

    image_size: int
    dtype: str
    precision: str
    num_classes: int
    optimizer: str
    accumulation: int
    devices: int
    steps: int | None
    timm_alone: bool = False


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to measure.

    Attributes:
      name: as `create_model` takes it.
      batch: images of a step; None: to be found.
    """

    name: str
    batch: int | None


@dataclasses.dataclass
class Row:
    """One line of the result: a candidate at one task. None is what is not known.

    Attributes:
      model: name of the model.
      variant: "vit_jax", "vit_jax <variant>", "timm" or "timm compiled".
      what: "forward" or "train".
      dtype: of the computation.
      batch: images of a step.
      overrides: attributes of the model that were set.
      timm_name: the name of timm's model.
      parameters: number of the model's parameters.
      images_per_second: median over the rounds; with the slowest and the fastest round beside it.
      images_per_second_min: see there.
      images_per_second_max: see there.
      ms_per_step: milliseconds a step, at the median.
      steps: of a round.
      round_seconds: seconds a step, round by round.
      compile_seconds: tracing and compilation; of torch.compile the first step, with its backward pass if it has one.
      memory_bytes: see the module's docstring.
      device_peak_bytes: the highest use that the device itself reported, other candidates' memory taken off; only known
        if it was the highest of the process.
      flops_per_image: of this task; a multiplication and an addition are two.
      flops_source: who counted them.
      flops_per_second: on all devices.
      utilisation: of the matrix product's rate.
      ratio_to_timm: images_per_second over that of timm's faster candidate.
      loss: of the last train step, which shows that it trained.
      note: what a reader should know.
      error: why there are no numbers.
    """

    model: str
    variant: str
    what: str
    dtype: str
    batch: int | None = None
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    timm_name: str | None = None
    parameters: int | None = None
    images_per_second: float | None = None
    images_per_second_min: float | None = None
    images_per_second_max: float | None = None
    ms_per_step: float | None = None
    steps: int | None = None
    round_seconds: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: float | None = None
    memory_bytes: int | None = None
    device_peak_bytes: int | None = None
    flops_per_image: float | None = None
    flops_source: str | None = None
    flops_per_second: float | None = None
    utilisation: float | None = None
    ratio_to_timm: float | None = None
    loss: float | None = None
    note: str | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is known of a candidate once it is ready to take its turns; see `Row`."""

    parameters: int
    compile_seconds: float | None
    memory_bytes: int | None
    device_peak_bytes: int | None = None


class OurCandidate:
    """A model of vit_jax.

    Attributes:
      variant: its name in the tables.
      overrides: attributes of the model.
      timm_name: None.
    """

    timm_name = None

    def __init__(self, model: str, variant: str, overrides: dict[str, Any], settings: Settings):
        self.variant = variant
        self.overrides = overrides
        self._settings = settings
        self._model = create_model(model, num_classes=settings.num_classes, dtype=settings.dtype, **overrides)
        self._state: Any = None
        self._metrics: Any = None
        self._take_step: Callable[[], None] = lambda: None

    def prepare(self, what: str, batch: int) -> Prepared:
        """Compiles a task and takes its first steps."""
        settings = self._settings
        mesh = make_mesh(jax.devices()[: settings.devices])
        check_batch_size(batch, mesh, settings.accumulation if what == "train" else 1, "--batch")
        self._metrics, self._take_step = None, lambda: None
        stats_before = device_stats()

        schedule = make_schedule("constant", learning_rate=LEARNING_RATE, num_steps=1)
        optimizer = make_optimizer(
            settings.optimizer, schedule, weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM, momentum=MOMENTUM
        )
        step = TrainStep(
            self._model,
            optimizer,
            Classification(),
            image_size=settings.image_size,
            schedule=schedule,
            mesh=mesh,
            accumulation_steps=settings.accumulation,
        )
        # A step that ran out of memory has taken the state with it.
        if self._state is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state)):
            self._state = None
            self._state = step.init(seed=0)
        examples = jax.device_put(random_examples(batch, settings), batch_sharding(mesh))

        # The state is still being made in the background, and would slow the compiler.
        jax.block_until_ready((self._state, examples))
        start = time.perf_counter()
        if what == "train":
            compiled: Any = step.lower(examples).compile()

            def take_step() -> None:
                self._state, self._metrics = compiled(self._state, examples)
        else:

            def forward(params: Any, images: jax.Array) -> jax.Array:
                return self._model.apply({"params": params}, normalize_images(images), train=False)[0]

            jitted = jax.jit(
                forward, in_shardings=(replicated(mesh), batch_sharding(mesh)), out_shardings=batch_sharding(mesh)
            )
            compiled = jitted.lower(self._state.params, examples["image"]).compile()

            def take_step() -> None:
                self._metrics = compiled(self._state.params, examples["image"])

        compile_seconds = time.perf_counter() - start
        self._take_step = take_step
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self._state.params))
        self.seconds(1)

        stats, peak = device_stats(), None
        if stats and stats_before and stats["peak_bytes_in_use"] > stats_before["peak_bytes_in_use"]:
            peak = stats["peak_bytes_in_use"] - stats_before["bytes_in_use"]
        return Prepared(parameters, compile_seconds, planned_bytes(compiled), peak)

    def seconds(self, steps: int) -> float:
        """Seconds a step over some steps, after one that is not counted."""
        self._take_step()
        jax.block_until_ready((self._state, self._metrics))
        start = time.perf_counter()
        for _ in range(steps):
            self._take_step()
        jax.block_until_ready((self._state, self._metrics))
        return (time.perf_counter() - start) / steps

    def loss(self) -> float | None:
        """The last train step's loss; None after a forward pass."""
        return float(self._metrics["loss"]) if isinstance(self._metrics, dict) else None


class TimmCandidate:
    """timm's model, in PyTorch.

    Attributes:
      variant: its name in the tables.
      overrides: attributes of our model that timm's follows.
      timm_name: its name in timm.
    """

    def __init__(
        self, model: str, variant: str, overrides: dict[str, Any], settings: Settings, compile_mode: str | None
    ):
        self.variant = variant
        self.overrides = overrides
        self._settings = settings
        self._torch, self._timm = import_torch_and_timm()
        self._device = torch_device(self._torch, settings)
        self.timm_name, self._arguments = timm_model(model, overrides, settings, self._timm.list_models())
        self._compile_mode = compile_mode
        self._convolutional = not model.startswith("ViT-")
        self._model: Any = None
        self._run: Any = None
        self._optimizer: Any = None
        self._loss: Any = None
        self._take_step: Callable[[], None] = lambda: None

    def prepare(self, what: str, batch: int) -> Prepared:
        """Makes the model if need be and takes the first steps of a task."""
        torch, settings, cuda = self._torch, self._settings, self._device == "cuda"
        self._loss, self._take_step = None, lambda: None
        if batch % settings.accumulation:
            raise UserError(f"--batch {batch} is not divisible by --accumulation {settings.accumulation}.")
        if self._optimizer:
            self._optimizer.zero_grad(set_to_none=True)
        if self._compile_mode:
            # After some batch sizes torch would stop compiling for another.
            torch.compiler.reset()
        bytes_before = 0
        if cuda:
            gc.collect()
            # What was cached for another batch size must not count, nor be in the way.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            bytes_before = torch.cuda.memory_allocated() - self._own_bytes()
        if self._model is None:
            self._build()

        examples = random_examples(batch, settings)
        memory_format = torch.channels_last if self._channels_last() else torch.contiguous_format
        images = torch.from_numpy(examples["image"]).permute(0, 3, 1, 2).to(self._device)
        images = images.contiguous(memory_format=memory_format)
        labels = torch.from_numpy(examples["label"]).long().to(self._device)
        self._model.train(what == "train")
        mixed = functools.partial(
            torch.autocast, self._device, dtype=torch.bfloat16, enabled=settings.dtype == "bfloat16"
        )
        mark_step = torch.compiler.cudagraph_mark_step_begin if self._compile_mode else lambda: None

        def normalize(images: Any) -> Any:
            return images.float().div_(127.5).sub_(1.0)

        def train_step() -> None:
            for part in range(settings.accumulation):
                mark_step()
                with mixed():
                    logits = self._run(normalize(images[part :: settings.accumulation]))
                    loss = torch.nn.functional.cross_entropy(logits, labels[part :: settings.accumulation])
                (loss / settings.accumulation).backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_NORM)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._loss = loss.detach()

        @torch.inference_mode()
        def forward() -> None:
            mark_step()
            with mixed():
                self._run(normalize(images))

        self._take_step = train_step if what == "train" else forward
        start = time.perf_counter()
        self._take_step()
        self._synchronize()
        first_seconds = time.perf_counter() - start
        self.seconds(1)
        memory_bytes = torch.cuda.max_memory_allocated() - bytes_before if cuda else None
        parameters = sum(parameter.numel() for parameter in self._model.parameters())
        return Prepared(parameters, first_seconds if self._compile_mode else None, memory_bytes)

    def seconds(self, steps: int) -> float:
        """Seconds a step over some steps, after one that is not counted."""
        self._take_step()
        self._synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self._take_step()
        self._synchronize()
        return (time.perf_counter() - start) / steps

    def loss(self) -> float | None:
        """The last train step's loss; None after a forward pass."""
        return None if self._loss is None else float(self._loss)

    def _make_model(self) -> Any:
        if self.timm_name in self._timm.list_models():
            return self._timm.create_model(self.timm_name, **self._arguments)
        # A BiT of a width or depth that timm has not named.
        convolution = functools.partial(self._timm.layers.StdConv2d, eps=1e-8)
        return self._timm.models.resnetv2.ResNetV2(stem_type="fixed", conv_layer=convolution, **self._arguments)

    def _build(self) -> None:
        torch = self._torch
        with torch.device(self._device):
            model = self._make_model()
        if self._channels_last():
            model = model.to(memory_format=torch.channels_last)
        kernels = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        groups = [{"params": kernels, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        if self._settings.optimizer == "adamw":
            self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
        else:
            self._optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)
        # One program for each batch size, as ours; "automatic dynamic" would make a slower one at the second size.
        self._run = torch.compile(model, mode=self._compile_mode, dynamic=False) if self._compile_mode else model
        self._model = model

    def _channels_last(self) -> bool:
        return self._convolutional and self._device == "cuda"

    def _own_bytes(self) -> int:
        if self._model is None:
            return 0
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        tensors = [*self._model.parameters(), *self._model.buffers(), *filter(self._torch.is_tensor, states)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_cuda)

    def _synchronize(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()


Candidate = OurCandidate | TimmCandidate


def timm_model(
    name: str, overrides: dict[str, Any], settings: Settings, known: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """The name of a model in timm and the arguments that make it the same as ours.

    Args:
      name: ours.
      overrides: attributes of our model that were set.
      settings: what it is to compute.
      known: names of timm's models.

    Raises:
      UserError: timm has no such model, or none with these attributes.
    """
    arguments: dict[str, Any] = {"num_classes": settings.num_classes}
    overrides = {key: value for key, value in overrides.items() if key not in HOW}

    bit = re.fullmatch(r"R(\d+)x(\d+)", name)
    if bit and int(bit[1]) in BIT_LAYERS:
        if overrides:
            raise UserError(f"timm's {name} does not follow {', '.join(overrides)}; put it into a --variant.")
        timm_name = f"resnetv2_{bit[1]}x{bit[2]}_bit"
        if timm_name not in known:
            arguments |= {"layers": BIT_LAYERS[int(bit[1])], "width_factor": int(bit[2])}
        return timm_name, arguments

    # As in our models, the approximation of GELU by tanh.
    arguments |= {"img_size": settings.image_size, "act_layer": "gelu_tanh"}
    vit = re.fullmatch(r"ViT-(\w+)/(\d+)", name)
    if name.replace("ViT-", "") in TIMM_HYBRIDS:
        timm_name = TIMM_HYBRIDS[name.replace("ViT-", "")]
    elif vit and vit[1] in TIMM_SIZES:
        timm_name = f"vit_{TIMM_SIZES[vit[1]]}_patch{vit[2]}_224"
        if timm_name not in known:
            timm_name = f"vit_{TIMM_SIZES[vit[1]]}_patch{14 if vit[1] == 'H' else 16}_224"
            arguments["patch_size"] = int(vit[2])
    else:
        raise UserError(f"timm has no counterpart of {name!r}.")

    return timm_name, arguments | timm_arguments(name, overrides)


def timm_arguments(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """What a timm ViT is to be told of the attributes of ours that were set; see `timm_model`."""
    arguments: dict[str, Any] = {}
    same: dict[str, tuple[str, ...]] = {
        "num_layers": ("depth",),
        "hidden_dim": ("embed_dim",),
        "mlp_dim": (),  # below, with the width
        "num_heads": ("num_heads",),
        "dropout_rate": ("pos_drop_rate", "proj_drop_rate"),
        "attention_dropout_rate": ("attn_drop_rate",),
        "stochastic_depth_rate": ("drop_path_rate",),
    }
    values: dict[tuple[str, Any], dict[str, Any]] = {
        ("pool", "cls"): {},
        ("pool", "gap"): {"global_pool": "avg", "class_token": False, "fc_norm": False},
        ("gelu", "tanh"): {},
        ("gelu", "exact"): {"act_layer": "gelu"},
    }
    for key, value in overrides.items():
        if key in same:
            arguments |= dict.fromkeys(same[key], value)
        elif (key, value) in values:
            arguments |= values[key, value]
        else:
            raise UserError(f"timm's {name} does not follow {key}={value}; put it into a --variant.")
    if "mlp_dim" in overrides or "hidden_dim" in overrides:
        if not {"mlp_dim", "hidden_dim"} <= set(overrides):
            raise UserError("timm follows mlp_dim and hidden_dim only together: --set hidden_dim=... mlp_dim=...")
        arguments["mlp_ratio"] = overrides["mlp_dim"] / overrides["hidden_dim"]
    return arguments


@functools.cache
def import_torch_and_timm() -> tuple[Any, Any]:
    """Imports torch and timm, which works without torchvision too: timm's models import it but do not use it.

    Raises:
      UserError: one of them is broken.
    """
    # A cache of compiled programs would make a second run's compile time look like a miracle.
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    try:
        import torch

        stubs = [] if importlib.util.find_spec("torchvision") else stub_torchvision()
        import timm
    except ImportError as error:
        raise UserError(f"torch or timm does not import ({error}); choose --timm=never.") from error

    # torch.compile looks around in sys.modules and would take the stubs for the real thing.
    for name in stubs:
        del sys.modules[name]
    torch.set_num_threads(num_cpus())
    torch.backends.cudnn.benchmark = True
    return torch, timm


def stub_torchvision() -> list[str]:
    """Puts modules with the members that timm's imports look up into `sys.modules`; returns their names."""

    class Stub(types.ModuleType):
        __path__: list[str] = []  # noqa: RUF012 - as the import system has it

        def __getattr__(self, name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    submodules = "datasets models models.feature_extraction ops ops.misc transforms transforms.functional utils"
    names = ["torchvision", *(f"torchvision.{name}" for name in submodules.split())]
    for name in names:
        sys.modules[name] = Stub(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    vars(sys.modules["torchvision.transforms.functional"])["InterpolationMode"] = enum.Enum(
        "InterpolationMode", "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS"
    )
    return names


def has_torch_and_timm() -> bool:
    """Whether both are installed; imports neither."""
    return all(importlib.util.find_spec(name) for name in ("torch", "timm"))


def torch_device(torch: Any, settings: Settings) -> str:
    """The device that timm computes on: the one that JAX computes on, as torch calls it.

    Raises:
      UserError: torch cannot compute there.
    """
    platform = jax.default_backend()
    if platform == "cpu":
        gpu = settings.timm_alone and os.environ.get("JAX_PLATFORMS") != "cpu" and torch.cuda.is_available()
        return "cuda" if gpu else "cpu"
    if platform != "gpu" or not torch.cuda.is_available():
        raise UserError(f"torch has no access to what JAX computes on ({platform}); choose --timm=never.")
    return "cuda"


def set_precision(settings: Settings, *, with_torch: bool) -> None:
    """Sets how both frameworks compute products of float32, which their defaults do differently."""
    names = {"highest": ("highest", "highest"), "tf32": ("tensorfloat32", "high"), "default": (None, None)}
    for_jax, for_torch = names[settings.precision]
    if for_jax:
        jax.config.update("jax_default_matmul_precision", for_jax)
    if with_torch and for_torch:
        torch, _ = import_torch_and_timm()
        torch.set_float32_matmul_precision(for_torch)
        torch.backends.cudnn.allow_tf32 = settings.precision != "highest"


def random_examples(batch: int, settings: Settings) -> dict[str, np.ndarray]:
    """A batch of noise: `image` uint8 `[batch, image_size, image_size, 3]` and `label` int32 `[batch]`."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (batch, settings.image_size, settings.image_size, 3), dtype=np.uint8),
        "label": rng.integers(0, max(settings.num_classes, 1), batch, dtype=np.int32),
    }


def abstract_variables(model: nn.Module, image_size: int) -> Any:
    """Shapes of a model's variables."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)


def device_stats() -> dict[str, int] | None:
    """What the first device says of its memory; None on CPU."""
    stats = jax.devices()[0].memory_stats()
    return stats if stats and {"peak_bytes_in_use", "bytes_in_use"} <= set(stats) else None


def planned_bytes(compiled: Any) -> int | None:
    """Memory of a compiled program on a device: arguments, results that are not donated arguments, and temporaries."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    arguments_and_results = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return arguments_and_results + stats.temp_size_in_bytes


def flops_of_forward(name: str, overrides: dict[str, Any], settings: Settings) -> tuple[float | None, str | None]:
    """Floating-point operations of a forward pass of one image, and who counted them; None where nobody can."""
    try:
        model = create_model(name, num_classes=settings.num_classes, dtype="float32", **overrides)
        with contextlib.suppress(ImportError, UserError, NotImplementedError):
            from vit_jax.costs.flops import forward_flops

            return float(forward_flops(model, settings.image_size)), "vit_jax.costs.flops"
        # XLA counts a loop's body once, and nothing inside of a kernel that it did not write.
        plain: dict[str, Any] = {"scan_layers": False, "remat": "none", "attention": "einsum"}
        known = {field.name for field in dataclasses.fields(model)}
        model = model.clone(**{key: value for key, value in plain.items() if key in known})
        images = jax.ShapeDtypeStruct((1, settings.image_size, settings.image_size, 3), jnp.float32)
        variables = abstract_variables(model, settings.image_size)
        lowered = jax.jit(lambda *arguments: model.apply(*arguments, train=False)[0]).lower(variables, images)
        analysis = lowered.cost_analysis() or lowered.compile().cost_analysis() or {}
        if analysis.get("flops", 0) > 0:
            return float(analysis["flops"]), "XLA's cost analysis"
    except Exception as error:  # the model's own row tells what is wrong with it
        print(f"  FLOPs of {name}: {reason(error)}", file=sys.stderr)
    return None, None


def matmul_rates(product: Callable[[int], Callable[[int], float]], sizes: Sequence[int]) -> list[dict[str, float]]:
    """Rates of square matrix products.

    Args:
      product: makes, for a size, a function that gives the seconds of a number of products.
      sizes: ascending; those that take too long or too much memory are left out.

    Returns:
      For each size `{"size", "flops_per_second"}`, of the fastest of several turns.
    """
    rates: list[dict[str, float]] = []
    for size in sizes:
        if rates and 2 * size**3 / rates[-1]["flops_per_second"] > MATMUL_SECONDS:
            break
        try:
            seconds_of = product(size)
            seconds_of(1)
            repeats = max(1, min(1000, math.ceil(0.2 / seconds_of(1))))
            seconds = min(seconds_of(repeats) / repeats for _ in range(4))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        rates.append({"size": size, "flops_per_second": 2 * size**3 / seconds})
    return rates


def jax_product(dtype: str) -> Callable[[int], Callable[[int], float]]:
    """Matrix products in JAX, for `matmul_rates`."""
    multiply = jax.jit(jnp.matmul)

    def product(size: int) -> Callable[[int], float]:
        # Not of zeros, which take less power and so run faster than anything real.
        left, right = jax.random.normal(jax.random.key(0), (2, size, size), dtype)

        def seconds(repeats: int) -> float:
            jax.block_until_ready((left, right))
            start = time.perf_counter()
            for _ in range(repeats):
                result = multiply(left, right)
            jax.block_until_ready(result)
            return time.perf_counter() - start

        return seconds

    return product


def torch_product(settings: Settings) -> Callable[[int], Callable[[int], float]]:
    """Matrix products in torch, for `matmul_rates`."""
    torch, _ = import_torch_and_timm()
    device = torch_device(torch, settings)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def product(size: int) -> Callable[[int], float]:
        left, right = torch.randn(2, size, size, device=device).to(getattr(torch, settings.dtype))

        def seconds(repeats: int) -> float:
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                torch.matmul(left, right)
            synchronize()
            return time.perf_counter() - start

        return seconds

    return product


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an exception of Python, XLA or torch means."""
    text = f"{type(error).__name__}: {error}".lower()
    signs = ("resource_exhausted", "outofmemory", "out of memory", "can't allocate memory", "failed to allocate")
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


def reason(error: BaseException) -> str:
    """An exception in one line."""
    first = next(iter(str(error).strip().splitlines()), "")
    # Of an unknown name the nearest one is enough here.
    first = first.partition(" Known: ")[0]
    if len(first) > 300:
        first = first[:297] + "..."
    if isinstance(error, UserError):
        return first
    return f"{'out of memory: ' if is_out_of_memory(error) else ''}{type(error).__name__}: {first}"


def report(error: BaseException) -> str:
    """The reason, and the traceback on stderr if it is not one that is to be expected."""
    if not isinstance(error, UserError) and not is_out_of_memory(error):
        traceback.print_exception(error, file=sys.stderr)
    return reason(error)


def candidates_of(model: str, arguments: argparse.Namespace) -> dict[str, Callable[[], Candidate]]:
    """Makers of all that is measured of a model, by the name of the variant."""
    settings, overrides = arguments.settings, arguments.overrides
    makers: dict[str, Callable[[], Candidate]] = {}
    if arguments.timm != "only":
        variants = {"vit_jax": {}, **{f"vit_jax {name}": value for name, value in arguments.variants.items()}}
        for variant, more in variants.items():
            makers[variant] = functools.partial(OurCandidate, model, variant, {**overrides, **more}, settings)
    if arguments.timm != "never":
        modes = {"timm": None, "timm compiled": arguments.torch_compile}
        for variant, mode in modes.items():
            if mode or variant == "timm":
                makers[variant] = functools.partial(TimmCandidate, model, variant, overrides, settings, mode)
    return makers


def steps_of_turn(candidate: Candidate, settings: Settings, seconds: float = TURN_SECONDS) -> int:
    """Steps that fill a turn."""
    if settings.steps:
        return settings.steps
    steps = MIN_STEPS
    while True:
        # At first a guess from few steps; once they fill a good part of the turn, they tell what a step takes.
        of_step = candidate.seconds(steps)
        wanted = max(MIN_STEPS, math.ceil(seconds / of_step))
        if wanted <= 4 * steps:
            return wanted
        steps = min(wanted, 10 * steps)


def try_batches(candidate: Candidate, what: str, first: int, settings: Settings) -> Iterator[tuple[int, float]]:
    """Doubles the batch while it pays. Yields `(batch, images/s)`; ends with the exception if one ended it."""
    best, batch = 0.0, first
    while True:
        candidate.prepare(what, batch)
        steps = steps_of_turn(candidate, settings, TURN_SECONDS / 3)
        speed = batch / statistics.median(candidate.seconds(steps) for _ in range(3))
        yield batch, speed
        if speed < GAIN * best:
            return
        best, batch = max(best, speed), 2 * batch


def tune_here(arguments: argparse.Namespace) -> int:
    """The part of --batch=auto that runs in a process of its own; writes a line of JSON for each batch."""
    model, variant = json.loads(arguments.tune)
    what = "train" if "train" in arguments.what else arguments.what[0]
    try:
        prepare_frameworks(arguments.settings, with_torch=variant.startswith("timm"))
        candidate = candidates_of(model, arguments)[variant]()
        for batch, speed in try_batches(candidate, what, arguments.min_batch, arguments.settings):
            print(json.dumps({"batch": batch, "images_per_second": speed}), flush=True)
    except Exception as error:
        print(json.dumps({"error": report(error)}), flush=True)
    return 0


def tune(model: str, variant: str) -> int:
    """Finds a candidate's best batch.

    In a process of its own: neither framework gives memory that it once had back to the other, so that here the one
    tuned last would find less than the first. And a process that the system kills for its memory is only a limit found.

    Raises:
      UserError: not even the first batch works.
    """
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), *sys.argv[1:]]
    command.append(f"--tune={json.dumps([model, variant])}")
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    tried = [line for line in lines if "batch" in line]
    end = next((line["error"] for line in lines if "error" in line), None)
    if end is None and process.returncode:
        end = f"the process ended with status {process.returncode} (-9: killed, as a rule for its memory)"
    speeds = ", ".join(f"{line['batch']}: {line['images_per_second']:.4g}" for line in tried)
    progress(f"  {model} {variant}, images/s by batch: {speeds or 'none'}{f'; then {end}' if end else ''}")
    if not tried:
        raise UserError(end or "no batch works")
    return max(tried, key=lambda line: line["images_per_second"])["batch"]


def prepare_frameworks(settings: Settings, *, with_torch: bool) -> None:
    """What must be set before the first device is touched.

    Raises:
      UserError: torch is to take part and cannot.
    """
    # Both frameworks share one GPU's memory: JAX must not take it all at once, nor stop at three quarters of it.
    if with_torch:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.9")
    jax.config.update("jax_enable_compilation_cache", False)
    set_precision(settings, with_torch=with_torch)
    if with_torch:
        torch_device(import_torch_and_timm()[0], settings)


def progress(line: str) -> None:
    """Tells on stderr what is being done; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def measure_model(
    model: Model, batches: dict[str, int | str], reference: float | None, arguments: argparse.Namespace
) -> list[Row]:
    """Measures all candidates of a model in turn.

    Args:
      model: which.
      batches: each candidate's batch by variant, or why there is none.
      reference: rate of matrix products on one device, in operations per second.
      arguments: the command's.
    """
    settings: Settings = arguments.settings
    flops, flops_source = flops_of_forward(model.name, arguments.overrides, settings)
    rows: list[Row] = []
    candidates: dict[str, Candidate] = {}
    errors: dict[str, str] = {}
    for variant, make in candidates_of(model.name, arguments).items():
        batch = batches[variant]
        try:
            if isinstance(batch, str):
                raise UserError(batch)
            candidates[variant] = make()
        except Exception as error:
            errors[variant] = report(error)

    for what in arguments.what:
        turns: list[tuple[Row, Candidate]] = []
        for variant in candidates_of(model.name, arguments):
            row = Row(model.name, variant, what, settings.dtype, error=errors.get(variant))
            rows.append(row)
            if variant in candidates:
                try:
                    prepare_row(row, candidates[variant], int(batches[variant]), model.batch is None, arguments)
                    turns.append((row, candidates[variant]))
                except Exception as error:
                    row.error = report(error)
        take_turns(turns, arguments.rounds if turns else 0)
        for row, candidate in turns:
            if not row.error:
                row.flops_per_image = flops and flops * (3 if what == "train" else 1)
                row.flops_source = flops_source
                finish_row(row, candidate, reference and reference * settings.devices)
        compare_with_timm([row for row in rows if row.what == what])
    return rows


def take_turns(turns: Sequence[tuple[Row, Candidate]], rounds: int) -> None:
    """Measures candidates round by round; one that fails is left out from then on."""
    for number in range(rounds):
        progress(f"  round {number + 1} of {rounds}")
        # Every other round the other way round: no one always comes after the same neighbour.
        for row, candidate in turns if number % 2 == 0 else reversed(turns):
            if row.error:
                continue
            try:
                if jax.default_backend() == "cpu" and len(turns) > 1:
                    time.sleep(PAUSE_SECONDS)
                row.round_seconds.append(candidate.seconds(row.steps or MIN_STEPS))
            except Exception as error:
                row.error = report(error)


def prepare_row(row: Row, candidate: Candidate, batch: int, tuned: bool, arguments: argparse.Namespace) -> None:
    """Makes a candidate ready for its turns and writes what is known by then."""
    row.overrides, row.timm_name = candidate.overrides, candidate.timm_name
    progress(f"  {row.model} {row.variant} {row.what}, batch {batch}: compiling")
    while True:
        row.batch = batch
        try:
            prepared = candidate.prepare(row.what, batch)
            break
        except Exception as error:
            # It was found alone; beside the others it may be too much.
            if not (tuned and is_out_of_memory(error) and batch >= 2 * arguments.min_batch):
                raise
            batch //= 2
            row.note = "a smaller batch than the best alone: the others are in memory as well"
    row.parameters = prepared.parameters
    row.compile_seconds = prepared.compile_seconds
    row.memory_bytes = prepared.memory_bytes
    row.device_peak_bytes = prepared.device_peak_bytes
    row.steps = steps_of_turn(candidate, arguments.settings)


def finish_row(row: Row, candidate: Candidate, reference: float | None) -> None:
    """Writes what follows from the rounds."""
    assert row.batch is not None
    seconds = statistics.median(row.round_seconds)
    row.ms_per_step = 1e3 * seconds
    row.images_per_second = row.batch / seconds
    row.images_per_second_min = row.batch / max(row.round_seconds)
    row.images_per_second_max = row.batch / min(row.round_seconds)
    if row.flops_per_image:
        row.flops_per_second = row.flops_per_image * row.images_per_second
        if reference:
            row.utilisation = row.flops_per_second / reference
    loss = candidate.loss()
    if loss is not None and math.isfinite(loss):
        row.loss = loss
    elif loss is not None:
        row.note = f"the loss is {loss}"


def compare_with_timm(rows: list[Row]) -> None:
    """Writes the ratios to timm's faster candidate, and what makes the comparison doubtful."""
    theirs = [row for row in rows if row.variant.startswith("timm") and row.images_per_second]
    if not theirs:
        return
    timm = max(theirs, key=lambda row: row.images_per_second or 0.0)
    for row in rows:
        if row.images_per_second and timm.images_per_second:
            row.ratio_to_timm = row.images_per_second / timm.images_per_second
        if row.parameters and row.parameters != timm.parameters:
            row.note = f"{row.parameters:,} parameters, timm {timm.parameters:,}: not the same model"


def format_table(rows: Sequence[Row]) -> str:
    """Rows as an aligned Markdown table."""

    def number(value: float | None, form: str, scale: float = 1.0, unit: str = "") -> str:
        return "-" if value is None else f"{value * scale:{form}}{unit}"

    def cells(row: Row) -> list[str]:
        spread = "-"
        if row.images_per_second_min is not None and row.images_per_second_max is not None:
            spread = f"{rate(row.images_per_second_min)} to {rate(row.images_per_second_max)}"
        return [
            row.model,
            row.variant,
            row.what,
            row.dtype,
            number(row.batch, ".0f"),
            "failed" if row.error else rate(row.images_per_second or 0.0),
            spread,
            number(row.ms_per_step, ".2f"),
            number(row.compile_seconds, ".1f"),
            number(row.memory_bytes, ".2f", 1e-9),
            number(row.flops_per_image, ".2f", 1e-9),
            number(row.flops_per_second, ".3f", 1e-12),
            number(row.utilisation, ".1f", 100, " %"),
            number(row.ratio_to_timm, ".3f"),
        ]

    header = ["model", "variant", "what", "dtype", "batch", "images/s", "min to max", "ms/step", "compile s"]
    header += ["memory GB", "GFLOP/image", "TFLOP/s", "utilisation", "to timm"]
    table = [header, *map(cells, rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    left = 4  # the columns of words

    def line(values: list[str]) -> str:
        padded = [
            value.ljust(width) if column < left else value.rjust(width)
            for column, (value, width) in enumerate(zip(values, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width) if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, table[1:])])


def format_remarks(rows: Sequence[Row]) -> str:
    """Reasons of failure and notes as a list, each once."""
    remarks: dict[str, list[str]] = {}
    for row in rows:
        for remark in filter(None, (row.error, row.note)):
            remarks.setdefault(remark, []).append(f"{row.variant} {row.what}")
    return "".join(f"- {', '.join(who)}: {remark}\n" for remark, who in remarks.items())


def rate(value: float) -> str:
    """Images per second with three digits at least."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def machine_facts(settings: Settings, load_average: float | None, *, with_torch: bool) -> dict[str, Any]:
    """Devices, processor, memory, versions, and the load that was there before."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    device = jax.devices()[0]
    packages = ["jax", "jaxlib", "flax", "optax", "numpy", *(["torch", "timm"] if with_torch else [])]
    facts = {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "platform_version": device.client.platform_version,
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": num_cpus(),
        "load_average": load_average,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "environment": {key: value for key, value in os.environ.items() if key.startswith(("XLA_", "JAX_", "OMP_"))},
    }
    if with_torch:
        torch, _ = import_torch_and_timm()
        on_gpu = torch_device(torch, settings) == "cuda"
        facts |= {
            "torch_device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "torch_cuda": torch.version.cuda,
            "torch_threads": torch.get_num_threads(),
        }
    return facts


def measure_matmul(settings: Settings, sizes: Sequence[int], *, with_jax: bool, with_torch: bool) -> dict[str, Any]:
    """Rates of matrix products in the frameworks that take part; `reference` is the highest of all, or None."""
    rates: dict[str, Any] = {}
    if with_jax:
        rates["jax"] = matmul_rates(jax_product(settings.dtype), sizes)
    if with_torch:
        time.sleep(PAUSE_SECONDS)
        rates["torch"] = matmul_rates(torch_product(settings), sizes)
    everything = [entry["flops_per_second"] for entries in rates.values() for entry in entries]
    return {**rates, "reference": max(everything, default=None)}


def describe_run(facts: dict[str, Any], matmul: dict[str, Any], settings: Settings) -> str:
    """The lines above the tables."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"{settings.devices} x {facts['device_kind']} ({facts['platform']}); {facts['processor']}, {facts['cores']} "
        f"cores, {facts['memory_bytes'] / 2**30 if facts['memory_bytes'] else 0:.0f} GiB",
        f"Python {facts['python']}, {versions}",
        f"{settings.dtype}, float32 products at precision {settings.precision}, images of {settings.image_size}, "
        f"{settings.optimizer}, {settings.accumulation} part(s) a batch",
    ]
    if "torch_device" in facts:
        lines.append(f"timm on {facts['torch_device']}, {facts['torch_threads']} threads")
    for framework in ("jax", "torch"):
        if matmul.get(framework):
            rates = [f"{entry['size']}: {entry['flops_per_second'] * 1e-12:.4g}" for entry in matmul[framework]]
            lines.append(f"Matrix products in {framework}, TFLOP/s by size: {', '.join(rates)}")
    if matmul["reference"]:
        lines.append(f"Utilisation 100 % is {matmul['reference'] * 1e-12:.4g} TFLOP/s a device")
    if facts["platform"] == "cpu" and (facts["load_average"] or 0) > 0.5:
        lines.append(
            f"Load average {facts['load_average']:.1f} at the start: if other programs compute, wait for them. They "
            "slow torch's threads, which wait for each other, many times more than those of JAX"
        )
    return "\n".join(lines)


def parse_value(text: str) -> Any:
    """`3` is an int, `0.1` a float, `true` a bool, all else a string."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def parse_overrides(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """Overrides of a model from `key=value`s."""
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UserError(f"{flag}: expected key=value, got {text!r}, as in {flag} scan_layers=true.")
        if key in ("dtype", "num_classes"):
            raise UserError(f"{flag}: {key} has a flag of its own, which timm follows too: --{key}={value}.")
        overrides[key] = parse_value(value)
    return overrides


def parse_variants(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Variants from `NAME:key=value,key=value`s."""
    variants = {}
    for text in texts:
        name, _, rest = text.partition(":")
        if not name or not rest:
            raise UserError(f"--variant: expected NAME:key=value,key=value, got {text!r}, as in scan:scan_layers=true.")
        if name in variants:
            raise UserError(f"--variant: the name {name!r} is given twice.")
        variants[name] = parse_overrides(rest.split(","), "--variant")
    return variants


def parse_batch(text: str, flag: str) -> int | None:
    """A positive number, or None for "auto"."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{flag}: expected a positive number or 'auto', got {text!r}.")
    return int(text)


def parse_models(texts: Sequence[str], batch: str) -> list[Model]:
    """Models from `name` or `name@batch`."""
    models = []
    for text in texts:
        name, at, own = text.partition("@")
        models.append(Model(name, parse_batch(own, f"--models {text}") if at else parse_batch(batch, "--batch")))
    return models


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["ViT-S/16"],
        metavar="NAME[@BATCH]",
        help="as create_model takes them, each with its own batch if it is to have one",
    )
    parser.add_argument(
        "--batch",
        default="32",
        help="images of a step; auto: doubled while the memory suffices and speed grows by 3 %%, for each candidate",
    )
    parser.add_argument("--min_batch", type=int, default=8, help="the first that --batch=auto tries")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    parser.add_argument(
        "--precision",
        choices=["highest", "tf32", "default"],
        help="of float32 products in both frameworks: highest (the default for float32), TensorFloat-32 where the "
        "device has it, or what each framework does by itself, which is not the same (the default for bfloat16)",
    )
    parser.add_argument("--what", default="forward,train", help="forward, train, or both")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="attributes of all models"
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="measure ours with these attributes as well; may be given again",
    )
    parser.add_argument("--num_classes", type=int, default=1000)
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd"])
    parser.add_argument("--accumulation", type=int, default=1, help="parts of the batch of a train step")
    parser.add_argument("--devices", type=int, default=1, help="of ours; timm takes part with one device only")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each candidate")
    parser.add_argument("--steps", default="auto", help="of a turn; auto: as fill a second, 3 at least")
    parser.add_argument(
        "--timm",
        choices=["auto", "never", "only"],
        default="auto",
        help="auto: beside ours if torch and timm are installed and the device is a CPU or a GPU",
    )
    parser.add_argument(
        "--torch_compile",
        nargs="?",
        const="default",
        metavar="MODE",
        help="measure timm compiled as well; MODE is torch.compile's, such as max-autotune",
    )
    parser.add_argument(
        "--matmul_sizes", type=int, nargs="+", default=list(MATMUL_SIZES), help="of the matrix products to compare with"
    )
    parser.add_argument("--json", type=pathlib.Path, help="file for all rows and facts")
    parser.add_argument("--label", help="kept in the JSON, such as the commit")
    # A process of --batch=auto: JSON [model, variant].
    parser.add_argument("--tune", help=argparse.SUPPRESS)
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Checks the flags and adds what they mean: `settings`, `overrides`, `variants`, and lists for `models` and `what`.

    Raises:
      UserError: a flag has a value that means nothing.
    """
    for name in ("min_batch", "image_size", "accumulation", "devices", "rounds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    if min(arguments.matmul_sizes) < 1:
        raise UserError(f"--matmul_sizes must be positive, got {arguments.matmul_sizes}.")
    arguments.matmul_sizes.sort()
    arguments.what = arguments.what.split(",")
    for what in arguments.what:
        if what not in ("forward", "train"):
            raise unknown_name("task", what, ["forward", "train"])
    if arguments.num_classes < 1:
        raise UserError(f"--num_classes must be at least 1, got {arguments.num_classes}: the loss needs logits.")
    steps = parse_batch(arguments.steps, "--steps")
    arguments.models = parse_models(arguments.models, arguments.batch)
    arguments.overrides = parse_overrides(arguments.set, "--set")
    arguments.variants = parse_variants(arguments.variant)
    if arguments.timm == "only" and not has_torch_and_timm():
        raise UserError("--timm=only needs torch and timm: pip install torch timm.")
    if arguments.timm == "only" and arguments.devices > 1:
        raise UserError("timm runs on one device here: --devices=1.")
    if arguments.timm == "auto" and (not has_torch_and_timm() or arguments.devices > 1):
        arguments.timm = "never"
    arguments.settings = Settings(
        image_size=arguments.image_size,
        dtype=arguments.dtype,
        precision=arguments.precision or ("highest" if arguments.dtype == "float32" else "default"),
        num_classes=arguments.num_classes,
        optimizer=arguments.optimizer,
        accumulation=arguments.accumulation,
        devices=arguments.devices,
        steps=steps,
        timm_alone=arguments.timm == "only",
    )


def find_batches(arguments: argparse.Namespace) -> list[dict[str, int | str]]:
    """For each model the candidates' batches by variant, or why there is none."""
    every: list[dict[str, int | str]] = []
    for model in arguments.models:
        batches: dict[str, int | str] = {}
        for variant in candidates_of(model.name, arguments):
            try:
                # What suits timm suits timm compiled, whose every batch would take a minute to compile.
                known = batches.get("timm") if variant == "timm compiled" else None
                batches[variant] = model.batch or known or tune(model.name, variant)
            except UserError as error:
                batches[variant] = str(error)
        every.append(batches)
    return every


def write_json(
    arguments: argparse.Namespace, facts: dict[str, Any], matmul: dict[str, Any], rows: Sequence[Row]
) -> None:
    """Writes everything that is known to the file of --json."""
    result = {
        "label": arguments.label,
        "command": sys.argv[1:],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": facts,
        "settings": dataclasses.asdict(arguments.settings),
        "matmul": matmul,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def benchmark(arguments: argparse.Namespace) -> int:
    """Measures, prints and writes everything; returns the exit status."""
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    # Now: where only one process may hold the device (TPU), this one must not yet.
    batches = find_batches(arguments)
    settings: Settings = arguments.settings
    with_torch = arguments.timm != "never"
    try:
        prepare_frameworks(settings, with_torch=with_torch)
    except UserError as error:
        if arguments.timm == "only":
            raise
        arguments.timm, with_torch = "never", False
        progress(f"without timm: {error}")
    if settings.devices > jax.device_count():
        raise UserError(f"--devices {settings.devices}: there are only {jax.device_count()}.")

    facts = machine_facts(settings, load_average, with_torch=with_torch)
    progress("matrix products")
    matmul = measure_matmul(settings, arguments.matmul_sizes, with_jax=arguments.timm != "only", with_torch=with_torch)
    print(describe_run(facts, matmul, settings), flush=True)
    rows: list[Row] = []
    for model, of_model in zip(arguments.models, batches, strict=True):
        progress(model.name)
        of_model_rows = measure_model(model, of_model, matmul["reference"], arguments)
        rows += of_model_rows
        if arguments.json:  # after each model, so that what has been measured outlives what comes after it
            write_json(arguments, facts, matmul, rows)
        parameters = next((row.parameters for row in of_model_rows if row.parameters), None)
        source = next((row.flops_source for row in of_model_rows if row.flops_source), None)
        print(f"\n## {model.name}{f', {parameters:,} parameters' if parameters else ''}")
        print(f"\n{format_table(of_model_rows)}\n\n{format_remarks(of_model_rows)}- FLOPs: {source or 'not known'}")
        sys.stdout.flush()
        gc.collect()
        if with_torch:
            import_torch_and_timm()[0].cuda.empty_cache()  # does nothing without a GPU
    if len(arguments.models) > 1:
        print(f"\n## Summary\n\n{format_table(rows)}")
    return 0 if any(row.images_per_second for row in rows) else 1


def main() -> int:
    """The command; returns its exit status."""
    arguments = make_parser().parse_args()
    try:
        check_arguments(arguments)
        return tune_here(arguments) if arguments.tune else benchmark(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
