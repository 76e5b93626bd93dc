"""What the pages of configs/studies share: two scales, recipes of other pages, and tasks of a table's cells.

A study repeats a table or a figure of the paper. At scale "paper" its runs are the paper's. At scale "small" they are
runs of minutes on two CPU cores, with CIFAR-10.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vit_jax.config import parse_config_string, set_length
from vit_jax.console import quote_argument
from vit_jax.errors import UserError, unknown_name
from vit_jax.evaluators.registry import entry, short_name
from vit_jax.sweep.spec import Sweep
from vit_jax.sweep.trials import call, load_module

SCALES = ("paper", "small")
PARTS = ("pretrain", "transfer")  # of a study that transfers what it pre-trains

# Arguments of the pages: of all, and of those that also transfer.
DATA: dict[str, Any] = {"data": "", "num_classes": 0, "train_images": 0}
TRANSFER: dict[str, Any] = {"part": "pretrain", "dataset": "", "stage": "choose", "rule": "vit"}
UPSTREAM: dict[str, Any] = {"upstream": "tfds:upstream", "downstream": "tfds:downstream"}

IMAGENET = "tfds:imagenet2012"
CIFAR10 = "cifar10_jpeg.zip"
CIFAR10_IMAGES = 50_000
# Of CIFAR-10's 10,000 test images, the first are for few-shot classifiers and early stopping. They are never trained
# on, and nothing is reported on them.
HELD_OUT, TEST = "test[:2000]", "test[2000:]"

PREPARE_CIFAR10 = """\
Put CIFAR-10 as {train,test}/<class>/*.jpg into a folder or a zip file, and append data=<folder or zip file> to the
arguments of the page; or set VIT_JAX_DATA to the folder that has cifar10_jpeg.zip."""
PREPARE_HALVES = """\
Make two data sets of five classes each from CIFAR-10 (a folder or zip file of {train,test}/<class>/*.jpg):
    python -m vit_jax.data.prepare image_folder <CIFAR-10> --name=upstream --classes=airplane,automobile,bird,cat,deer
    python -m vit_jax.data.prepare image_folder <CIFAR-10> --name=downstream --classes=dog,frog,horse,ship,truck
With another --out than the default, set VIT_JAX_DATA to it."""


def parse_study(argument: str | None, **defaults: Any) -> ConfigDict:
    """Reads the arguments of a study's page, of which `scale` is one; raises `UserError` for an unknown scale."""
    given = parse_config_string(argument, scale="paper", **defaults)
    for name, known in (("scale", SCALES), ("part", PARTS), ("stage", ("choose", "final"))):
        if name in given and given[name] not in known:
            raise unknown_name(name, given[name], known)
    return given


def task(given: ConfigDict, **cell: Any) -> str:
    """The argument of a sweep's task: the page's arguments with those of a cell of the table, without empty ones."""
    if unknown := [name for name in cell if name not in given]:
        raise unknown_name("config argument", unknown[0], given)
    return _written({**given.to_dict(), **cell})


def _written(arguments: Mapping[str, Any]) -> str:
    given = {name: str(value) for name, value in arguments.items() if value not in ("", 0)}
    return ",".join(f"{name}={quote_argument(value)}" for name, value in given.items())


def check_one_of(name: str, value: Any, known: Sequence[Any] | Mapping[Any, Any]) -> None:
    """Raises `UserError` if the value of an argument is none of the study's."""
    if value not in known:
        raise unknown_name(name, str(value), list(map(str, known)))


def page(study: str, name: str, **arguments: Any) -> ConfigDict:
    """The config of another page in configs/. `study` is the path of the study's page; leaves out empty arguments."""
    place = f"{pathlib.Path(study).resolve().parent.parent / name}.py:{_written(arguments)}"
    return call(load_module(place), "get_config", place)


_SHAPE = ("num_layers", "hidden_dim", "mlp_dim", "num_heads", "stages", "resnet", "pool", "pre_logits", "dropout_rate")
# Models for images of 32 pixels: 8x8 tokens of 4 pixels, and ResNets with one unit a stage.
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "vit_s": {"name": "ViT-Ti/4", "num_layers": 4, "hidden_dim": 64, "mlp_dim": 128, "num_heads": 2},
    "vit_m": {"name": "ViT-Ti/4", "num_layers": 4, "hidden_dim": 128, "mlp_dim": 256, "num_heads": 4},
    "bit_s": {"name": "R26x1", "stages": (1, 1)},
    "bit_m": {"name": "R26x1", "stages": (1, 1, 1)},
    "hybrid_s": {
        **{"name": "R26+ViT-Ti/32", "resnet": (), "num_layers": 3, "hidden_dim": 64, "mlp_dim": 128, "num_heads": 2}
    },
    "hybrid_m": {
        **{"name": "R26+ViT-Ti/32", "resnet": (1,), "num_layers": 4, "hidden_dim": 96, "mlp_dim": 192, "num_heads": 3}
    },
}


def set_model(config: ConfigDict, **fields: Any) -> None:
    """Sets the model of a config, and unsets the shape of another one."""
    for field in _SHAPE:
        config.model[field] = None
    config.model.update(fields)


# ---- The paper's scale.


def jft(study: str, given: ConfigDict, model: str, *, epochs: float = 7.0) -> ConfigDict:
    """The paper's pre-training of a model on JFT-300M, or on the data of the arguments, with few-shot accuracy.

    Few-shot accuracy is measured as often as accuracy on the held-out images.
    """
    family = "vit" if model.startswith("ViT") else "hybrid" if "+" in model else "bit"
    data = {name: given[name] for name in DATA if name in given}
    config = page(study, f"{family}_jft", model=model, epochs=epochs, **data)
    few_shot(config, IMAGENET, pool="train[:65000]", test="validation", shots=(1, 5, 10, 25))
    config.evals.fewshot.every_steps = config.evals.eval_split.every_steps
    config.checkpoint.keep = 1
    config.checkpoint.keep_best = False
    return config


def few_shot(config: ConfigDict, dataset: str, *, pool: str, test: str, shots: tuple[int, ...]) -> None:
    """Sets the few-shot evaluation of a config."""
    config.evals.fewshot.datasets = (dataset,)
    config.evals.fewshot.train_split = pool
    config.evals.fewshot.test_split = test
    config.evals.fewshot.shots = shots


def few_shot_metric(given: ConfigDict, shots: int = 5) -> str:
    """Full name of the few-shot accuracy of the runs of `jft` or `cifar10`."""
    dataset = IMAGENET if given.scale == "paper" else given.data or CIFAR10
    return f"fewshot/{short_name(dataset)}/pre_logits/{shots}shot"


def table_4(study: str, given: ConfigDict, model: str, *, dropout: float = 0.0) -> ConfigDict:
    """The paper's fine-tuning of a model on `given.dataset`, by table 4 or BiT-HyperRule; a sweep gives the weights."""
    names = {name: given[name] for name in ("dataset", "stage", "rule")}
    weights = {"weights": given.weights} if given.get("weights") else {"weights": "none", "model": model}
    return page(study, "transfer", dropout=dropout or "0", **weights, **names)


def table_4_sweeps(
    study: str, given: ConfigDict, pre_trained: Mapping[str, Mapping[str, Any]], datasets: Sequence[str]
) -> list[Sweep]:
    """Sweeps that transfer each pre-trained model to each data set as the paper does, one for each set of candidates.

    Args:
      study: path of the study's page.
      given: its arguments.
      pre_trained: by task of an earlier sweep, the arguments of its cell, `model` among them; or by the name of a task,
        its arguments with `weights`, a released checkpoint, which needs no earlier task.
      datasets: names in `data.transfer_tasks`.
    """
    place = f"{pathlib.Path(study).resolve().parent.parent / 'transfer'}.py"
    module = load_module(place)
    sweeps: dict[str, dict[str, Any]] = {}
    for before, cell in pre_trained.items():
        for dataset in datasets:
            of = f"weights={cell['weights']}" if "weights" in cell else f"weights=none,model={cell['model']}"
            own = call(module, "get_sweep", f"{place}:dataset={dataset},{of}")
            found = sweeps.setdefault(str(own.choose), {"choose": own.choose, "tasks": {}, "weights": {}})
            name = f"{before},{dataset}"
            own_cell = {key: value for key, value in cell.items() if key in given}
            found["tasks"][name] = task(given, **own_cell, part="transfer", dataset=dataset)
            if "weights" not in cell:
                found["weights"][name] = before
    final = {"argument.stage": "final"}
    return [Sweep(final=final, are_alternatives=True, **found) for found in sweeps.values()]


# ---- The small scale.


def cifar10(study: str, given: ConfigDict, *, steps: int, num_layers: int = 4, width: int = 64) -> ConfigDict:
    """A run of `steps` of 128 images of CIFAR-10, with the recipe of configs/cifar10.py and a ViT with a class token.

    Its MLP is twice as wide as its tokens, and its heads have 32 dimensions.
    """
    dataset = given.data or CIFAR10
    config = page(study, "cifar10", data=dataset)
    config.data.eval_split = TEST
    config.data.how_to_prepare = PREPARE_CIFAR10
    config.model.pool = None
    config.model.num_layers = num_layers
    config.model.hidden_dim = width
    config.model.mlp_dim = 2 * width
    config.model.num_heads = width // 32
    few_shot(config, dataset, pool=HELD_OUT, test=TEST, shots=(5, 10, 25))
    set_steps(config, steps)
    return config


def masked_cifar10(
    study: str, given: ConfigDict, *, steps: int, target: str, corruption_rate: float = 0.5
) -> ConfigDict:
    """Masked patch prediction for `steps` of 128 images of CIFAR-10, whose labels are not used, at `cifar10`'s rate."""
    config = cifar10(study, given, steps=steps)
    config.label_smoothing = 0.0
    config.objective = "masked_patches"
    config.masked_patches.target = target
    config.masked_patches.corruption_rate = corruption_rate
    config.model.num_classes = None
    config.data.eval_split = HELD_OUT
    config.evals.eval_split = entry("objective")
    return config


def set_steps(config: ConfigDict, steps: int, *, evaluations: int = 1) -> None:
    """Sets the length of a small run, which is evaluated as many times at equal distances."""
    config.steps = steps
    set_length(config, ("steps",))
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps // 5)
    for name in ("eval_split", "fewshot"):
        config.evals[name].every_steps = -(-steps // evaluations)
    config.checkpoint.every_steps = max(1, steps // 3)
    config.checkpoint.keep = 1
    config.checkpoint.keep_best = False


def five_classes(study: str, given: ConfigDict, *, steps: int, model: str = "") -> ConfigDict:
    """Pre-training on five classes of CIFAR-10, as in configs/small_transfer.py.

    The model is `SMALL_MODELS[model]`; by default that of the arguments.
    """
    config = page(study, "small_transfer", stage="pretrain")
    set_model(config, **SMALL_MODELS[model or given.model])
    config.data.dataset = given.upstream
    config.data.how_to_prepare = PREPARE_HALVES
    set_steps(config, steps)
    return config


def other_classes(study: str, given: ConfigDict) -> ConfigDict:
    """Fine-tuning on 2,000 images of the other five classes, as there; a sweep gives the weights.

    The rate is chosen on 1,000 other training images with `stage=choose`.
    """
    config = page(study, "small_transfer", weights="of_the_sweep")
    config.weights = None
    set_model(config, **SMALL_MODELS[given.model])
    config.data.dataset = given.downstream
    config.data.how_to_prepare = PREPARE_HALVES
    if given.stage == "choose":
        config.data.eval_split = "train[2000:3000]"
    set_steps(config, config.steps)
    return config


def other_classes_sweep(
    given: ConfigDict, pre_trained: Mapping[str, Mapping[str, Any]], rates: Sequence[float] = (0.01, 0.03, 0.1)
) -> Sweep:
    """A sweep that fine-tunes each pre-trained model (see `table_4_sweeps`) with the best of some learning rates."""
    return Sweep(
        choose={"optimizer.learning_rate": tuple(rates)},
        final={"argument.stage": "final"},
        tasks={f"{name},transfer": task(given, **{**cell, "part": "transfer"}) for name, cell in pre_trained.items()},
        weights={f"{name},transfer": name for name in pre_trained},
        are_alternatives=True,
    )


def check_slice(name: str, images: int, total: int) -> None:
    """Raises `UserError` if a subset is larger than its data set."""
    if not 1 <= images <= total:
        raise UserError(f"{name} must be between 1 and {total:,}, the number of training images, got {images:,}.")


def with_test(config: ConfigDict) -> None:
    """Evaluates a small run on held-out images to stop by, and on the test images as "test", equally often."""
    config.data.eval_split = HELD_OUT
    config.evals.test = entry("classification", split=TEST, every_steps=config.evals.eval_split.every_steps)


def more_metrics(given: ConfigDict) -> tuple[str, ...]:
    """The other metrics of the tables: at scale=small, accuracy on the test images."""
    return (f"{TEST}/accuracy",) if given.scale == "small" else ()


def seeds(given: ConfigDict) -> int:
    """Number of pre-training runs: one in the paper, three at scale=small."""
    return 1 if given.scale == "paper" else 3


def set_images(config: ConfigDict, images: int) -> None:
    """Sets the length of a run in images."""
    config.images = images
    set_length(config, ("images",))
