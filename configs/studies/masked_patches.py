r"""Masked patch prediction against other pre-training and none, by target, corruption rate and labels (appendix B.1.2).

    python -m vit_jax.sweep --config=configs/studies/masked_patches.py:scale=small --workdir=sweeps/masked
    python -m vit_jax.main --config=configs/studies/masked_patches.py:scale=paper,method=pixels --dry_run

Needs     scale=small: CIFAR-10 as images (configs/cifar10.py), and upstream and downstream, five of its classes each
          (docs/studies.md has the two commands). scale=paper: a web-scale set (configs/vit_jft.py), ImageNet, and
          accelerators
Takes     scale=small: not measured; about 1.9 hours on 2 CPU cores. The model is at 19 MFLOP an image; at the 80
          GFLOP/s of configs/cifar10.py an image takes 0.7 ms, with the head for patches 0.8 ms and for
          target=downsized, a guess, 3 ms. 3 seeds of 1,563 steps x 128 images of the five pre-trainings, 6 ms together,
          3,600 s; fine-tuning 18 times 100,000 + 50,000 + 20,000 images at 0.7 ms 2,150 s; evaluation and 69 starts
          1,000 s. scale=paper: see docs/studies.md
Reaches   scale=paper: 79.9 % on ImageNet with mean_colour, 2 % more than from scratch and 4 % less than after
          supervised pre-training; slightly less with pixels and with 15 %. Not reproduced here. scale=small: not run
          yet
Arguments scale    paper (the default) or small
          method   mean_colour (the default), downsized, pixels: the target, with half of the patches corrupted.
                   mean_colour_15: 15 % of them. supervised: pre-training with labels, on other classes at scale=small.
                   scratch. At scale=paper also mean_colour_100k, a tenth of the steps, and mean_colour_imagenet
          part     pretrain (the default) or transfer; the sweep gives it the weights
          labels   percent of the training images whose labels are used for fine-tuning: 1, 10 or 100 (the default);
                   at scale=paper only 100
          dataset, stage, rule                of part=transfer, as in configs/transfer.py
          data     scale=small: folder or zip file; scale=paper: with num_classes, train_images as in configs/vit_jft.py
          upstream, downstream                data sets of scale=small

At scale=paper, "scratch" is ViT-B/16 trained on ImageNet (configs/vit_i1k.py) and fine-tuned at 384 like the others:
77.91 % in table 5. "supervised" is its pre-training on JFT.

At scale=small the ViT has 16 patches of 8x8 pixels, 4 layers of width 128 and a class token. Patches are masked in all
50,000 training images of CIFAR-10, without labels. Supervised pre-training has 25,000 images of five classes with
labels, and as many steps. Fine-tuning is on 250, 2,500 or 25,000 images of the other five classes, for 20,000, 50,000
or 100,000 images with repetitions. It has one recipe for all methods, Adam at 1e-3 with weight decay 0.1 and cosine
decay (ours), so that results differ by the initial weights only. Few-shot accuracy on the other five classes is
measured on the mean of all tokens ("encoded") too, because masked patch prediction does not train the output of the
class token.
"""

from typing import Any

from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.sweep import Sweep, study_pages

MODEL = "ViT-B/16"
SMALL_MODEL = {"name": "ViT-Ti/8", "num_layers": 4, "hidden_dim": 128, "mlp_dim": 256, "num_heads": 4}
MASKED: dict[str, dict[str, Any]] = {
    "mean_colour": {"target": "mean_colour"},
    "downsized": {"target": "downsized"},
    "pixels": {"target": "pixels"},
    "mean_colour_15": {"target": "mean_colour", "corruption_rate": 0.15},
}
ONLY_PAPER = ("mean_colour_100k", "mean_colour_imagenet")
STEPS = 1_563  # of 128 images: 4 epochs of 50,000, 8 of 25,000
IMAGES = {1: 250, 10: 2_500, 100: 25_000}  # by percent of the labels of downstream
FINE_TUNING_STEPS = {1: 313, 10: 782, 100: 1_563}  # of 64 images
ARGUMENTS = {
    **{"method": "mean_colour", "labels": 100},
    **{**study_pages.TRANSFER, "dataset": "imagenet2012"},
    **study_pages.DATA,
    **study_pages.UPSTREAM,
}


def methods(scale: str) -> list[str]:
    """The methods that a scale compares."""
    return [*MASKED, *(ONLY_PAPER if scale == "paper" else ()), "supervised", "scratch"]


def parse(argument: str | None) -> ConfigDict:
    """The arguments."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    study_pages.check_one_of("method", given.method, methods(given.scale))
    study_pages.check_one_of("labels", given.labels, IMAGES if given.scale == "small" else (100,))
    if (given.scale, given.part, given.method) == ("small", "pretrain", "scratch"):
        raise UserError("method=scratch has no pre-training at scale=small. Add part=transfer, which trains it.")
    return given


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    given = parse(argument)
    if given.scale == "small":
        return small_fine_tuning(given) if given.part == "transfer" else small_pre_training(given)
    if given.part == "transfer":
        return study_pages.table_4(__file__, given, MODEL, dropout=0.1 if given.method == "scratch" else 0.0)
    if given.method == "supervised":
        return study_pages.jft(__file__, given, MODEL)
    if given.method == "scratch":
        config = study_pages.page(__file__, "vit_i1k", model=MODEL)
    else:
        masked = MASKED.get(given.method, MASKED["mean_colour"])
        data = {"data": given.data, "train_images": given.train_images}
        if given.method == "mean_colour_imagenet":
            data = {"data": study_pages.IMAGENET, "train_images": 1_281_167}
        config = study_pages.page(__file__, "masked_patches", model=MODEL, **data, **masked)
        if given.method == "mean_colour_100k":
            config.steps //= 10
        config.data.eval_split = "validation" if given.method == "mean_colour_imagenet" else "train[:51200]"
        if given.method != "mean_colour_imagenet":
            config.data.train_split = "train[51200:]"
    config.checkpoint.keep = 1
    config.checkpoint.keep_best = False
    return config


def small_pre_training(given: ConfigDict) -> ConfigDict:
    """Pre-training at scale=small."""
    if given.method == "supervised":
        config = study_pages.five_classes(__file__, given, steps=STEPS, model="vit_s")
    else:
        config = study_pages.masked_cifar10(__file__, given, steps=STEPS, **MASKED[given.method])
    study_pages.set_model(config, **SMALL_MODEL)
    study_pages.few_shot(config, given.downstream, pool="train", test="test", shots=(5, 10, 25))
    config.evals.fewshot.representations = ("pre_logits", "encoded")
    return config


def small_fine_tuning(given: ConfigDict) -> ConfigDict:
    """Fine-tuning, or training from scratch, at scale=small."""
    config = study_pages.page(__file__, "small_transfer")
    study_pages.set_model(config, **SMALL_MODEL)
    config.data.dataset = given.downstream
    config.data.how_to_prepare = study_pages.PREPARE_HALVES
    images = IMAGES[given.labels]
    config.data.train_split = f"train[:{images}]" if given.labels < 100 else "train"
    config.data.expected_train_images = images
    study_pages.set_steps(config, FINE_TUNING_STEPS[given.labels])
    return config


def get_sweep(argument: str | None = None) -> list[Sweep]:
    """Pre-trains by each method, and fine-tunes."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    is_small = given.scale == "small"
    pre_trained = [name for name in methods(given.scale) if not (is_small and name == "scratch")]
    before = Sweep(
        tasks={name: study_pages.task(given, method=name) for name in pre_trained},
        metric="loss",
        seeds=study_pages.seeds(given),
        are_alternatives=True,
    )
    if not is_small:
        cells = {name: {"method": name, "model": MODEL} for name in pre_trained}
        return [before, *study_pages.table_4_sweeps(__file__, given, cells, ("imagenet2012",))]
    cells = {f"{name},{labels}": (name, labels) for name in methods("small") for labels in IMAGES}
    after = Sweep(
        tasks={
            name: study_pages.task(given, part="transfer", method=method, labels=labels)
            for name, (method, labels) in cells.items()
        },
        weights={name: method for name, (method, _) in cells.items() if method != "scratch"},
        are_alternatives=True,
    )
    return [before, after]
