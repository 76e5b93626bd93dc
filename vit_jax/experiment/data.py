"""Sources and transforms of a run. `data` is always the config's section `data`.

Functions that open a source raise `MissingDataError` if it is not prepared, and `UserError` if it is wrong.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import sharding
from vit_jax.data.randaugment import RandAugment
from vit_jax.data.sources import RealLabels, Source, load_real_labels, open_source
from vit_jax.data.sources.mixture import Mixture
from vit_jax.data.transforms import EvalTransform, TrainTransform
from vit_jax.errors import UserError


def train_transform(data: ConfigDict) -> TrainTransform:
    """Makes the augmentation of training images."""
    names = ("layers", "magnitude", "magnitude_std", "operations")
    randaugment = RandAugment(*(data[f"randaugment_{name}"] for name in names)) if data.randaugment_layers else None
    return TrainTransform(
        image_size=data.image_size,
        inception_crop=data.inception_crop,
        min_area=data.crop_min_area,
        random_crop_from=data.random_crop_from,
        flip=data.flip,
        resize=data.resize,
        randaugment=randaugment,
        exif_orientation=data.exif_orientation,
    )


def eval_transform(data: ConfigDict) -> EvalTransform:
    """Makes the preprocessing of images of an evaluation."""
    return EvalTransform(
        image_size=data.image_size,
        resize_small=data.eval_resize_small,
        resize=data.eval_resize,
        exif_orientation=data.exif_orientation,
    )


def open_sources(data: ConfigDict, *, labelled: bool = True) -> tuple[Source, Source | None]:
    """Opens the training examples and, if `eval_split` is set, those for evaluation, and compares their classes.

    `labelled` is as in `open_source`, for this and for the functions below.
    """
    train_source = open_train_source(data, labelled=labelled)
    expected = data.expected_train_images
    if expected and abs(len(train_source) - expected) > data.expected_within * expected:
        raise UserError(
            f"{train_source.name}/{data.train_split} has {len(train_source)} images, but data.expected_train_images is "
            f"{expected}. Complete the data set, or accept it with "
            f"--config.data.expected_train_images={len(train_source)}."
        )
    if data.eval_split is None:
        if data.eval_labels:
            raise UserError("data.eval_labels are the labels of data.eval_split, which is None. Set it too.")
        return train_source, None
    eval_source = open_eval_source(data, train_source.class_names, labelled=labelled)
    trained, evaluated = train_source.class_names, eval_source.class_names
    if trained and evaluated and list(trained) != list(evaluated):
        differing = sorted({*trained} ^ {*evaluated})
        raise UserError(
            f"{train_source.name}/{train_source.split}, to train on, and {eval_source.name}/{eval_source.split}, to "
            f"evaluate on, have different classes, so labels would not mean the same: {len(differing)} are in one of "
            f"them only, such as {differing[:5]}."
        )
    return train_source, eval_source


def open_eval_source(data: ConfigDict, class_names: Sequence[str] | None = None, *, labelled: bool = True) -> Source:
    """Opens the evaluation split, which must be set; `class_names` are as in `open_source`."""
    source = open_data(data, data.dataset, data.eval_split, class_names, labelled=labelled)
    return RealLabels(source, load_real_labels(data.eval_labels)) if data.eval_labels else source


def open_data(
    data: ConfigDict, dataset: str, split: str, class_names: Sequence[str] | None = None, *, labelled: bool = True
) -> Source:
    """Opens a split of a data set with the config's options; `class_names` are as in `open_source`."""
    return open_source(
        dataset,
        split,
        how_to_prepare=data.how_to_prepare,
        image_key=data.image_key,
        label_key=data.label_key,
        max_labels=data.max_labels,
        class_names=class_names,
        labelled=labelled,
    )


def training_data_sets(data: ConfigDict) -> list[tuple[str, float]]:
    """Lists the data sets to train on with their weights: one, or those of the mixture."""
    if not data.mixture:
        return [(data.dataset, 1.0)]
    try:
        return [(str(dataset), float(weight)) for dataset, weight in data.mixture]
    except (TypeError, ValueError) as error:
        raise UserError(f"data.mixture takes pairs of data set and weight, got {data.mixture!r}.") from error


def open_train_source(data: ConfigDict, *, labelled: bool = True) -> Source:
    """Opens the training examples."""
    pairs = training_data_sets(data)
    sources = [open_data(data, dataset, data.train_split, labelled=labelled) for dataset, _ in pairs]
    return Mixture(sources, [weight for _, weight in pairs]) if data.mixture else sources[0]


def batch_shapes(batch_size: int, image_size: int, max_labels: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and shardings of a training batch."""
    labels = (batch_size, max_labels) if max_labels > 1 else (batch_size,)
    shapes = {
        "image": jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct(labels, jnp.int32),
    }
    return sharding.with_sharding(shapes, sharding.batch_sharding(mesh))
