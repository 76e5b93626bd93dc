r"""Figure 5: accuracy after transfer by the compute of pre-training, ViTs, ResNets and hybrids (table 6's runs).

    python -m vit_jax.sweep --config=configs/studies/figure5_compute.py:scale=small --workdir=sweeps/figure5
    python -m vit_jax.main --dry_run \
        --config=configs/studies/figure5_compute.py:scale=paper,model=R50+ViT-L/16,epochs=14

Needs     scale=small: upstream and downstream, five classes of CIFAR-10 each (docs/studies.md has the two commands).
          scale=paper: a web-scale set (configs/vit_jft.py), the five data sets, and accelerators
Takes     scale=small: not measured; about 1.8 hours on 2 CPU cores. By rates measured before an image takes 1.7 ms
          (vit_s), 3.0 (vit_m), 2.7 (bit_s), 4.1 (bit_m), 1.7 (hybrid_s) and 3.0 (hybrid_m): 3 seeds of 586 steps x 128
          images 3,650 s; 36 runs of fine-tuning 1,700 s; 54 starts, and evaluation, 1,000 s. scale=paper: pre-training
          is 15,885 exaFLOPs
Reaches   scale=paper: table 6 (docs/configs.md has its pre-training runs). Not reproduced here. scale=small: not run
          yet
Arguments scale     paper (the default) or small
          model     of table 6, ViT-B/32 by default; at scale=small: vit_s (the default), vit_m, bit_s, bit_m, hybrid_s,
                    hybrid_m
          epochs    of table 6, 7 (the default) or 14; only for scale=paper
          part      pretrain (the default) or transfer; the sweep gives it the weights
          dataset, stage, rule                of part=transfer, as in configs/transfer.py; small: stage alone
          data, num_classes, train_images     of a web-scale set, as in configs/vit_jft.py
          upstream, downstream                data sets of scale=small

The mean over ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers-102 is what the figure has on its left. ResNets and
hybrids are fine-tuned by table 4 and by BiT-HyperRule, and the better counts. python -m vit_jax.report counts the
exaFLOPs.
"""

from ml_collections import ConfigDict

from vit_jax.paper.tables import TABLE_6
from vit_jax.sweep import Sweep, study_pages

DATASETS = ("imagenet2012", "cifar10", "cifar100", "pets", "flowers")
STEPS = 586  # three epochs
ARGUMENTS = {"model": "", "epochs": 7, **study_pages.TRANSFER, **study_pages.DATA, **study_pages.UPSTREAM}


def parse(argument: str | None) -> ConfigDict:
    """The arguments."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    models = [row.model for row in TABLE_6] if given.scale == "paper" else list(study_pages.SMALL_MODELS)
    given.model = given.model or models[0]
    study_pages.check_one_of("model", given.model, models)
    if given.scale == "paper":
        study_pages.check_one_of("epochs", given.epochs, [row.epochs for row in TABLE_6 if row.model == given.model])
    return given


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    given = parse(argument)
    if given.scale == "paper":
        if given.part == "transfer":
            return study_pages.table_4(__file__, given, given.model)
        return study_pages.jft(__file__, given, given.model, epochs=given.epochs)
    if given.part == "transfer":
        return study_pages.other_classes(__file__, given)
    return study_pages.five_classes(__file__, given, steps=STEPS)


def get_sweep(argument: str | None = None) -> list[Sweep]:
    """Pre-trains the models, and transfers each."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    if given.scale == "paper":
        cells = {
            f"{row.model.replace('/', '_')},{row.epochs}": {"model": row.model, "epochs": row.epochs} for row in TABLE_6
        }
    else:
        cells = {model: {"model": model} for model in study_pages.SMALL_MODELS}
    before = Sweep(
        tasks={name: study_pages.task(given, **cell) for name, cell in cells.items()},
        seeds=study_pages.seeds(given),
        are_alternatives=True,
    )
    if given.scale == "small":
        return [before, study_pages.other_classes_sweep(given, cells, rates=(0.03,))]
    return [before, *study_pages.table_4_sweeps(__file__, given, cells, DATASETS)]
