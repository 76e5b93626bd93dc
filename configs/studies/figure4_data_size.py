r"""Figure 4: few-shot accuracy by the size of the pre-training set, ViT against ResNet (section 4.3).

    python -m vit_jax.sweep --config=configs/studies/figure4_data_size.py:scale=small --workdir=sweeps/figure4
    python -m vit_jax.main --dry_run \
        --config=configs/studies/figure4_data_size.py:scale=paper,model=ViT-L/16,images=9000000

Needs     scale=small: CIFAR-10 as images (configs/cifar10.py). scale=paper: a web-scale set (configs/vit_jft.py),
          ImageNet for few-shot accuracy, and accelerators
Takes     scale=small: not measured; about 1.9 hours on 2 CPU cores. By rates measured before (2,050 images/s for the
          quickstart's ViT, 300 for that of configs/cifar10.py; 33 GFLOP/s for a BiT ResNet), an image takes about 1.2
          ms (vit, hybrid) or 1.3 ms (bit): 18 times 1,200 steps x 64 images of each 5,100 s; 4 evaluations of 54 runs,
          12,200 images each, 1,080 s; 54 starts 700 s. scale=paper: see docs/studies.md
Reaches   scale=paper: curves only. ViT-B/32 is much worse than R50x1 on 9M images and better on 90M and more; so are
          L/16 and R152x2. Not reproduced here. scale=small: not run yet
Arguments scale   paper (the default) or small
          model   ViT-b/32, ViT-B/32 (the default), ViT-L/32, ViT-L/16, R50x1 or R152x2; at scale=small: vit (the
                  default), hybrid or bit
          images  size of the subset; by default all. The sweep tries 9M, 30M, 90M and all; at scale=small 1,000,
                  2,500, 5,000, 10,000, 25,000 and 50,000
          data    scale=small: folder or zip file; scale=paper: with num_classes, train_images as in configs/vit_jft.py

A subset is a slice of a set in random order. All runs of a model have the same hyper-parameters and the same number of
steps, whatever the size of the subset (the number of steps is our reading). The step with the best accuracy on held-out
images counts (early stopping), and all numbers are those of that step. Table 3 has no row for ViT-b/32 (ViT-B/32 with
half of each width); it has B/32's rate here.

The three models of scale=small have equal FLOPs, 14.2 million for an image (python -m vit_jax.costs.flops counts them):
a ViT of 3 layers and 8x8 patches, a ResNet's root followed by 2 layers, and a BiT ResNet of one unit. Its 2,000
held-out images, from which few-shot classifiers are drawn too, are test images; accuracy is reported on the other
8,000, few-shot accuracy on 2,000 of these.
"""

from ml_collections import ConfigDict

from vit_jax.paper.tables import JFT_IMAGES
from vit_jax.sweep import Sweep, study_pages

PAPER = ("ViT-b/32", "ViT-B/32", "ViT-L/32", "ViT-L/16", "R50x1", "R152x2")
SMALL = {
    "vit": {"name": "ViT-Ti/4", "num_layers": 3, "hidden_dim": 64, "mlp_dim": 84, "num_heads": 2},
    "hybrid": {
        **{"name": "R26+ViT-Ti/32", "resnet": (), "num_layers": 2, "hidden_dim": 64, "mlp_dim": 76, "num_heads": 2}
    },
    "bit": {"name": "R26x1", "stages": (1,)},
}
PAPER_SIZES = (9_000_000, 30_000_000, 90_000_000)  # and all
SMALL_SIZES = (1_000, 2_500, 5_000, 10_000, 25_000, 50_000)
HELD_OUT = 51_200  # images of JFT
STEPS, BATCH, EVALUATIONS = 1_200, 64, 4
EPOCHS = 7
ARGUMENTS = {"model": "", "images": 0, **study_pages.DATA}


def parse(argument: str | None) -> ConfigDict:
    """The arguments."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    given.model = given.model or ("ViT-B/32" if given.scale == "paper" else "vit")
    study_pages.check_one_of("model", given.model, PAPER if given.scale == "paper" else SMALL)
    study_pages.check_slice("images", given.images or 1, total(given))
    return given


def total(given: ConfigDict) -> int:
    """Number of all training images."""
    return (given.train_images or JFT_IMAGES) if given.scale == "paper" else study_pages.CIFAR10_IMAGES


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    given = parse(argument)
    images = given.images or total(given)
    if given.scale == "paper":
        config = study_pages.jft(__file__, given, given.model.replace("-b/", "-B/"), epochs=EPOCHS)
        config.model.name = given.model
        first, config.data.expected_within = HELD_OUT, 0.0
        study_pages.set_images(config, EPOCHS * total(given))
    else:
        config = study_pages.cifar10(__file__, given, steps=STEPS)
        study_pages.set_model(config, **SMALL[given.model])
        config.batch_size = BATCH
        study_pages.set_steps(config, STEPS, evaluations=EVALUATIONS)
        study_pages.with_test(config)
        config.evals.fewshot.test_split = "test[2000:4000]"
        first = 0
    if images < total(given):
        config.data.train_split = f"train[{first}:{first + images}]"
        config.data.expected_train_images = images
    elif given.scale == "paper":
        config.data.expected_within = 0.01
    return config


def get_sweep(argument: str | None = None) -> Sweep:
    """Each model on each size."""
    given = parse(argument)
    models, sizes = (PAPER, PAPER_SIZES) if given.scale == "paper" else (SMALL, SMALL_SIZES)
    sizes = [*(size for size in sizes if size < total(given)), total(given)]
    return Sweep(
        tasks={
            f"{model.replace('/', '_')},{size}": study_pages.task(given, model=model, images=size)
            for model in models
            for size in sizes
        },
        metric=study_pages.few_shot_metric(given),
        more_metrics=("test/accuracy",) if given.scale == "small" else (),
        early_stopping="accuracy",
        seeds=study_pages.seeds(given),
        are_alternatives=True,
    )
