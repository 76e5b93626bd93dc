r"""Table 8: kinds of position embeddings, and where they are added (appendix D.4).

    python -m vit_jax.sweep --config=configs/studies/table8_position_embeddings.py:scale=small --workdir=sweeps/table8
    python -m vit_jax.main --config=configs/studies/table8_position_embeddings.py:scale=paper,kind=learned_2d --dry_run

Needs     scale=small: CIFAR-10 as images (configs/cifar10.py). scale=paper: a web-scale set (configs/vit_jft.py),
          ImageNet for few-shot accuracy, and accelerators
Takes     scale=small: not measured; about 1.9 hours on 2 CPU cores, by rates measured before (docs/benchmarks.md: 300
          images/s for the ViT of configs/cifar10.py at 279 MFLOP an image, 2,050 for the quickstart's at 15 MFLOP; so
          590 for this one, at 65 MFLOP): 24 runs of 1,172 steps x 128 images at 1.7 ms are 6,100 s, evaluation and
          starts 700 s. scale=paper: 224 exaFLOPs a run, and a little more for relative embeddings
Reaches   scale=paper: ImageNet 5-shot linear accuracy of table 8, not reproduced here
              none         61.382 %
              learned_1d   64.206 % at the stem, 63.964 % in every layer, 64.292 % shared
              learned_2d   64.001 %              64.046 %                 64.022 %
              relative     64.032 %
          scale=small: not run yet
Arguments scale  paper (the default) or small
          kind   none, learned_1d (the default), learned_2d or relative
          at     stem (the default), every_layer or shared. Of kind=relative: every_layer and stem mean a table for each
                 layer
          data   scale=small: folder or zip file; scale=paper: with num_classes, train_images as in configs/vit_jft.py

The model at scale=small has 64 patches of 4x4 pixels, 4 layers of width 64 and a class token, and trains for 3 epochs.
The 5-shot classifiers are drawn from 2,000 test images that nothing is trained or reported on, and measured on the
other 8,000, on which test accuracy is measured too.
"""

from ml_collections import ConfigDict

from vit_jax.paper.tables import TABLE_8
from vit_jax.sweep import Sweep, study_pages

MODEL = "ViT-B/16"
STEPS = 1_172
ARGUMENTS = {"kind": "learned_1d", "at": "stem", **study_pages.DATA}


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    study_pages.check_one_of(
        "kind and place", f"{given.kind},{given.at}", [f"{kind},{place}" for kind, place in TABLE_8]
    )
    if given.scale == "paper":
        config = study_pages.jft(__file__, given, MODEL)
    else:
        config = study_pages.cifar10(__file__, given, steps=STEPS)
    config.model.position_embedding = given.kind
    config.model.position_embedding_at = given.at
    return config


def get_sweep(argument: str | None = None) -> Sweep:
    """The eight cells of table 8."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    return Sweep(
        tasks={f"{kind},{place}": study_pages.task(given, kind=kind, at=place) for kind, place in TABLE_8},
        metric=study_pages.few_shot_metric(given),
        more_metrics=study_pages.more_metrics(given),
        seeds=study_pages.seeds(given),
        are_alternatives=True,
    )
