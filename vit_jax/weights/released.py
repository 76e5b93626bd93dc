"""The released checkpoints, by name.

A name is `<family>_<model>_<pre-training data>[_<fine-tuning data>_<image size>]`, all in lower case: "vit_b16_i21k",
"augreg_r50l32_i21k_in1k_384". The parts:

family   vit      the ViT paper (arXiv 2010.11929)
         augreg   "How to train your ViT?" (arXiv 2106.10270): the recommended pre-training run of each model, and
                  some that others use; more than 50,000 lie beside them, as gs://vit_models/augreg/index.csv lists
         sam      ImageNet alone, with sharpness-aware minimisation (arXiv 2106.01548)
         gsam     ImageNet alone, with surrogate-gap minimisation (arXiv 2203.08065)
         plain    "Better plain ViT baselines" (arXiv 2205.01580); ends in the number of epochs
         bit_s    BiT (arXiv 1912.11370) pre-trained on ImageNet
         bit_m    BiT pre-trained on ImageNet-21k; the family says it, so the name does not repeat the data
model    size and patch size (b16), ResNet in front for hybrids (r50b16, rti16), depth and width for BiT (r50x1)
data     i21k     ImageNet-21k
         in1k     ImageNet (ILSVRC-2012)

A file that is not listed, such as the BiT-M models fine-tuned on VTAB-1k (gs://bit_models/vtab/), is fetched by its
address.
"""

import dataclasses
import fnmatch
from collections.abc import Iterator
from typing import Any

from vit_jax.errors import unknown_name
from vit_jax.weights.preprocessing import Preprocessing

I21K, IN1K = "imagenet21k", "imagenet2012"
NUM_CLASSES = {I21K: 21_843, IN1K: 1_000}

_SHORT = {I21K: "i21k", IN1K: "in1k"}
_VIT_README = "README of google-research/vision_transformer"
_BIT_README = "README of google-research/big_transfer"


@dataclasses.dataclass(frozen=True)
class ReleasedCheckpoint:
    """A file of weights, and what must be known to use it.

    Attributes:
      name: see the top of this module.
      url: where it lies, gs://bucket/key.
      model: name for `create_model`.
      pretraining_data: "imagenet21k" or "imagenet2012".
      image_size: side of the square images that position embeddings and head were last trained with.
      num_classes: width of the head in the file.
      preprocessing: from an image to the model's input.
      model_overrides: attributes for `create_model`.
      finetuning_data: what it was trained on after that, or None.
      published_accuracy: percent right, by the data set whose test (or validation) images they are. It is that of the
        file itself on the data its head is for; on other data it was measured after fine-tuning on them.
      accuracy_source: who says so.
      sha256: digest of the file; None where it is not known.
      class_names: the data set whose class names the logits bear; None where the head says nothing.
      probabilities: what makes probabilities of the logits, "softmax" or "sigmoid"; None where it is not known.
      format: how arrays are named and laid out: "vit" and "bit" as the papers' first releases, "big_vision" as that
        code base writes them.
      note: anything else.
    """

    name: str
    url: str
    model: str
    pretraining_data: str
    image_size: int
    num_classes: int
    preprocessing: Preprocessing
    model_overrides: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    finetuning_data: str | None = None
    published_accuracy: dict[str, float] | None = dataclasses.field(default=None, hash=False)
    accuracy_source: str | None = None
    sha256: str | None = None
    class_names: str | None = None
    probabilities: str | None = None
    format: str = "vit"
    note: str = ""


def list_checkpoints(pattern: str = "*") -> list[str]:
    """Names of the checkpoints that match a shell-style pattern, such as `"augreg_*_384"`."""
    return [name for name in _CHECKPOINTS if fnmatch.fnmatchcase(name, pattern)]


def get_checkpoint(name: str) -> ReleasedCheckpoint:
    """The checkpoint of that name.

    Raises:
      UserError: there is none; says which has the nearest name.
    """
    if name not in _CHECKPOINTS:
        raise unknown_name("released checkpoint", name, _CHECKPOINTS)
    return _CHECKPOINTS[name]


def _released(
    name: str, url: str, model: str, pretraining_data: str, image_size: int, *, finetuning_data: str | None = None,
    **others: Any,
) -> ReleasedCheckpoint:  # fmt: skip
    """A checkpoint whose head is for the data it was last trained on, unless told otherwise."""
    data = finetuning_data or pretraining_data
    # Values in [-1, 1], the whole image resized to a square: what the released code of ViT and BiT evaluates with.
    preprocessing = Preprocessing(image_size=(image_size, image_size))
    return ReleasedCheckpoint(
        **{
            "name": name,
            "url": url,
            "model": model,
            "pretraining_data": pretraining_data,
            "finetuning_data": finetuning_data,
            "image_size": image_size,
            "num_classes": NUM_CLASSES[data],
            "class_names": data,
            "preprocessing": preprocessing,
            **others,
        }
    )


def _vit() -> Iterator[ReleasedCheckpoint]:
    # Model: CIFAR-10, CIFAR-100 and ImageNet after fine-tuning, and who says so.
    fine_tuned = f"{_VIT_README}: after fine-tuning without dropout"
    table_5 = "ViT paper, table 5: after fine-tuning"
    for short, model, results, source in (
        ("b16", "ViT-B/16", (99.02, 92.06, 84.53), fine_tuned),
        ("b32", "ViT-B/32", (98.88, 92.31, 81.66), fine_tuned),
        ("l16", "ViT-L/16", (99.13, 92.91, 84.47), fine_tuned),
        ("l32", "ViT-L/32", (99.06, 93.29, 81.89), fine_tuned),
        ("h14", "ViT-H/14", (99.27, 93.82, 85.13), table_5),
        ("r50b16", "R50+ViT-B/16", (98.72, 90.88, 83.72), fine_tuned),
        ("r50l32", "R50+ViT-L/32", None, None),
    ):
        yield _released(
            f"vit_{short}_i21k",
            f"gs://vit_models/imagenet21k/{model.replace('/', '_')}.npz",
            model,
            I21K,
            224,
            model_overrides={"pre_logits": True},
            published_accuracy=dict(zip(("cifar10", "cifar100", IN1K), results, strict=True)) if results else None,
            accuracy_source=source,
            class_names=None,
            note="The head is zero on purpose: for fine-tuning and representations, not for classifying.",
        )
    table_5 = "ViT paper, table 5: of models trained like this one"
    for short, model, size, accuracy, source in (
        ("b16", "ViT-B/16", 384, 83.97, table_5),
        ("b32", "ViT-B/32", 384, 81.28, table_5),
        ("l16", "ViT-L/16", 384, 85.15, table_5),
        ("l32", "ViT-L/32", 384, 80.99, table_5),
        ("r50b16", "R50+ViT-B/16", 384, 85.08, "google-research/vision_transformer, issue 39"),
        ("b16", "ViT-B/16", 224, 81.2, _VIT_README),
        ("l16", "ViT-L/16", 224, 82.7, _VIT_README),
    ):
        suffix = "-224" if size == 224 else ""
        yield _released(
            f"vit_{short}_i21k_in1k_{size}",
            f"gs://vit_models/imagenet21k+imagenet2012/{model.replace('/', '_')}{suffix}.npz",
            model,
            I21K,
            size,
            finetuning_data=IN1K,
            published_accuracy={IN1K: accuracy},
            accuracy_source=source,
        )


# Short name: model and the pre-training run that did best.
_AUGREG_RECOMMENDED = {
    "ti16": ("ViT-Ti/16", "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"),
    "s32": ("ViT-S/32", "S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0"),
    "s16": ("ViT-S/16", "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0"),
    "b32": ("ViT-B/32", "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0"),
    "b16": ("ViT-B/16", "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"),
    "b8": ("ViT-B/8", "B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0"),
    "l16": ("ViT-L/16", "L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0"),
    "rti16": ("R+Ti/16", "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"),
    "r26s32": ("R26+S/32", "R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0"),
    "r50l32": ("R50+L/32", "R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1"),
}
# Short name: learning rate of the fine-tuning at 384 that the README recommends, and its ImageNet accuracy.
_AUGREG_384 = {
    "ti16": ("0.03", 78.22),
    "s32": ("0.01", 79.58),
    "s16": ("0.03", 83.73),
    "b32": ("0.01", 83.59),
    "b16": ("0.03", 85.49),
    "l16": ("0.01", 85.59),
    "rti16": ("0.03", 75.40),
    "r26s32": ("0.01", 83.85),
    "r50l32": ("0.01", 85.99),
}
# Short name: pre-training run and learning rate of the fine-tuning at 224 that timm has chosen.
_AUGREG_224 = {
    "ti16": ("Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", "0.03"),
    "s32": ("S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0", "0.03"),
    "s16": ("S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0", "0.03"),
    "b32": ("B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0", "0.03"),
    "b16": ("B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0", "0.01"),
    "b8": ("B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0", "0.01"),
    "l16": ("L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1", "0.01"),
    "rti16": ("R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", "0.03"),
    "r26s32": ("R26_S_32-i21k-300ep-lr_0.001-aug_light0-wd_0.03-do_0.1-sd_0.1", "0.03"),
    "r50l32": ("R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1", "0.01"),
}
# Short name: pre-training run on ImageNet alone that timm has chosen; continued at 224 and 384 with learning rate 0.01.
_AUGREG_IN1K = {
    "s16": "S_16-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0",
    "b32": "B_32-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.1-sd_0.1",
    "b16": "B_16-i1k-300ep-lr_0.001-aug_strong2-wd_0.1-do_0.1-sd_0.1",
}


def _augreg() -> Iterator[ReleasedCheckpoint]:
    def at(run: str, learning_rate: str | None = None, size: int | None = None) -> str:
        fine_tuning = f"--imagenet2012-steps_20k-lr_{learning_rate}-res_{size}" if learning_rate else ""
        return f"gs://vit_models/augreg/{run}{fine_tuning}.npz"

    models = {short: model for short, (model, _) in _AUGREG_RECOMMENDED.items()}
    for short, (model, run) in _AUGREG_RECOMMENDED.items():
        # Trained with the sigmoid loss: configs/vit_i21k.py of google-research/big_vision.
        yield _released(f"augreg_{short}_i21k", at(run), model, I21K, 224, probabilities="sigmoid")
    for short, (learning_rate, accuracy) in _AUGREG_384.items():
        model, run = _AUGREG_RECOMMENDED[short]
        yield _released(
            f"augreg_{short}_i21k_in1k_384",
            at(run, learning_rate, 384),
            model,
            I21K,
            384,
            finetuning_data=IN1K,
            published_accuracy={IN1K: accuracy},
            accuracy_source=_VIT_README,
        )
    for short, (run, learning_rate) in _AUGREG_224.items():
        same = run == _AUGREG_RECOMMENDED[short][1]
        yield _released(
            f"augreg_{short}_i21k_in1k_224",
            at(run, learning_rate, 224),
            models[short],
            I21K,
            224,
            finetuning_data=IN1K,
            note="" if same else f"Its pre-training is not that of augreg_{short}_i21k, but {run}.",
        )
    for short, run in _AUGREG_IN1K.items():
        for size in (224, 384):
            yield _released(
                f"augreg_{short}_in1k_in1k_{size}",
                at(run, "0.01", size),
                models[short],
                IN1K,
                size,
                finetuning_data=IN1K,
                note="ImageNet alone: trained for 300 epochs, then for 20,000 steps more at this size.",
            )


def _imagenet_alone() -> Iterator[ReleasedCheckpoint]:
    doubtful = "Others report poor accuracy with these files (timm, issue 1302); measure before you rely on them."
    by_family: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "sam": (("S/16", "B/32", "B/16", "L/32", "L/16"), {}),
        "gsam": (("S/32", "S/16", "B/32", "B/16"), {"model_overrides": {"pool": "gap"}, "note": doubtful}),
    }
    for family, (names, others) in by_family.items():
        for name in names:
            url = f"gs://vit_models/{family}/ViT-{name.replace('/', '_')}.npz"
            short = name.replace("/", "").lower()
            yield _released(f"{family}_{short}_in1k", url, f"ViT-{name}", IN1K, 224, **others)
    for epochs, accuracy, source in (
        (90, 76.5, "big_vision, configs/vit_s16_i1k.py"),
        (150, None, None),
        (300, 80.0, "arXiv 2205.01580, abstract"),
    ):
        yield _released(
            f"plain_s16_in1k_{epochs}ep",
            f"gs://big_vision/vit_s16_i1k_{epochs}ep.npz",
            "ViT-S/16",
            IN1K,
            224,
            model_overrides={"pool": "gap", "pre_logits": True, "position_embedding": "sincos_2d"},
            preprocessing=Preprocessing(image_size=(224, 224), resize="crop", crop_fraction=224 / 256),
            published_accuracy=None if accuracy is None else {IN1K: accuracy},
            accuracy_source=source,
            format="big_vision",
        )


def _bit() -> Iterator[ReleasedCheckpoint]:
    # BiT-M after fine-tuning: the medians of the released JAX code for CIFAR, the PyTorch code's result for ImageNet.
    fine_tuned: dict[str, dict[str, float]] = {
        "R50x1": {"cifar10": 97.3, "cifar100": 86.4, IN1K: 80.68},
        "R101x3": {"cifar10": 98.4, "cifar100": 91.2},
        "R152x2": {"cifar10": 98.5, "cifar100": 91.2, IN1K: 85.15},
    }
    models = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")
    for model in models:
        name = f"bit_s_{model.lower()}"
        yield _released(name, f"gs://bit_models/BiT-S-{model}.npz", model, IN1K, 224, format="bit")
    for model in models:
        yield _released(
            f"bit_m_{model.lower()}",
            f"gs://bit_models/BiT-M-{model}.npz",
            model,
            I21K,
            224,
            published_accuracy=fine_tuned.get(model),
            accuracy_source=f"{_BIT_README}: after fine-tuning" if model in fine_tuned else None,
            format="bit",
        )
    for model in models:
        yield _released(
            f"bit_m_{model.lower()}_in1k",
            f"gs://bit_models/BiT-M-{model}-ILSVRC2012.npz",
            model,
            I21K,
            480 if model == "R152x4" else 448,
            finetuning_data=IN1K,
            format="bit",
            note="The release does not tell the image size; this is the one timm evaluates with. Any size works.",
        )


_CHECKPOINTS = {each.name: each for family in (_vit, _augreg, _imagenet_alone, _bit) for each in family()}
