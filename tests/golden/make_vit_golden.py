"""Makes vit.npz, beside this file: results of timm's Vision Transformer and torch's optimizers.

Nothing of vit_jax is imported: timm reads the weights with its own loader of the released checkpoints, so that names,
layouts, model, losses, clipping and optimizers are all somebody else's. torch computes in float64 and the results are
rounded to float32 once. The file depends on nothing but the seed and is the same to the last bit when made again.

Made with torch 2.13.0 (CPU), timm 1.0.31 and numpy 2.4.6:

    python -m venv oracle
    oracle/bin/pip install torch==2.13.0 numpy==2.4.6 pyyaml huggingface_hub safetensors pillow
    oracle/bin/pip install --no-deps timm==1.0.31
    oracle/bin/python tests/golden/make_vit_golden.py

Contents (`<name>` is a parameter's name in the released checkpoints, as in vit_jax/models/vit.py):

    images                       uint8 [4, 4, 16, 16, 3], four batches; the first is also that of the forward passes
    labels                       int32 [4, 4]
    weights/<name>               the initial weights, with those of `pre_logits`
    forward/<variant>/logits     [4, 7], of the variants `cls`, `cls_pre_logits` and `gap`. `gap` has the same weights
                                 without the class token and its position embedding
    forward/<variant>/pre_logits [4, 32], the input of the linear head
    forward/<variant>/encoded    [4, tokens, 32], after the last layer norm; `cls_pre_logits` has that of `cls`
    sigmoid_losses               [4], summed over classes, `cls`, first batch
    train/<run>/<metric>         [4], `loss`, `accuracy`, `grad_norm` (before clipping) and `learning_rate` of each step
                                 of training `cls`, for the runs `adamw`, `sgd` and `sgd_decay`
    train/<run>/weights/<name>   the weights after the four steps; of `sgd_decay` only those outside the blocks, which
                                 keeps the file small
"""

import enum
import functools
import math
import pathlib
import sys
import tempfile
import types

import numpy as np
import torch
from torch import nn
from torch.nn import functional

SEED = 1
OUTPUT = pathlib.Path(__file__).with_name("vit.npz")

IMAGE_SIZE = 16
PATCH_SIZE = 4
NUM_LAYERS = 2
HIDDEN_DIM = 32
MLP_DIM = 64
NUM_HEADS = 4
HEAD_DIM = HIDDEN_DIM // NUM_HEADS
NUM_CLASSES = 7
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2

NUM_STEPS = 4
BATCH_SIZE = 4
LABEL_SMOOTHING = 0.1
CLIP_NORM = 1.0

Arrays = dict[str, np.ndarray]


def import_timm() -> type[nn.Module]:
    """Gives timm's model class; torchvision, which timm's models import but do not use, need not be there."""

    class Stub(types.ModuleType):
        __path__ = ()

        def __getattr__(self, name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    for name in (
        "torchvision",
        "torchvision.datasets",
        "torchvision.models",
        "torchvision.models.feature_extraction",
        "torchvision.ops",
        "torchvision.ops.misc",
        "torchvision.transforms",
        "torchvision.transforms.functional",
        "torchvision.utils",
    ):
        sys.modules[name] = Stub(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    # timm looks these up by member when it is imported.
    sys.modules["torchvision.transforms.functional"].InterpolationMode = enum.Enum(
        "InterpolationMode", "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS"
    )

    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer


def random_weights(rng: np.random.Generator) -> Arrays:
    """Weights of the `cls` model and its `pre_logits` by name, none of them zero or one.

    The tokens are small (variance 0.03), so that the epsilon of the layer norms shows in the results. So are the last
    layer norm and the head, so that some gradients are below the norm at which they are clipped.
    """

    def normal(*shape: int, std: float = 0.1, mean: float = 0.0) -> np.ndarray:
        # Values that float16 can hold have zeros at the end of the mantissa, which compress.
        return rng.normal(mean, std, shape).astype(np.float16).astype(np.float32)

    def dense(*shape: int, fan_in: int, bias: tuple[int, ...]) -> Arrays:
        return {"kernel": normal(*shape, std=fan_in**-0.5), "bias": normal(*bias)}

    def layer_norm(scale: float = 1.0) -> Arrays:
        return {"scale": normal(HIDDEN_DIM, mean=scale, std=0.2), "bias": normal(HIDDEN_DIM)}

    to_heads = functools.partial(dense, HIDDEN_DIM, NUM_HEADS, HEAD_DIM, fan_in=HIDDEN_DIM, bias=(NUM_HEADS, HEAD_DIM))
    modules = {
        "embedding": {
            "kernel": normal(PATCH_SIZE, PATCH_SIZE, 3, HIDDEN_DIM, std=0.03),
            "bias": normal(HIDDEN_DIM, std=0.05),
        },
        "Transformer/posembed_input": {"pos_embedding": normal(1, 1 + NUM_PATCHES, HIDDEN_DIM)},
        "Transformer/encoder_norm": layer_norm(0.3),
        "pre_logits": dense(HIDDEN_DIM, HIDDEN_DIM, fan_in=HIDDEN_DIM, bias=(HIDDEN_DIM,)),
        "head": {"kernel": normal(HIDDEN_DIM, NUM_CLASSES, std=0.03), "bias": normal(NUM_CLASSES)},
    }
    for layer in range(NUM_LAYERS):
        block = f"Transformer/encoderblock_{layer}"
        modules |= {
            f"{block}/LayerNorm_0": layer_norm(),
            f"{block}/MultiHeadDotProductAttention_1/query": to_heads(),
            f"{block}/MultiHeadDotProductAttention_1/key": to_heads(),
            f"{block}/MultiHeadDotProductAttention_1/value": to_heads(),
            f"{block}/MultiHeadDotProductAttention_1/out": dense(
                NUM_HEADS, HEAD_DIM, HIDDEN_DIM, fan_in=HIDDEN_DIM, bias=(HIDDEN_DIM,)
            ),
            f"{block}/LayerNorm_2": layer_norm(),
            f"{block}/MlpBlock_3/Dense_0": dense(HIDDEN_DIM, MLP_DIM, fan_in=HIDDEN_DIM, bias=(MLP_DIM,)),
            f"{block}/MlpBlock_3/Dense_1": dense(MLP_DIM, HIDDEN_DIM, fan_in=MLP_DIM, bias=(HIDDEN_DIM,)),
        }
    weights = {f"{module}/{leaf}": array for module, leaves in modules.items() for leaf, array in leaves.items()}
    return {"cls": normal(1, 1, HIDDEN_DIM), **weights}


def make_model(vision_transformer: type[nn.Module], weights: Arrays, *, pool: str) -> nn.Module:
    """timm's model in float64 with these weights.

    Args:
      vision_transformer: timm's class.
      weights: of the `cls` model.
      pool: "cls" or "gap".
    """
    if pool == "gap":
        embedding = "Transformer/posembed_input/pos_embedding"
        weights = {**weights, embedding: weights[embedding][:, 1:]}
        del weights["cls"]
    model = vision_transformer(
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        num_classes=NUM_CLASSES,
        embed_dim=HIDDEN_DIM,
        depth=NUM_LAYERS,
        num_heads=NUM_HEADS,
        mlp_ratio=MLP_DIM / HIDDEN_DIM,
        qkv_bias=True,
        class_token=pool == "cls",
        global_pool="token" if pool == "cls" else "avg",
        # timm would otherwise move the last layer norm of an averaging model behind the mean.
        fc_norm=False,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        act_layer=functools.partial(nn.GELU, approximate="tanh"),
    ).double()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)  # a weight that the loader leaves out shows
        path = pathlib.Path(folder) / "weights.npz"
        np.savez(path, **weights)
        model.load_pretrained(path)
    return model


def named_weights(model: nn.Module) -> Arrays:
    """The model's weights under the released checkpoints' names; the inverse of timm's loader."""
    state = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    named = {
        "cls": state.pop("cls_token"),
        "Transformer/posembed_input/pos_embedding": state.pop("pos_embed"),
        "embedding/kernel": state.pop("patch_embed.proj.weight").transpose(2, 3, 1, 0),
        "embedding/bias": state.pop("patch_embed.proj.bias"),
    }

    def layer_norm(ours: str, theirs: str) -> None:
        named[f"{ours}/scale"] = state.pop(f"{theirs}.weight")
        named[f"{ours}/bias"] = state.pop(f"{theirs}.bias")

    def dense(ours: str, theirs: str) -> None:
        named[f"{ours}/kernel"] = state.pop(f"{theirs}.weight").T
        named[f"{ours}/bias"] = state.pop(f"{theirs}.bias")

    layer_norm("Transformer/encoder_norm", "norm")
    dense("head", "head")
    for layer in range(NUM_LAYERS):
        ours, theirs = f"Transformer/encoderblock_{layer}", f"blocks.{layer}"
        attention = f"{ours}/MultiHeadDotProductAttention_1"
        layer_norm(f"{ours}/LayerNorm_0", f"{theirs}.norm1")
        layer_norm(f"{ours}/LayerNorm_2", f"{theirs}.norm2")
        dense(f"{ours}/MlpBlock_3/Dense_0", f"{theirs}.mlp.fc1")
        dense(f"{ours}/MlpBlock_3/Dense_1", f"{theirs}.mlp.fc2")
        dense(f"{attention}/out", f"{theirs}.attn.proj")
        out = f"{attention}/out/kernel"
        named[out] = named[out].reshape(NUM_HEADS, HEAD_DIM, HIDDEN_DIM)
        kernels = np.split(state.pop(f"{theirs}.attn.qkv.weight").T, 3, axis=1)
        biases = np.split(state.pop(f"{theirs}.attn.qkv.bias"), 3)
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            named[f"{attention}/{name}/kernel"] = kernel.reshape(HIDDEN_DIM, NUM_HEADS, HEAD_DIM)
            named[f"{attention}/{name}/bias"] = bias.reshape(NUM_HEADS, HEAD_DIM)
    assert not state, f"weights without a name: {sorted(state)}"
    return {name: array.astype(np.float32) for name, array in named.items()}


def normalize(images: np.ndarray) -> torch.Tensor:
    """uint8 [batch, height, width, channels] to float64 [batch, channels, height, width] in [-1, 1]."""
    return torch.from_numpy(images).double().permute(0, 3, 1, 2) / 127.5 - 1.0


def make_forward(
    vision_transformer: type[nn.Module], weights: Arrays, images: np.ndarray, labels: np.ndarray
) -> dict[str, torch.Tensor]:
    """Everything of the file that needs no training."""
    inputs = normalize(images)
    golden = {}

    for pool in ("cls", "gap"):
        model = make_model(vision_transformer, weights, pool=pool).eval()
        encoded = model.forward_features(inputs)
        golden[f"forward/{pool}/encoded"] = encoded
        golden[f"forward/{pool}/pre_logits"] = model.forward_head(encoded, pre_logits=True)
        golden[f"forward/{pool}/logits"] = model(inputs)
        if pool == "cls":
            # timm has dropped the hidden layer of the pre-training head.
            hidden = nn.Linear(HIDDEN_DIM, HIDDEN_DIM).double()
            hidden.weight.copy_(torch.from_numpy(weights["pre_logits/kernel"].T))
            hidden.bias.copy_(torch.from_numpy(weights["pre_logits/bias"]))
            pre_logits = torch.tanh(hidden(encoded[:, 0]))
            golden["forward/cls_pre_logits/pre_logits"] = pre_logits
            golden["forward/cls_pre_logits/logits"] = model.head(pre_logits)

    logits = golden["forward/cls/logits"]
    targets = functional.one_hot(torch.from_numpy(labels).long(), NUM_CLASSES).double()
    losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    golden["sigmoid_losses"] = losses.sum(dim=1)
    return golden


def make_optimizer(run: str, model: nn.Module) -> tuple[torch.optim.Optimizer, list[float]]:
    """The optimizer of a run, which decays the kernels only, and the learning rates of its steps."""
    # The kernels are all the arrays of more than one axis but these two.
    kernels, others = [], []
    for name, parameter in model.named_parameters():
        is_kernel = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        (kernels if is_kernel else others).append(parameter)

    def groups(weight_decay: float) -> list[dict]:
        return [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

    if run == "adamw":
        # Two steps of warm-up to 3e-3, then two of linear decay to 1e-5, which step 4 would reach.
        peak, end = 3e-3, 1e-5
        return torch.optim.AdamW(groups(0.1), eps=1e-8), [0.0, peak / 2, peak, (peak + end) / 2]
    # One step of warm-up to 0.1, then three of cosine decay to 0, which step 4 would reach.
    learning_rates = [0.0] + [0.05 * (1.0 + math.cos(math.pi * step / 3)) for step in range(3)]
    return torch.optim.SGD(groups(0.1 if run == "sgd_decay" else 0.0), momentum=0.9), learning_rates


def train(run: str, model: nn.Module, images: np.ndarray, labels: np.ndarray) -> Arrays:
    """Trains the model, one step per batch.

    Returns:
      The metrics and the weights afterwards by name.
    """
    optimizer, learning_rates = make_optimizer(run, model)
    metrics: dict[str, list[float]] = {"loss": [], "accuracy": [], "grad_norm": [], "learning_rate": learning_rates}
    for step, learning_rate in enumerate(learning_rates):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        targets = torch.from_numpy(labels[step]).long()
        logits = model(normalize(images[step]))
        loss = functional.cross_entropy(logits, targets, label_smoothing=LABEL_SMOOTHING)
        first, second = logits.detach().topk(2).values.unbind(dim=1)
        assert (first - second > 1e-4).all(), "float32 could tell the classes apart differently"
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        metrics["loss"].append(loss.item())
        metrics["accuracy"].append((logits.argmax(dim=1) == targets).double().mean().item())
        metrics["grad_norm"].append(norm.item())

    # Of the steps that change the weights, some must clip and some not, neither by a hair.
    norms = np.array(metrics["grad_norm"][1:])
    print(f"{run}: loss {np.round(metrics['loss'], 4)}, gradient norms {np.round(metrics['grad_norm'], 4)}")
    assert (norms > 1.2 * CLIP_NORM).any() and (norms < CLIP_NORM / 1.2).any(), norms
    assert 0.0 < np.mean(metrics["accuracy"]) < 1.0, metrics["accuracy"]

    weights = named_weights(model)
    if run == "sgd_decay":
        weights = {name: array for name, array in weights.items() if "encoderblock" not in name}
    return metrics | {f"weights/{name}": array for name, array in weights.items()}


def main() -> None:
    """Writes the file."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    vision_transformer = import_timm()
    weights = random_weights(rng)
    images = rng.integers(0, 256, (NUM_STEPS, BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    # Many labels in a batch make small gradients, a single one large gradients.
    labels = np.stack([rng.permutation(NUM_CLASSES)[:BATCH_SIZE] for _ in range(NUM_STEPS)]).astype(np.int32)
    labels[1] = 3

    model = make_model(vision_transformer, weights, pool="cls")
    for name, array in named_weights(model).items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)

    with torch.no_grad():
        golden = make_forward(vision_transformer, weights, images[0], labels[0])
    for run in ("adamw", "sgd", "sgd_decay"):
        model = make_model(vision_transformer, weights, pool="cls")
        golden |= {f"train/{run}/{name}": value for name, value in train(run, model, images, labels).items()}

    golden |= {f"weights/{name}": array for name, array in weights.items()}
    arrays = {name: np.asarray(value, np.float32) for name, value in golden.items()}
    assert all(np.isfinite(array).all() for array in arrays.values())
    np.savez_compressed(OUTPUT, images=images, labels=labels, **arrays)
    print(f"{OUTPUT}: {len(arrays) + 2} arrays, {OUTPUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
