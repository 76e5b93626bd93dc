"""The released checkpoints, by name.

A name is `<family>_<model>_<pre-training data>[_<fine-tuning data>_<image size>]` in lower case: "vit_b16_i21k",
"augreg_r50l32_i21k_in1k_384". The parts:

family   vit      the ViT paper (arXiv 2010.11929)
         augreg   "How to train your ViT?" (arXiv 2106.10270): the recommended pre-training run of each model, and some
                  that others use; gs://vit_models/augreg/index.csv lists 50,000 more
         sam      ImageNet alone, with sharpness-aware minimisation (arXiv 2106.01548)
         gsam     ImageNet alone, with surrogate-gap minimisation (arXiv 2203.08065)
         plain    "Better plain ViT baselines" (arXiv 2205.01580); ends in the number of epochs
         bit_s    BiT (arXiv 1912.11370) pre-trained on ImageNet; the name does not repeat the data
         bit_m    BiT pre-trained on ImageNet-21k; likewise
model    size and patch size (b16), with the ResNet first in hybrids (r50b16, rti16), depth and width of BiT (r50x1)
data     i21k     ImageNet-21k
         in1k     ImageNet (ILSVRC-2012)

Other files, such as the BiT-M models fine-tuned on VTAB-1k (gs://bit_models/vtab/), are loaded by their address.
"""

import dataclasses
import fnmatch
from collections.abc import Iterator
from typing import Any

from vit_jax.errors import unknown_name
from vit_jax.paper.related import AUGREG_IMAGENET, RELEASED_FINE_TUNED
from vit_jax.paper.tables import TABLE_5, TABLE_5_MODELS
from vit_jax.weights.preprocessing import Preprocessing

I21K, IN1K = "imagenet21k", "imagenet2012"
NUM_CLASSES = {I21K: 21_843, IN1K: 1_000}

_VIT_README = "README of google-research/vision_transformer"
_BIT_README = "README of google-research/big_transfer"
_DATA_SETS = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "ImageNet": IN1K}


@dataclasses.dataclass(frozen=True)
class ReleasedCheckpoint:
    """A file of weights, with the facts needed to use it.

    Attributes:
      name: see the top of this module.
      url: address of the file, gs://bucket/key.
      model: name for `create_model`.
      pretraining_data: "imagenet21k" or "imagenet2012".
      image_size: side of the square images of the last training, in pixels.
      num_classes: width of the head.
      preprocessing: from an image to the model's input.
      model_overrides: attributes for `create_model`.
      finetuning_data: data of the training after pre-training, or None.
      published_accuracy: percent correct on test (or validation) images, by the name of the data set: for the file
        itself on the data of its head, and after fine-tuning on other data.
      accuracy_source: where the accuracy is published.
      sha256: digest of the file; None if unknown.
      class_names: data set whose classes the head predicts; None for a head of zeros.
      probabilities: "softmax" or "sigmoid", which turns logits into probabilities; None if unknown.
      note: further remarks.
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
    note: str = ""


def list_checkpoints(pattern: str = "*") -> list[str]:
    """Names of the checkpoints that match a shell-style pattern, such as `"vit*"` or `"augreg_*_384"`."""
    return [name for name in _CHECKPOINTS if fnmatch.fnmatchcase(name, pattern)]


def get_checkpoint(name: str) -> ReleasedCheckpoint:
    """The checkpoint of that name.

    Raises:
      UserError: there is none; the message names the nearest one.
    """
    if name not in _CHECKPOINTS:
        raise unknown_name("released checkpoint", name, _CHECKPOINTS)
    return _CHECKPOINTS[name]


def _released(
    name: str, url: str, model: str, pretraining_data: str, image_size: int, *, finetuning_data: str | None = None,
    **others: Any,
) -> ReleasedCheckpoint:  # fmt: skip
    """Makes a checkpoint whose head is for the data of the last training, unless `others` says otherwise."""
    data = finetuning_data or pretraining_data
    fields: dict[str, Any] = {
        "num_classes": NUM_CLASSES[data],
        "class_names": data,
        # The released code of ViT and BiT evaluates so: values in [-1, 1], the whole image resized to a square.
        "preprocessing": Preprocessing(image_size=(image_size, image_size)),
        **others,
    }
    return ReleasedCheckpoint(name, url, model, pretraining_data, image_size, finetuning_data=finetuning_data, **fields)


def _vit() -> Iterator[ReleasedCheckpoint]:
    table_5 = {
        model: {task: scores[index] for task, scores in TABLE_5["ImageNet-21k"].items()}
        for index, model in enumerate(TABLE_5_MODELS)
    }
    models = {"b16": "ViT-B/16", "b32": "ViT-B/32", "l16": "ViT-L/16", "l32": "ViT-L/32", "h14": "ViT-H/14",
              "r50b16": "R50+ViT-B/16", "r50l32": "R50+ViT-L/32"}  # fmt: skip
    for short, model in models.items():
        in_readme = model in RELEASED_FINE_TUNED[0.0]
        scores: dict[str, Any] = RELEASED_FINE_TUNED[0.0][model] if in_readme else table_5.get(model, {})
        source = f"{_VIT_README}: without dropout" if in_readme else "ViT paper, table 5"
        yield _released(
            f"vit_{short}_i21k",
            f"gs://vit_models/imagenet21k/{model.replace('/', '_')}.npz",
            model,
            I21K,
            224,
            model_overrides={"pre_logits": True},
            published_accuracy={ours: scores[task] for task, ours in _DATA_SETS.items()} if scores else None,
            accuracy_source=f"{source}, after fine-tuning" if scores else None,
            class_names=None,
            note="The head is zero on purpose: for fine-tuning and representations, not for classifying.",
        )
    paper = "ViT paper, table 5: of models trained like this one"
    rows = [(short, 384, table_5[models[short]]["ImageNet"], paper) for short in ("b16", "b32", "l16", "l32")]
    with_dropout = RELEASED_FINE_TUNED[0.1]["R50+ViT-B/16"]["ImageNet"]
    rows += [
        ("r50b16", 384, with_dropout, "google-research/vision_transformer, issue 39"),
        ("b16", 224, 81.2, _VIT_README),
        ("l16", 224, 82.7, _VIT_README),
    ]
    for short, size, accuracy, source in rows:
        name = models[short].replace("/", "_") + ("-224" if size == 224 else "")
        yield _released(
            f"vit_{short}_i21k_in1k_{size}",
            f"gs://vit_models/imagenet21k+imagenet2012/{name}.npz",
            models[short],
            I21K,
            size,
            finetuning_data=IN1K,
            published_accuracy={IN1K: accuracy},
            accuracy_source=source,
        )


# AugReg, by short name. Pre-training runs are augmentation, weight decay, and the rate of dropout and stochastic depth;
# fine-tuning on ImageNet is its learning rate. "best" is the run that the README recommends, and "at 384" its
# fine-tuning there; "at 224" is the run and fine-tuning that timm has chosen.
# fmt: off
_AUGREG = {
    #          model       file        best                      at 384  at 224
    "ti16":   ("ViT-Ti/16", "Ti_16",    ("none", 0.03, 0.0),      0.03, ("none", 0.03, 0.0),    0.03),
    "s32":    ("ViT-S/32",  "S_32",     ("none", 0.1, 0.0),       0.01, ("light1", 0.03, 0.0),  0.03),
    "s16":    ("ViT-S/16",  "S_16",     ("light1", 0.03, 0.0),    0.03, ("light1", 0.03, 0.0),  0.03),
    "b32":    ("ViT-B/32",  "B_32",     ("light1", 0.1, 0.0),     0.01, ("medium1", 0.03, 0.0), 0.03),
    "b16":    ("ViT-B/16",  "B_16",     ("medium1", 0.1, 0.0),    0.03, ("medium1", 0.1, 0.0),  0.01),
    "b8":     ("ViT-B/8",   "B_8",      ("medium2", 0.1, 0.0),    None, ("medium1", 0.1, 0.0),  0.01),
    "l16":    ("ViT-L/16",  "L_16",     ("strong1", 0.1, 0.0),    0.01, ("medium1", 0.1, 0.1),  0.01),
    "rti16":  ("R+Ti/16",   "R_Ti_16",  ("none", 0.03, 0.0),      0.03, ("none", 0.03, 0.0),    0.03),
    "r26s32": ("R26+S/32",  "R26_S_32", ("light1", 0.1, 0.0),     0.01, ("light0", 0.03, 0.1),  0.03),
    "r50l32": ("R50+L/32",  "R50_L_32", ("medium1", 0.1, 0.1),    0.01, ("medium1", 0.1, 0.1),  0.01),
}
# fmt: on
# Pre-training runs on ImageNet alone that timm has chosen; continued at 224 and 384 with learning rate 0.01.
_AUGREG_IN1K = {"s16": ("medium2", 0.1, 0.0), "b32": ("medium2", 0.1, 0.1), "b16": ("strong2", 0.1, 0.1)}


def _augreg() -> Iterator[ReleasedCheckpoint]:
    def run_of(file: str, data: str, run: tuple[str, float, float]) -> str:
        augmentation, decay, drop = run
        return f"{file}-{data}-300ep-lr_0.001-aug_{augmentation}-wd_{decay}-do_{drop}-sd_{drop}"

    def checkpoint(name: str, run: str, *fields: Any, at: tuple[float, int] | None = None, **others: Any) -> Any:
        if at is not None:
            run += f"--imagenet2012-steps_20k-lr_{at[0]}-res_{at[1]}"
            others["finetuning_data"] = IN1K
        return _released(f"augreg_{name}", f"gs://vit_models/augreg/{run}.npz", *fields, **others)

    for short, (model, file, best, rate_384, at_224, rate_224) in _AUGREG.items():
        run, other = run_of(file, "i21k", best), run_of(file, "i21k", at_224)
        # Trained with the sigmoid loss: configs/vit_i21k.py of google-research/big_vision.
        yield checkpoint(f"{short}_i21k", run, model, I21K, 224, probabilities="sigmoid")
        if rate_384 is not None:
            accuracy = {"published_accuracy": {IN1K: AUGREG_IMAGENET[model]}, "accuracy_source": _VIT_README}
            yield checkpoint(f"{short}_i21k_in1k_384", run, model, I21K, 384, at=(rate_384, 384), **accuracy)
        note = "" if run == other else f"Its pre-training is not that of augreg_{short}_i21k, but {other}."
        yield checkpoint(f"{short}_i21k_in1k_224", other, model, I21K, 224, at=(rate_224, 224), note=note)
    note = "ImageNet alone: trained for 300 epochs, then for 20,000 steps more at this size."
    for short, settings in _AUGREG_IN1K.items():
        model, file, *_ = _AUGREG[short]
        for size in (224, 384):
            run = run_of(file, "i1k", settings)
            yield checkpoint(f"{short}_in1k_in1k_{size}", run, model, IN1K, size, at=(0.01, size), note=note)


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
        )


def _bit() -> Iterator[ReleasedCheckpoint]:
    # BiT-M after fine-tuning: medians of the released JAX code for CIFAR, results of the PyTorch code for ImageNet.
    fine_tuned: dict[str, dict[str, float]] = {
        "R50x1": {"cifar10": 97.3, "cifar100": 86.4, IN1K: 80.68},
        "R101x3": {"cifar10": 98.4, "cifar100": 91.2},
        "R152x2": {"cifar10": 98.5, "cifar100": 91.2, IN1K: 85.15},
    }
    models = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")
    for model in models:
        name = f"bit_s_{model.lower()}"
        yield _released(name, f"gs://bit_models/BiT-S-{model}.npz", model, IN1K, 224)
    for model in models:
        yield _released(
            f"bit_m_{model.lower()}",
            f"gs://bit_models/BiT-M-{model}.npz",
            model,
            I21K,
            224,
            published_accuracy=fine_tuned.get(model),
            accuracy_source=f"{_BIT_README}: after fine-tuning" if model in fine_tuned else None,
        )
    for model in models:
        yield _released(
            f"bit_m_{model.lower()}_in1k",
            f"gs://bit_models/BiT-M-{model}-ILSVRC2012.npz",
            model,
            I21K,
            480 if model == "R152x4" else 448,
            finetuning_data=IN1K,
            note="The release does not state the image size; timm evaluates with this one. Any size works.",
        )


_CHECKPOINTS = {each.name: each for family in (_vit, _augreg, _imagenet_alone, _bit) for each in family()}
