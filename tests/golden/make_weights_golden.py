"""Makes weights.npz and weights_names.json, beside this file: timm's results on files in the released layouts.

Nothing of vit_jax is imported. Weights follow from their names by `weights_recipe`, so that they need no place here.
They go into a .npz file in the released layout, which timm reads with its own loader; torch computes in float64.
Gradients are sorted back into the released layout by the same loader: it is given a file that numbers all elements.

Made with torch 2.13.0 (CPU), timm 1.0.31, transformers 5.23.0 and numpy 2.4.6:

    python -m venv oracle
    oracle/bin/pip install torch==2.13.0 numpy==2.4.6 transformers==5.23.0 pyyaml huggingface_hub safetensors pillow
    oracle/bin/pip install --no-deps timm==1.0.31
    oracle/bin/python tests/golden/make_weights_golden.py

Contents of weights.npz, for the small models of `MODELS`; two images of 64x96 pixels from `weights_recipe.make_images`:

    <model>/logits         [2, 7]
    <model>/<intermediate> as vit_jax names it; of feature maps only every 32nd channel
    <model>/gradient       [arrays, 2], of the mean cross-entropy with labels 1 and 4: what `probe_gradient` of
                           `weights_recipe` gives for each array of the released layout, in alphabetical order
    huggingface/logits     [2, 7], of transformers' ViT; two images of 64x64 pixels

Contents of weights_names.json:

    models       by name of the model in weights.npz: `arrays`, shapes by name of the released layout, all of them and
                 only them read by timm's loader; `checksum` of the weights, and `state_dict_checksum` of what timm's
                 loader makes of them
    huggingface  a small model's `config`, as transformers writes it, and `arrays`, shapes by the names in its file
    state_dicts  a list of `library`; `model`, `overrides`, `num_classes` and `image_size` as vit_jax has them; and
                 `arrays`, shapes by the library's names
"""

import contextlib
import functools
import json
import pathlib
import sys
import tempfile
import types
from collections.abc import Callable, Iterator

import numpy as np
import torch
from make_vit_golden import import_timm
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional
from weights_recipe import checksum, make_array, make_images, make_torch_array, probe_gradient

ARRAYS = pathlib.Path(__file__).with_name("weights.npz")
NAMES = pathlib.Path(__file__).with_name("weights_names.json")

IMAGE_SIZE = (64, 96)
NUM_CLASSES = 7
LABELS = (1, 4)
EVERY = 32  # channels of feature maps
WIDTH, MLP_WIDTH, DEPTH, HEADS = 64, 128, 2, 4

Shapes = dict[str, tuple[int, ...]]


def transformer_shapes(num_tokens: int, patch: int, channels: int = 3) -> Shapes:
    """A ViT in the released layout, without class token."""
    shapes: Shapes = {
        "embedding/kernel": (patch, patch, channels, WIDTH),
        "embedding/bias": (WIDTH,),
        "Transformer/posembed_input/pos_embedding": (1, num_tokens, WIDTH),
        "Transformer/encoder_norm/scale": (WIDTH,),
        "Transformer/encoder_norm/bias": (WIDTH,),
        "head/kernel": (WIDTH, NUM_CLASSES),
        "head/bias": (NUM_CLASSES,),
    }
    for layer in range(DEPTH):
        block = f"Transformer/encoderblock_{layer}/"
        shapes |= attention_shapes(block + "MultiHeadDotProductAttention_1/") | mlp_shapes(block + "MlpBlock_3/")
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}{norm}/{leaf}": (WIDTH,) for leaf in ("scale", "bias")}
    return shapes


def attention_shapes(place: str) -> Shapes:
    head = WIDTH // HEADS
    shapes: Shapes = {place + "out/kernel": (HEADS, head, WIDTH), place + "out/bias": (WIDTH,)}
    for name in ("query", "key", "value"):
        shapes |= {f"{place}{name}/kernel": (WIDTH, HEADS, head), f"{place}{name}/bias": (HEADS, head)}
    return shapes


def mlp_shapes(place: str) -> Shapes:
    return {
        place + "Dense_0/kernel": (WIDTH, MLP_WIDTH),
        place + "Dense_0/bias": (MLP_WIDTH,),
        place + "Dense_1/kernel": (MLP_WIDTH, WIDTH),
        place + "Dense_1/bias": (WIDTH,),
    }


def map_head_shapes() -> Shapes:
    place = "MAPHead_0/"
    return {
        place + "probe": (1, 1, WIDTH),
        place + "LayerNorm_0/scale": (WIDTH,),
        place + "LayerNorm_0/bias": (WIDTH,),
        **attention_shapes(place + "MultiHeadDotProductAttention_0/"),
        **mlp_shapes(place + "MlpBlock_0/"),
    }


def hybrid_shapes(stages: int) -> Shapes:
    """The ResNet in front of a Transformer, of one unit a stage."""
    shapes: Shapes = {"conv_root/kernel": (7, 7, 3, 64), "gn_root/scale": (64,), "gn_root/bias": (64,)}
    channels = 64
    for stage in range(stages):
        unit, width = f"block{stage + 1}/unit1/", 64 * 2**stage
        for number, kernel in (
            ("1", (1, 1, channels, width)),
            ("2", (3, 3, width, width)),
            ("3", (1, 1, width, 4 * width)),
            ("_proj", (1, 1, channels, 4 * width)),
        ):
            shapes[f"{unit}conv{number}/kernel"] = kernel
            shapes |= {f"{unit}gn{number}/{leaf}": kernel[-1:] for leaf in ("scale", "bias")}
        channels = 4 * width
    return shapes


def bit_shapes() -> Shapes:
    """BiT of four stages of one unit, with TensorFlow's names."""
    shapes: Shapes = {"resnet/root_block/standardized_conv2d/kernel": (7, 7, 3, 64)}
    channels = 64
    for stage in range(4):
        unit, width = f"resnet/block{stage + 1}/unit01/", 64 * 2**stage
        for letter, kernel in (
            ("a", (1, 1, channels, width)),
            ("b", (3, 3, width, width)),
            ("c", (1, 1, width, 4 * width)),
        ):
            shapes[f"{unit}{letter}/standardized_conv2d/kernel"] = kernel
            shapes |= {f"{unit}{letter}/group_norm/{leaf}": kernel[2:3] for leaf in ("gamma", "beta")}
        shapes[f"{unit}a/proj/standardized_conv2d/kernel"] = (1, 1, channels, 4 * width)
        channels = 4 * width
    shapes |= {f"resnet/group_norm/{leaf}": (channels,) for leaf in ("gamma", "beta")}
    head: Shapes = {"kernel": (1, 1, channels, NUM_CLASSES), "bias": (NUM_CLASSES,)}
    return shapes | {f"resnet/head/conv2d/{leaf}": shape for leaf, shape in head.items()}


def make_models() -> dict[str, tuple[Callable[[], nn.Module], Shapes, dict[str, str]]]:
    """By name: how timm makes the model, its arrays in the released layout, and timm's modules by our intermediates."""
    import timm
    from timm.models import resnetv2, vision_transformer_hybrid

    transformer = {
        "img_size": IMAGE_SIZE,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": MLP_WIDTH / WIDTH,
        "num_classes": NUM_CLASSES,
        "act_layer": "gelu_tanh",
    }
    vit = functools.partial(timm.create_model, "vit_tiny_patch16_224", **transformer)
    # Its mean is otherwise taken before the last layer norm.
    without_class_token = functools.partial(vit, class_token=False, fc_norm=False)

    def make_hybrid() -> nn.Module:
        backbone = vision_transformer_hybrid._resnetv2((1, 1, 1))
        return vision_transformer_hybrid._create_vision_transformer_hybrid(
            "vit_base_r50_s16_224", backbone=backbone, **transformer
        )

    make_stem_only = functools.partial(timm.create_model, "vit_tiny_r_s16_p8_224", **transformer)

    def make_bit() -> nn.Module:
        return resnetv2._create_resnetv2_bit("resnetv2_50x1_bit", layers=[1, 1, 1, 1], num_classes=NUM_CLASSES)

    cls: Shapes = {"cls": (1, 1, WIDTH)}
    tokens = {"block_0": "blocks.0", "encoded": "norm"}
    return {
        "vit": (vit, cls | transformer_shapes(1 + 4 * 6, patch=16), tokens),
        "vit_gap": (
            functools.partial(without_class_token, global_pool="avg"),
            transformer_shapes(4 * 6, patch=16),
            tokens,
        ),
        "vit_map": (
            functools.partial(without_class_token, global_pool="map"),
            transformer_shapes(4 * 6, patch=16) | map_head_shapes(),
            tokens,
        ),
        "hybrid": (
            make_hybrid,
            cls | hybrid_shapes(3) | transformer_shapes(1 + 4 * 6, patch=1, channels=1024),
            {"feature_map": "patch_embed.backbone", **tokens},
        ),
        "stem_only": (
            make_stem_only,
            cls | hybrid_shapes(0) | transformer_shapes(1 + 2 * 3, patch=8, channels=64),
            {"feature_map": "patch_embed.backbone", **tokens},
        ),
        "bit": (
            make_bit,
            bit_shapes(),
            {"root": "stem", **{f"block{stage + 1}": f"stages.{stage}" for stage in range(4)}, "feature_map": "norm"},
        ),
    }


@contextlib.contextmanager
def recorded_names() -> Iterator[set[str]]:
    """The names of arrays that timm's loaders read meanwhile."""
    from timm.models import resnetv2, vision_transformer

    read: set[str] = set()
    modules = (resnetv2, vision_transformer)
    load = vision_transformer._load_npz_checkpoint

    class Recorder(dict):
        def __getitem__(self, name: str) -> np.ndarray:
            read.add(name)
            return super().__getitem__(name)

    for module in modules:
        module._load_npz_checkpoint = lambda *args, **kwargs: Recorder(load(*args, **kwargs))
    try:
        yield read
    finally:
        for module in modules:
            module._load_npz_checkpoint = load


def load_arrays(model: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Lets timm read a file of these arrays."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # a weight that the loader leaves out shows
        path = pathlib.Path(folder) / "weights.npz"
        np.savez(path, **arrays)
        model.load_pretrained(str(path))
        assert not any(parameter.isnan().any() for parameter in model.parameters())


def gradients_by_name(model: nn.Module, shapes: Shapes) -> dict[str, np.ndarray]:
    """The model's gradients in the released layout, which timm's loader tells by where it puts numbered elements."""
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    assert total < 2**24, "float32 cannot number them"
    numbered, first = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        numbered[name] = np.arange(first, first + size, dtype=np.float32).reshape(shape)
        first += size
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    load_arrays(model, numbered)
    flat = np.full(total, np.nan)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        flat[parameter.detach().numpy().astype(np.int64).reshape(-1)] = gradient.numpy().reshape(-1)
    assert not np.isnan(flat).any()
    return {name: flat[array.astype(np.int64)] for name, array in numbered.items()}


def run(model: nn.Module, shapes: Shapes, modules: dict[str, str]) -> tuple[dict[str, np.ndarray], dict]:
    """The golden arrays of a model, and facts about it by name."""
    weights = {name: make_array(name, shape) for name, shape in shapes.items()}
    model = model.double().eval()
    with recorded_names() as read:
        load_arrays(model, weights)
    assert read == shapes.keys(), read ^ shapes.keys()
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    facts = {"checksum": checksum(weights), "state_dict_checksum": checksum(state), "arrays": shapes}

    golden = {}

    def keep(name: str, output: torch.Tensor) -> None:
        array = output.detach().numpy()
        golden[name] = array.transpose(0, 2, 3, 1)[..., ::EVERY] if array.ndim == 4 else array

    for name, module in modules.items():
        model.get_submodule(module).register_forward_hook(lambda _, __, output, name=name: keep(name, output))
    images = torch.from_numpy(make_images(len(LABELS), *IMAGE_SIZE)).double().permute(0, 3, 1, 2)
    logits = model(images)
    golden["logits"] = logits.detach().numpy()
    golden["pre_logits"] = model.forward_head(model.forward_features(images), pre_logits=True).detach().numpy()
    golden["pre_logits"] = golden["pre_logits"].reshape(len(LABELS), -1)
    functional.cross_entropy(logits, torch.tensor(LABELS)).backward()
    gradients = gradients_by_name(model, shapes)
    golden["gradient"] = np.stack([probe_gradient(name, gradients[name]) for name in sorted(shapes)])
    return golden, facts


# vit_jax's model and overrides, timm's name and arguments. Fewer layers than by the name, as they are all alike.
STATE_DICTS = (
    ("ViT-Ti/16", {"num_layers": 2}, "vit_tiny_patch16_224", {"depth": 2}),
    (
        "ViT-Ti/16",
        {"num_layers": 2, "pool": "gap"},
        "vit_tiny_patch16_224",
        {"depth": 2, "class_token": False, "global_pool": "avg", "fc_norm": False},
    ),
    (
        "ViT-Ti/16",
        {"num_layers": 2, "pool": "map"},
        "vit_tiny_patch16_224",
        {"depth": 2, "class_token": False, "global_pool": "map", "fc_norm": False},
    ),
    ("R+Ti/16", {"num_layers": 2}, "vit_tiny_r_s16_p8_224", {"depth": 2}),
    ("R26+S/32", {"num_layers": 1}, "vit_small_r26_s32_224", {"depth": 1}),
    ("R50+ViT-B/16", {"num_layers": 1}, "vit_base_r50_s16_224", {"depth": 1}),
    ("R50x1", {}, "resnetv2_50x1_bit", {}),
)


def make_state_dicts() -> list[dict]:
    import timm

    rows = []
    for model, overrides, name, arguments in STATE_DICTS:
        for num_classes in (NUM_CLASSES, 0) if model == "ViT-Ti/16" and len(overrides) == 1 else (NUM_CLASSES,):
            with torch.device("meta"):
                module = timm.create_model(name, num_classes=num_classes, **arguments)
            arrays = {key: list(tensor.shape) for key, tensor in module.state_dict().items()}
            rows.append(
                {
                    "library": "timm",
                    "model": model,
                    "overrides": overrides,
                    "num_classes": num_classes,
                    "image_size": [224, 224],
                    "arrays": arrays,
                }
            )
    return rows + make_huggingface_files()


def import_transformers() -> types.ModuleType:
    # It looks whether torchvision is there, and is puzzled by its stubs.
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    import transformers

    return transformers


def run_huggingface() -> tuple[np.ndarray, dict]:
    """Logits of a small model of transformers, which reads a folder; and facts about it by name."""
    transformers = import_transformers()
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=MLP_WIDTH,
        image_size=64,
        patch_size=16,
        num_labels=NUM_CLASSES,
    )
    with tempfile.TemporaryDirectory() as folder:
        transformers.ViTForImageClassification(config).save_pretrained(folder)
        file = pathlib.Path(folder) / "model.safetensors"
        shapes = {name: array.shape for name, array in load_file(file).items()}
        save_file({name: make_torch_array(name, shape) for name, shape in shapes.items()}, file, {"format": "pt"})
        model = transformers.ViTForImageClassification.from_pretrained(folder).double().eval()
        written = json.loads((pathlib.Path(folder) / "config.json").read_text())
    images = torch.from_numpy(make_images(2, 64, 64)).double().permute(0, 3, 1, 2)
    with torch.no_grad():
        return model(images).logits.numpy(), {"config": written, "arrays": shapes}


def make_huggingface_files() -> list[dict]:
    """transformers' files, with the names of releases before 5, not those in memory."""
    transformers = import_transformers()
    config = transformers.ViTConfig(
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=224,
        patch_size=16,
        num_labels=NUM_CLASSES,
    )
    rows = []
    for num_classes, overrides, model in (
        (NUM_CLASSES, {}, transformers.ViTForImageClassification(config)),
        (0, {}, transformers.ViTModel(config, add_pooling_layer=False)),
        (0, {"pre_logits": True}, transformers.ViTModel(config)),
    ):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            file = load_file(pathlib.Path(folder) / "model.safetensors")
            arrays = {name: array.shape for name, array in file.items()}
        rows.append(
            {
                "library": "huggingface",
                "model": "ViT-Ti/16",
                "overrides": {"num_layers": 2, **overrides},
                "num_classes": num_classes,
                "image_size": [224, 224],
                "arrays": arrays,
            }
        )
    return rows


def main() -> None:
    """Writes the files."""
    torch.set_num_threads(1)
    import_timm()
    arrays: dict[str, np.ndarray] = {}
    models = {}
    for name, (make, shapes, modules) in make_models().items():
        golden, facts = run(make(), shapes, modules)
        arrays |= {f"{name}/{key}": array.astype(np.float32) for key, array in golden.items()}
        models[name] = facts
        print(f"{name}: logits {np.round(golden['logits'], 3).tolist()}")
    rows = ",\n".join(json.dumps(row) for row in make_state_dicts())
    logits, huggingface = run_huggingface()
    arrays["huggingface/logits"] = logits.astype(np.float32)
    np.savez_compressed(ARRAYS, **arrays)
    by_name = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in models.items())
    NAMES.write_text(
        f'{{"models": {{\n{by_name}\n}},\n"huggingface": {json.dumps(huggingface)},\n"state_dicts": [\n{rows}\n]}}\n'
    )
    print(f"{ARRAYS}: {ARRAYS.stat().st_size:,} bytes, {NAMES}: {NAMES.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
