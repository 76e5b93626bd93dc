r"""Table 7: ResNets pre-trained with Adam and with SGD, each with its own recipe, then fine-tuned (appendix D.1).

    python -m vit_jax.sweep --config=configs/studies/table7_optimizers.py:scale=small --workdir=sweeps/table7
    python -m vit_jax.main --dry_run \
        --config=configs/studies/table7_optimizers.py:scale=paper,model=R152x2,optimizer=sgd

Needs     scale=small: upstream and downstream, five classes of CIFAR-10 each (docs/studies.md has the two commands).
          scale=paper: a web-scale set (configs/bit_jft.py), table 7's five data sets, and accelerators
Takes     scale=small: not measured; about 1.8 hours on 2 CPU cores, by rates measured before: a BiT ResNet computes
          about 33 GFLOP/s there, so an image takes 2.7 ms (bit_s) or 4.1 ms (bit_m). 12 runs of 977 steps x 128
          images: 5,100 s; 28 of fine-tuning, 150 steps x 64 images, and their tests: 900 s; 40 starts: 500 s.
          scale=paper: pre-training is 1,270 exaFLOPs
Reaches   scale=paper: the paper's mean over ImageNet, CIFAR-10, CIFAR-100, Pets and Flowers-102 is, with Adam and with
          SGD, 89.33 and 88.79 % (R50x1), and 94.01 and 93.72 % (R152x2). Not reproduced here. scale=small: not run yet
Arguments scale      paper (the default) or small
          model      R50x1 or R152x2; at scale=small: bit_s (one unit in each of two stages) or bit_m (of three stages)
          optimizer  adam or sgd
          part       pretrain (the default) or transfer; the sweep gives it the weights
          dataset, stage, rule                of part=transfer, as in configs/transfer.py; small: stage alone
          data, num_classes, train_images     of a web-scale set, as in configs/bit_jft.py
          upstream, downstream                data sets of scale=small

The two recipes
- Adam: table 3, with decoupled weight decay 0.1. At scale=small with its learning rate 1e-3 and 100 steps of warm-up.
- SGD: "the hyperparameters recommended by Kolesnikov et al. (2020)", that is BiT's: momentum 0.9, learning rate 0.03
  for 256 images and in proportion to the batch, divided by 10 after 10, 23, 30 and 37 fortieths of the run, weight
  decay 1e-4 as L2, 5,000 steps of warm-up (1 % of the run at scale=small). No clipping.
Fine-tuning is the same for both.
"""

from ml_collections import ConfigDict

from vit_jax.paper.tables import TABLE_7, TABLE_7_AVERAGE
from vit_jax.sweep import Sweep, study_pages

PAPER = {"R50x1": 7.0, "R152x2": 7.0}  # epochs of table 6's runs that table 7 repeats
SMALL = ("bit_s", "bit_m")
STEPS = 977  # five epochs
OPTIMIZERS = ("adam", "sgd")
BIT_RATE = 0.03 / 256  # per image of a batch (BiT, section 3.3)
BIT_DROPS = (10 / 40, 23 / 40, 30 / 40, 37 / 40)
DATASETS = {
    "ImageNet": "imagenet2012",
    "CIFAR-10": "cifar10",
    "CIFAR-100": "cifar100",
    "Pets": "pets",
    "Flowers-102": "flowers",
}
ARGUMENTS = {"model": "", "optimizer": "adam", **study_pages.TRANSFER, **study_pages.DATA, **study_pages.UPSTREAM}


def parse(argument: str | None) -> ConfigDict:
    """The arguments."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    models = PAPER if given.scale == "paper" else SMALL
    given.model = given.model or next(iter(models))
    study_pages.check_one_of("model", given.model, models)
    study_pages.check_one_of("optimizer", given.optimizer, OPTIMIZERS)
    return given


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    given = parse(argument)
    if given.scale == "paper":
        if given.part == "transfer":
            return study_pages.table_4(__file__, given, given.model)
        config = study_pages.jft(__file__, given, given.model, epochs=PAPER[given.model])
        warmup_steps = 5_000
    else:
        if given.part == "transfer":
            return study_pages.other_classes(__file__, given)
        config = study_pages.five_classes(__file__, given, steps=STEPS)
        warmup_steps = 10
    if given.optimizer == "sgd":
        config.optimizer.name = "sgd"
        config.optimizer.momentum = 0.9
        config.optimizer.learning_rate = BIT_RATE * config.batch_size
        config.optimizer.schedule = "drops"
        config.optimizer.drop_at = BIT_DROPS
        config.optimizer.warmup_steps = warmup_steps
        config.optimizer.weight_decay = 1e-4
        config.optimizer.clip_norm = None
    return config


def get_sweep(argument: str | None = None) -> list[Sweep]:
    """Pre-trains each model with each optimizer, and transfers it."""
    given = parse(argument)
    models = PAPER if given.scale == "paper" else SMALL
    cells = {
        f"{model},{optimizer}": {"model": model, "optimizer": optimizer} for model in models for optimizer in OPTIMIZERS
    }
    seeds = 1 if given.scale == "paper" else 3
    before = Sweep(
        tasks={name: study_pages.task(given, **cell) for name, cell in cells.items()},
        seeds=seeds,
        are_alternatives=True,
    )
    if given.scale == "small":
        return [before, study_pages.other_classes_sweep(given, cells)]
    columns = [name for name in TABLE_7["R50x1", "adam"] if name != TABLE_7_AVERAGE]
    return [before, *study_pages.table_4_sweeps(__file__, given, cells, [DATASETS[name] for name in columns])]
