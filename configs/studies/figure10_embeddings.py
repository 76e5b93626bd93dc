r"""Figure 10: position embeddings learned with other hyper-parameters (appendix D.4).

    python -m vit_jax.sweep --config=configs/studies/figure10_embeddings.py:scale=small --workdir=sweeps/figure10
    python -m vit_jax.main --config=configs/studies/figure10_embeddings.py:scale=paper,run=long --dry_run

Needs     scale=small: CIFAR-10 as images (configs/cifar10.py). scale=paper: a web-scale set (configs/vit_jft.py),
          ImageNet for few-shot accuracy, and accelerators
Takes     scale=small: not measured; about 1.3 hours on 2 CPU cores: 590 images/s (1.7 ms) as in table 8's study, 9 runs
          of 4 or 8 epochs, 50,000 images each: 4,100 s, evaluation and starts 400 s. scale=paper: 783 + 783 + 1,567
          exaFLOPs
Reaches   pictures: the closer two patches, the more alike their embeddings, with rows and columns visible; how much
          depends on the hyper-parameters. Not reproduced here. scale=small: not run yet
Arguments scale  paper (the default) or small
          run    low: half the learning rate and a tenth of the weight decay. base (the default): the recipe, for half
                 of the longest run. long: the recipe for the whole length
          data   scale=small: folder or zip file; scale=paper: with num_classes, train_images as in configs/vit_jft.py

The figure's titles name ViT-L/16 with learning rate 2e-4, weight decay 0.01 and 7 epochs; 4e-4, 0.1 and 7; 4e-4, 0.1
and 14. To be checked against the paper: the first of these. The second and third are rows of table 3. A picture of each
run: python -m vit_jax.analysis positions --weights=<workdir of the run>.
"""

from ml_collections import ConfigDict

from vit_jax.sweep import Sweep, study_pages

MODEL = "ViT-L/16"
# Epochs at scale=paper and steps of 128 images at scale=small; factors of the learning rate and of the weight decay.
RUNS = {"low": (7.0, 1_563, 0.5, 0.1), "base": (7.0, 1_563, 1.0, 1.0), "long": (14.0, 3_125, 1.0, 1.0)}
ARGUMENTS = {"run": "base", **study_pages.DATA}


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    study_pages.check_one_of("run", given.run, RUNS)
    epochs, steps, rate, decay = RUNS[given.run]
    if given.scale == "paper":
        config = study_pages.jft(__file__, given, MODEL, epochs=epochs)
    else:
        config = study_pages.cifar10(__file__, given, steps=steps)
    config.optimizer.learning_rate = float(f"{rate * config.optimizer.learning_rate:.6g}")
    config.optimizer.weight_decay = float(f"{decay * config.optimizer.weight_decay:.6g}")
    return config


def get_sweep(argument: str | None = None) -> Sweep:
    """The three pictures of figure 10."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    return Sweep(
        tasks={run: study_pages.task(given, run=run) for run in RUNS},
        metric=study_pages.few_shot_metric(given),
        more_metrics=study_pages.more_metrics(given),
        seeds=study_pages.seeds(given),
        are_alternatives=True,
    )
