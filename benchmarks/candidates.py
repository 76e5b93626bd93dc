"""The models that the train step benchmark measures: ours, and timm's in PyTorch."""

import dataclasses
import enum
import functools
import gc
import importlib.util
import os
import re
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from vit_jax.console import num_cpus
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.layers import normalize_images
from vit_jax.objectives.classification import Classification
from vit_jax.optimizers import make_optimizer, make_schedule
from vit_jax.sharding import batch_sharding, make_mesh, replicated
from vit_jax.train_step import TrainStep

LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
NUM_CLASSES = 1000

# Threads of a pool wait actively for a while (GNU OpenMP's 10 ms, Intel's 0.2 s), even in the turn of the next
# candidate. After this pause they sleep.
PAUSE_SECONDS = 0.3

# Attributes of our models that change how, and not what, they compute: timm need not follow them.
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
      dtype: of the computation, "float32" or "bfloat16"; parameters are float32.
      steps: train steps or forward passes in a turn; None: as many as fill a second.
      timm_alone: whether only timm is measured; it may then use a GPU that JAX does not know.
    """

    image_size: int
    dtype: str
    steps: int | None
    timm_alone: bool = False


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is known of a candidate before its turns; see `train_step.Row`."""

    parameters: int
    compile_seconds: float | None
    memory_bytes: int | None


class Candidate:
    """A model that can be measured.

    Attributes:
      variant: its name in the tables.
      overrides: attributes of the model that were set.
      timm_name: its name in timm, None for ours.
    """

    timm_name: str | None = None

    def __init__(self, variant: str, overrides: dict[str, Any], settings: Settings):
        self.variant, self.overrides, self._settings = variant, overrides, settings
        self._take_step: Callable[[], None] = lambda: None

    def prepare(self, what: str, batch: int) -> Prepared:
        """Compiles "train" or "forward" for a batch size and takes the first steps."""
        raise NotImplementedError

    def loss(self) -> float | None:
        """The last train step's loss; None after a forward pass."""
        raise NotImplementedError

    def _wait(self) -> None:
        """Waits until the device is done."""

    def seconds(self, steps: int) -> float:
        """Seconds a step over some steps, after one that is not counted."""
        self._take_step()
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            self._take_step()
        self._wait()
        return (time.perf_counter() - start) / steps


class OurCandidate(Candidate):
    """A model of vit_jax."""

    def __init__(self, model: str, variant: str, overrides: dict[str, Any], settings: Settings):
        super().__init__(variant, overrides, settings)
        self._model = create_model(model, num_classes=NUM_CLASSES, dtype=settings.dtype, **overrides)
        self._state: Any = None
        self._result: Any = None

    def prepare(self, what: str, batch: int) -> Prepared:
        """Compiles a task and takes its first steps."""
        self._result, self._take_step = None, lambda: None
        mesh = make_mesh(jax.devices()[:1])
        schedule = make_schedule("constant", learning_rate=LEARNING_RATE, num_steps=1)
        optimizer = make_optimizer("adamw", schedule, weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM)
        size = self._settings.image_size
        step = TrainStep(self._model, optimizer, Classification(), image_size=size, schedule=schedule, mesh=mesh)
        # A step that ran out of memory has taken the donated state with it.
        if self._state is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state)):
            self._state = None
            self._state = step.init(seed=0)
        examples = jax.device_put(random_examples(batch, size), batch_sharding(mesh))

        # Initialisation in the background would slow the compiler.
        jax.block_until_ready((self._state, examples))
        start = time.perf_counter()
        if what == "train":
            compiled: Any = step.lower(examples).compile()

            def take_step() -> None:
                self._state, self._result = compiled(self._state, examples)
        else:

            def forward(params: Any, images: jax.Array) -> jax.Array:
                return self._model.apply({"params": params}, normalize_images(images), train=False)[0]

            split = batch_sharding(mesh)
            jitted = jax.jit(forward, in_shardings=(replicated(mesh), split), out_shardings=split)
            compiled = jitted.lower(self._state.params, examples["image"]).compile()

            def take_step() -> None:
                self._result = compiled(self._state.params, examples["image"])

        compile_seconds = time.perf_counter() - start
        self._take_step = take_step
        self.seconds(1)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self._state.params))
        return Prepared(parameters, compile_seconds, planned_bytes(compiled))

    def _wait(self) -> None:
        jax.block_until_ready((self._state, self._result))

    def loss(self) -> float | None:
        """The last train step's loss; None after a forward pass."""
        return float(self._result["loss"]) if isinstance(self._result, dict) else None


class TimmCandidate(Candidate):
    """timm's model, in PyTorch."""

    def __init__(
        self, model: str, variant: str, overrides: dict[str, Any], settings: Settings, compile_mode: str | None
    ):
        super().__init__(variant, overrides, settings)
        self._torch, self._timm = import_torch_and_timm()
        self._device = torch_device(self._torch, settings)
        self.timm_name, self._arguments = timm_model(model, overrides, settings.image_size, self._timm.list_models())
        self._compile_mode = compile_mode
        self._channels_last = self._device == "cuda" and not model.startswith("ViT-")
        self._model: Any = None
        self._run: Any = None
        self._optimizer: Any = None
        self._loss: Any = None

    def prepare(self, what: str, batch: int) -> Prepared:
        """Makes the model if need be and takes the first steps of a task."""
        torch, cuda = self._torch, self._device == "cuda"
        self._loss, self._take_step = None, lambda: None
        if self._optimizer:
            self._optimizer.zero_grad(set_to_none=True)
        if self._compile_mode:
            # After some batch sizes torch would stop compiling for another.
            torch.compiler.reset()
        bytes_before = 0
        if cuda:
            gc.collect()
            # Memory cached for another batch size must not count, nor be in the way.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            bytes_before = torch.cuda.memory_allocated() - self._own_bytes()
        if self._model is None:
            self._build()

        examples = random_examples(batch, self._settings.image_size)
        memory_format = torch.channels_last if self._channels_last else torch.contiguous_format
        images = torch.from_numpy(examples["image"]).permute(0, 3, 1, 2).to(self._device)
        images = images.contiguous(memory_format=memory_format)
        labels = torch.from_numpy(examples["label"]).long().to(self._device)
        self._model.train(what == "train")
        bfloat16 = self._settings.dtype == "bfloat16"
        mark_step = torch.compiler.cudagraph_mark_step_begin if self._compile_mode else lambda: None

        def logits() -> Any:
            mark_step()
            with torch.autocast(self._device, dtype=torch.bfloat16, enabled=bfloat16):
                return self._run(images.float().div_(127.5).sub_(1.0))

        def train_step() -> None:
            with torch.autocast(self._device, dtype=torch.bfloat16, enabled=bfloat16):
                loss = torch.nn.functional.cross_entropy(logits(), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_NORM)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._loss = loss.detach()

        self._take_step = train_step if what == "train" else torch.inference_mode()(logits)
        start = time.perf_counter()
        self._take_step()
        self._wait()
        first_seconds = time.perf_counter() - start
        self.seconds(1)
        memory_bytes = torch.cuda.max_memory_allocated() - bytes_before if cuda else None
        parameters = sum(parameter.numel() for parameter in self._model.parameters())
        return Prepared(parameters, first_seconds if self._compile_mode else None, memory_bytes)

    def _wait(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()

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
        if self._channels_last:
            model = model.to(memory_format=torch.channels_last)
        kernels = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        groups = [{"params": kernels, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
        # One program for each batch size, as ours; "automatic dynamic" would make a slower one at the second size.
        self._run = torch.compile(model, mode=self._compile_mode, dynamic=False) if self._compile_mode else model
        self._model = model

    def _own_bytes(self) -> int:
        if self._model is None:
            return 0
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        tensors = [*self._model.parameters(), *self._model.buffers(), *filter(self._torch.is_tensor, states)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_cuda)


def timm_model(
    name: str, overrides: dict[str, Any], image_size: int, known: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """The name of a model in timm and the arguments that make it the same as ours.

    Args:
      name: ours.
      overrides: attributes of our model that were set.
      image_size: side of the images, in pixels.
      known: names of timm's models.

    Raises:
      UserError: timm has no such model, or none with these attributes.
    """
    arguments: dict[str, Any] = {"num_classes": NUM_CLASSES}
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
    arguments |= {"img_size": image_size, "act_layer": "gelu_tanh"}
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
    """Arguments of a timm ViT for the attributes of ours that were set; see `timm_model`."""
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
    """Puts stubs with the members that timm imports into `sys.modules`; returns their names."""

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
    """The device that timm computes on: JAX's, under its name in torch.

    Raises:
      UserError: torch cannot compute there.
    """
    platform = jax.default_backend()
    if platform == "cpu":
        gpu = settings.timm_alone and os.environ.get("JAX_PLATFORMS") != "cpu" and torch.cuda.is_available()
        return "cuda" if gpu else "cpu"
    if platform != "gpu" or not torch.cuda.is_available():
        raise UserError(f"torch cannot use the device of JAX ({platform}); choose --timm=never.")
    return "cuda"


def set_precision(dtype: str, *, with_torch: bool) -> None:
    """Makes products of float32 exact in both frameworks, whose defaults differ; leaves bfloat16 to them."""
    if dtype != "float32":
        return
    jax.config.update("jax_default_matmul_precision", "highest")
    if with_torch:
        torch, _ = import_torch_and_timm()
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False


def random_examples(batch: int, image_size: int) -> dict[str, np.ndarray]:
    """A batch of noise: `image` uint8 `[batch, image_size, image_size, 3]` and `label` int32 `[batch]`."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (batch, image_size, image_size, 3), dtype=np.uint8),
        "label": rng.integers(0, NUM_CLASSES, batch, dtype=np.int32),
    }


def planned_bytes(compiled: Any) -> int | None:
    """Memory of a compiled program on a device: arguments, results that are not donated arguments, and temporaries."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    arguments_and_results = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return arguments_and_results + stats.temp_size_in_bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an exception of Python, XLA or torch means."""
    text = f"{type(error).__name__}: {error}".lower()
    signs = ("resource_exhausted", "outofmemory", "out of memory", "can't allocate memory", "failed to allocate")
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)
