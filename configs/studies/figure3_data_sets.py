r"""Figure 3: transfer to ImageNet after pre-training on ImageNet, ImageNet-21k or JFT (section 4.3).

    python -m vit_jax.sweep --config=configs/studies/figure3_data_sets.py:scale=small --workdir=sweeps/figure3
    python -m vit_jax.main --config=configs/studies/figure3_data_sets.py:scale=paper,on=i21k,model=ViT-B/16 --dry_run

Needs     scale=small: upstream and downstream, five classes of CIFAR-10 each (docs/studies.md has the two commands).
          scale=paper: ImageNet, ImageNet-21k, a web-scale set (configs/vit_jft.py), and accelerators
Takes     scale=small: not measured; about 1.8 hours on 2 CPU cores. By rates measured before an image takes 1.7 ms
          (vit_s) or 2.7 ms (bit_s): 18 times 469 steps x 128 images of each 4,750 s; 18 runs of fine-tuning 800 s; 54
          starts, and evaluation, 1,000 s. scale=paper: 12 times the pre-training of each model on ImageNet and
          ImageNet-21k, for the choice; docs/studies.md
Reaches   scale=paper: ImageNet's row of table 5, from 71.16 % (L/32, ImageNet) to 88.04 % (H/14, JFT). Not reproduced
          here. scale=small: not run yet
Arguments scale     paper (the default) or small
          on        imagenet (the default), i21k or jft; at scale=small the number of images: 2500, 10000, 25000 (the
                    default)
          model     of table 5, ViT-B/32 by default; at scale=small: vit_s (the default) or bit_s
          weights   a released BiT checkpoint instead of model and on
          part      pretrain (the default) or transfer; the sweep gives it the weights
          stage     choose (the default) or final
          dataset, rule                       of part=transfer, as in configs/transfer.py
          data, num_classes, train_images     of a web-scale set, as in configs/vit_jft.py
          upstream, downstream                data sets of scale=small

On the smaller sets the paper tunes weight decay, dropout and label smoothing. It does not give the values that it
tried; those of the sweep are ours: weight decay 0.03, 0.1, 0.3, dropout 0 and 0.1, label smoothing 0 and 0.1, on
held-out images. On JFT the recipe is table 3's. The pages for ImageNet and ImageNet-21k have table 3's values
otherwise. BiT on ImageNet and ImageNet-21k is the released BiT-S and BiT-M, R50x1 and the largest. At scale=small
dropout is left out, because it halves the speed of small models on a CPU.
"""

from ml_collections import ConfigDict

from vit_jax.paper.tables import TABLE_5, TABLE_5_MODELS
from vit_jax.sweep import Sweep, study_pages

ON = {"imagenet": ("ImageNet", "vit_i1k"), "i21k": ("ImageNet-21k", "vit_i21k"), "jft": ("JFT-300M", "vit_jft")}
RELEASED = ("bit_s_r50x1", "bit_s_r152x4", "bit_m_r50x1", "bit_m_r152x4")
SMALL_MODELS, SMALL_SIZES = ("vit_s", "bit_s"), (2_500, 10_000, 25_000)
STEPS = 469
DROPOUT = 0.1  # of table 3 on ImageNet and ImageNet-21k; fine-tuning keeps it
TUNED = {
    "paper": {
        "optimizer.weight_decay": (0.03, 0.1, 0.3),
        "model.dropout_rate": (0.0, 0.1),
        "label_smoothing": (0.0, 0.1),
    },
    "small": [
        {"optimizer.weight_decay": 0.03, "label_smoothing": 0.0},
        {"optimizer.weight_decay": 0.1, "label_smoothing": 0.0},
        {"optimizer.weight_decay": 0.3, "label_smoothing": 0.1},
    ],
}
# Held out to choose the values by; final runs are evaluated on others.
CHOOSE_SPLITS = {
    "imagenet": ("train[:99%]", "train[99%:]"),
    "i21k": ("full[51200:]", "full[25600:51200]"),
    "jft": ("train[51200:]", "train[:25600]"),
}
FINAL_SPLITS = {
    "imagenet": ("train", "validation"),
    "i21k": ("full[51200:]", "full[:25600]"),
    "jft": ("train[51200:]", "train[25600:51200]"),
}
ARGUMENTS = {"on": "", "model": "", "weights": "", **study_pages.TRANSFER, **study_pages.DATA, **study_pages.UPSTREAM}


def models_on(data: str) -> list[str]:
    """The models that table 5 has pre-trained on some data."""
    row = TABLE_5[ON[data][0]]["ImageNet"]
    return [model for model, accuracy in zip(TABLE_5_MODELS, row, strict=True) if accuracy is not None]


def parse(argument: str | None) -> ConfigDict:
    """The arguments."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    sets = list(ON) if given.scale == "paper" else [str(size) for size in reversed(SMALL_SIZES)]
    given.on = given.on or sets[0]
    study_pages.check_one_of("on", given.on, sets)
    models = models_on(given.on) if given.scale == "paper" else SMALL_MODELS
    given.model = given.model or ("ViT-B/32" if given.scale == "paper" else models[0])
    study_pages.check_one_of("model", given.model, models)
    return given


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    given = parse(argument)
    if given.scale == "small":
        return small_config(given)
    if given.part == "transfer":
        return study_pages.table_4(__file__, given, given.model, dropout=0.0 if given.on == "jft" else DROPOUT)
    if given.on == "jft":
        config = study_pages.jft(__file__, given, given.model, epochs=7.0 if given.model.startswith("ViT-B") else 14.0)
    else:
        config = study_pages.page(__file__, ON[given.on][1], model=given.model)
        config.checkpoint.keep = 1
        config.checkpoint.keep_best = False
    splits = CHOOSE_SPLITS if given.stage == "choose" else FINAL_SPLITS
    config.data.train_split, config.data.eval_split = splits[given.on]
    if given.on == "imagenet" and given.stage == "choose":
        config.data.expected_within = 0.02
    return config


def small_config(given: ConfigDict) -> ConfigDict:
    """The config at scale=small."""
    if given.part == "transfer":
        return study_pages.other_classes(__file__, given)
    config = study_pages.five_classes(__file__, given, steps=STEPS)
    images = int(given.on)
    config.data.train_split = f"train[:{images}]"
    config.data.expected_train_images = images
    config.data.eval_split = study_pages.HELD_OUT if given.stage == "choose" else study_pages.TEST
    return config


def get_sweep(argument: str | None = None) -> list[Sweep]:
    """Pre-trains each model on each set, tuned where the paper tunes, and transfers it."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    final = {"argument.stage": "final"}
    if given.scale == "small":
        cells = {f"{model},{size}": {"model": model, "on": str(size)} for model in SMALL_MODELS for size in SMALL_SIZES}
        tasks = {name: study_pages.task(given, **cell) for name, cell in cells.items()}
        before = Sweep(choose=TUNED["small"], final=final, tasks=tasks, are_alternatives=True)
        return [before, study_pages.other_classes_sweep(given, cells, rates=(0.03,))]
    cells = {
        f"{model.replace('/', '_')},{data}": {"model": model, "on": data} for data in ON for model in models_on(data)
    }
    own = {
        is_tuned: {
            name: study_pages.task(given, **cell) for name, cell in cells.items() if (cell["on"] != "jft") == is_tuned
        }
        for is_tuned in (True, False)
    }
    released = {name: {"weights": name} for name in RELEASED}
    return [
        Sweep(choose=TUNED["paper"], final=final, tasks=own[True], seeds=1, are_alternatives=True),
        Sweep(final=final, tasks=own[False], seeds=1, are_alternatives=True),
        *study_pages.table_4_sweeps(__file__, given, cells | released, ("imagenet2012",)),
    ]
