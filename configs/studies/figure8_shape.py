r"""Figure 8: which dimension of a ViT to scale: depth, width, MLP, patch size, or all (appendix D.2).

    python -m vit_jax.sweep --config=configs/studies/figure8_shape.py:scale=small --workdir=sweeps/figure8
    python -m vit_jax.main --config=configs/studies/figure8_shape.py:scale=paper,axis=depth,value=64 --dry_run

Needs     scale=small: CIFAR-10 as images (configs/cifar10.py). scale=paper: a web-scale set (configs/vit_jft.py),
          ImageNet for few-shot accuracy, and accelerators
Takes     scale=small: not measured; about 1.8 hours on 2 CPU cores: the base is the model of configs/quickstart.py,
          measured at 2,050 images/s (0.5 ms an image; patches of 4 pixels 1.7 ms, all dimensions larger 3.4 ms). The 11
          models together take about 9.2 ms; 3 seeds of 1,563 steps x 128 images are 5,500 s, evaluation and starts of
          33 runs 900 s. scale=paper: see docs/studies.md
Reaches   scale=paper: curves only. Depth helps most, up to 64 layers with less and less gain from 16 on; width changes
          least; smaller patches help without more parameters. Not reproduced here. scale=small: not run yet
Arguments scale  paper (the default) or small
          axis   base (the default), depth, width, mlp, patch or all
          value  of that axis; of axis=all, a factor. The sweep tries
                     scale=paper  depth 2 4 16 32 64, width 256 512 2048, mlp 512 1024 4096 8192, patch 16 56, all 0.5 2
                     scale=small  depth 2 8, width 32 128, mlp 64 256, patch 4 16, all 0.5 1.5
          data   scale=small: folder or zip file; scale=paper: with num_classes, train_images as in configs/vit_jft.py

All configurations vary one dimension of a base: 8 layers, width 1,024, MLP 2,048, patches of 32 pixels in the paper; 4
layers, width 64, MLP 128, patches of 8 pixels at scale=small. The paper gives the base, and the depths 16 and 64; the
other values are ours. axis=all multiplies depth, width and MLP by the factor, and takes the next patch size: smaller
for a factor above 1, larger below. Heads keep 64 dimensions (scale=small: 32). The learning rate is that of L/32, 6e-4
(ours). At scale=small, few-shot classifiers are drawn from 2,000 test images that nothing is trained or reported on.
"""

from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.sweep import Sweep, study_pages

AXES = ("base", "depth", "width", "mlp", "patch", "all")
BASE = {
    "paper": {"depth": 8, "width": 1024, "mlp": 2048, "patch": 32},
    "small": {"depth": 4, "width": 64, "mlp": 128, "patch": 8},
}
VALUES = {
    "paper": {
        "depth": (2, 4, 16, 32, 64),
        "width": (256, 512, 2048),
        "mlp": (512, 1024, 4096, 8192),
        "patch": (16, 56),
        "all": (0.5, 2),
    },
    "small": {"depth": (2, 8), "width": (32, 128), "mlp": (64, 256), "patch": (4, 16), "all": (0.5, 1.5)},
}
NEXT_PATCH = {"paper": {"larger": 56, "smaller": 16}, "small": {"larger": 16, "smaller": 4}}  # they tile the images
HEAD_DIM = {"paper": 64, "small": 32}
STEPS = 1_563
ARGUMENTS = {"axis": "base", "value": 0.0, **study_pages.DATA}


def shape_of(scale: str, axis: str, value: float) -> dict[str, int]:
    """The four dimensions of a configuration."""
    shape = dict(BASE[scale])
    if axis == "all":
        shape |= {name: round(value * shape[name]) for name in ("depth", "width", "mlp")}
        if value != 1:
            shape["patch"] = NEXT_PATCH[scale]["smaller" if value > 1 else "larger"]
    elif axis != "base":
        shape[axis] = int(value)
    return shape


def get_config(argument: str | None = None) -> ConfigDict:
    """The resolved config."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    study_pages.check_one_of("axis", given.axis, AXES)
    if given.axis != "base" and given.value <= 0:
        raise UserError(f"axis={given.axis} needs a value, such as value={VALUES[given.scale][given.axis][0]}.")
    shape = shape_of(given.scale, given.axis, given.value)
    if given.scale == "paper":
        config = study_pages.jft(__file__, given, "ViT-L/32")
        config.model.name = f"ViT-L/{shape['patch']}"
    else:
        config = study_pages.cifar10(__file__, given, steps=STEPS)
        config.model.name = f"ViT-Ti/{shape['patch']}"
    config.model.num_layers = shape["depth"]
    config.model.hidden_dim = shape["width"]
    config.model.mlp_dim = shape["mlp"]
    config.model.num_heads = max(1, shape["width"] // HEAD_DIM[given.scale])
    return config


def get_sweep(argument: str | None = None) -> Sweep:
    """The base, and each value of each axis."""
    given = study_pages.parse_study(argument, **ARGUMENTS)
    tasks = {"base": study_pages.task(given, axis="base", value=0.0)}
    for axis, values in VALUES[given.scale].items():
        tasks |= {f"{axis}={value:g}": study_pages.task(given, axis=axis, value=value) for value in values}
    return Sweep(
        tasks=tasks,
        metric=study_pages.few_shot_metric(given),
        more_metrics=study_pages.more_metrics(given),
        seeds=study_pages.seeds(given),
        are_alternatives=True,
    )
