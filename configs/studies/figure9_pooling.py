r"""Figure 9: a class token against global average pooling at two learning rates (appendix D.3).

    python -m vit_jax.sweep --config=configs/studies/figure9_pooling.py:scale=small --workdir=sweeps/figure9
    python -m vit_jax.main --config=configs/studies/figure9_pooling.py:scale=paper,pool=gap --dry_run

Needs     scale=small: CIFAR-10 as images (configs/cifar10.py). scale=paper: a web-scale set (configs/vit_jft.py),
          ImageNet for few-shot accuracy, and accelerators
Takes     scale=small: not measured; about 1.8 hours on 2 CPU cores: the model is that of configs/cifar10.py, which was
          measured at 268 to 326 images/s; 9 runs of 1,563 steps x 128 images at 300 are 6,000 s, evaluation and starts
          500 s. scale=paper: 224 exaFLOPs a run
Reaches   scale=paper: curves only; both poolings do equally well, GAP with the lower rate. Not reproduced here.
          scale=small: not run yet
Arguments scale  paper (the default) or small
          pool   cls (the default) or gap
          rate   high (the default): of the class token, 8e-4 (scale=small: 1e-3). low: 3/8 of it, 3e-4 (3.75e-4)
          data   scale=small: folder or zip file; scale=paper: with num_classes, train_images as in configs/vit_jft.py

The figure's legend has the three runs: class token and GAP at 8e-4, GAP at 3e-4. It does not name the model: 8e-4 is
ViT-B's rate on JFT (table 3), and we take B/16. At scale=small, few-shot classifiers are drawn from 2,000 test images
that nothing is trained or reported on.
"""

from ml_collections import ConfigDict

from vit_jax.data.transfer_tasks import gap_learning_rate
from vit_jax.sweep import Sweep, study_pages

MODEL = "ViT-B/16"
STEPS = 1_563
RUNS = (("cls", "high"), ("gap", "high"), ("gap", "low"))
ARGUMENTS = {"pool": "cls", "rate": "high", **study_pages.DATA}


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    study_pages.check_one_of("pool", given.pool, ("cls", "gap"))
    study_pages.check_one_of("rate", given.rate, ("high", "low"))
    if given.scale == "paper":
        config = study_pages.jft(__file__, given, MODEL)
    else:
        config = study_pages.cifar10(__file__, given, steps=STEPS, width=128)
        config.model.mlp_dim = 384
        config.model.num_heads = 2
        study_pages.set_steps(config, STEPS, evaluations=4)
    config.model.pool = None if given.pool == "cls" else given.pool
    if given.rate == "low":
        config.optimizer.learning_rate = gap_learning_rate(config.optimizer.learning_rate)
    return config


def get_sweep(argument: str | None = None) -> Sweep:
    """The three curves of figure 9."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    return Sweep(
        tasks={f"{pool},{rate}": study_pages.task(given, pool=pool, rate=rate) for pool, rate in RUNS},
        metric=study_pages.few_shot_metric(given),
        more_metrics=study_pages.more_metrics(given),
        seeds=study_pages.seeds(given),
        are_alternatives=True,
    )
