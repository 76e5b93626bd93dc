r"""Figure 13: axial attention against ViT and ResNet, accuracy by FLOPs and by time (appendix D.6).

    python -m vit_jax.sweep --config=configs/studies/figure13_axial.py:scale=small --workdir=sweeps/figure13
    python -m vit_jax.main --config=configs/studies/figure13_axial.py:scale=paper,model=Axial-ViT-B/32 --dry_run

Needs     scale=small: CIFAR-10 as images (configs/cifar10.py). scale=paper: a web-scale set (configs/vit_jft.py),
          ImageNet for few-shot accuracy, and accelerators
Takes     scale=small: not measured; about 1.9 hours on 2 CPU cores. By rates measured before, an image takes 0.5 ms
          (ViT/8), 1.7 ms (ViT/4) and 2.7 ms (BiT); axial models were not measured: twice a ViT, 1 and 3.4 ms, and 6 ms
          for the AxialResNet are guesses. All six: 15.3 ms; 3 seeds of 977 steps x 128 images 5,700 s,
          evaluation and starts of 18 runs 900 s. scale=paper: see docs/studies.md
Reaches   scale=paper: a figure only. Axial-ViT-B is better than its ViT-B, and costs more FLOPs; AxialResNet is slow.
          Not reproduced here. scale=small: not run yet
Arguments scale  paper (the default) or small
          model  Axial-ViT-B/32 (the default), Axial-ViT-B/16, AxialResNet-50, ViT-B/32, ViT-B/16 or R50x1; at
                 scale=small: axial_8 (the default), axial_4, axial_resnet, vit_8, vit_4 or bit
          data   scale=small: folder or zip file; scale=paper: with num_classes, train_images as in configs/vit_jft.py

Each axial model has the recipe of the model that it replaces: ViT-B's or R50x1's row of table 3 (ours; the paper says
only that all are pre-trained on JFT). At scale=small the models have 4 layers of width 64, and the ResNets one unit in
each of two stages. Few-shot classifiers are drawn from 2,000 test images that nothing is trained or reported on.
"""

from ml_collections import ConfigDict

from vit_jax.sweep import Sweep, study_pages

PAPER = {  # the model whose recipe it has
    "Axial-ViT-B/32": "ViT-B/32",
    "Axial-ViT-B/16": "ViT-B/16",
    "AxialResNet-50": "R50x1",
    "ViT-B/32": "ViT-B/32",
    "ViT-B/16": "ViT-B/16",
    "R50x1": "R50x1",
}
SMALL = {
    "axial_8": "Axial-ViT-Ti/8",
    "axial_4": "Axial-ViT-Ti/4",
    "axial_resnet": "AxialResNet-26",
    "vit_8": "ViT-Ti/8",
    "vit_4": "ViT-Ti/4",
    "bit": "R26x1",
}
STEPS = 977
ARGUMENTS = {"model": "", **study_pages.DATA}


def parse(argument: str | None) -> ConfigDict:
    """The arguments."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    models = PAPER if given.scale == "paper" else SMALL
    given.model = given.model or next(iter(models))
    study_pages.check_one_of("model", given.model, models)
    return given


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    given = parse(argument)
    if given.scale == "paper":
        config = study_pages.jft(__file__, given, PAPER[given.model])
        config.model.name = given.model
    else:
        config = study_pages.cifar10(__file__, given, steps=STEPS)
        shape = {name: config.model[name] for name in ("num_layers", "hidden_dim", "mlp_dim", "num_heads")}
        study_pages.set_model(
            config, name=SMALL[given.model], **({"stages": (1, 1)} if "R" in SMALL[given.model] else shape)
        )
    if "Axial" in config.model.name:
        config.model.pre_logits = None  # axial models have no hidden layer in the head
    if "Res" in config.model.name:
        config.model.dropout_rate = None
    return config


def get_sweep(argument: str | None = None) -> Sweep:
    """The models of figure 13."""
    given = parse(argument)
    models = PAPER if given.scale == "paper" else SMALL
    return Sweep(
        tasks={model.replace("/", "_"): study_pages.task(given, model=model) for model in models},
        metric=study_pages.few_shot_metric(given),
        more_metrics=study_pages.more_metrics(given),
        seeds=study_pages.seeds(given),
        are_alternatives=True,
    )
