"""Data sets as TFDS prepares them: its own names, features and sizes, but only a few of the examples.

Most files are missing, which does not matter because files are opened when a slice needs them.
"""

import cv2
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import naming
from tensorflow_datasets.core.splits import SplitDict, SplitInfo


def write(data_dir, name, pieces):
    """Writes the description of a data set of TFDS's catalogue, and some of its files.

    Args:
      data_dir: folder of data sets.
      name: <name>[/<config>].
      pieces: by split its files, in order: each a number of examples that are not there, or a list of examples, which
        may be serialized.
    """
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    folder = data_dir / builder.info.full_name
    folder.mkdir(parents=True)
    infos = []
    for split, files in pieces.items():
        template = naming.ShardedFileTemplate(
            data_dir=folder, dataset_name=builder.name, split=split, filetype_suffix="array_record"
        )
        lengths = [file if isinstance(file, int) else len(file) for file in files]
        infos.append(SplitInfo(name=split, shard_lengths=lengths, num_bytes=1, filename_template=template))
        for number, file in enumerate(files):
            if not isinstance(file, int):
                path = template.sharded_filepath(shard_index=number, num_shards=len(files))
                writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
                for example in file:
                    writer.write(example if isinstance(example, bytes) else serialize(builder.info.features, example))
                writer.close()
    builder.info.set_splits(SplitDict(infos))
    builder.info.write_to_directory(folder)
    return folder


def serialize(features, example):
    """The record that TFDS makes of an example."""
    return features.serialize_example(example)


def features_of(name, data_dir):
    """The features that TFDS says the data set has."""
    return tfds.builder(name, data_dir=data_dir).info.features


def example(features, seed, **given):
    """An example with the given values, and arbitrary ones of the right types and shapes."""
    rng = np.random.default_rng(seed)
    return {key: given.get(key, _value(feature, rng)) for key, feature in features.items()}


def png(pixels):
    """An image file; TFDS writes PNG where it is given pixels, but needs TensorFlow for it."""
    return cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()


def _value(feature, rng):
    match feature:
        case tfds.features.Image():
            value = png(rng.integers(0, 256, [side or 12 for side in feature.shape], np.uint8))
        case tfds.features.ClassLabel():
            value = int(rng.integers(feature.num_classes))
        case tfds.features.Text():
            value = f"text {rng.integers(1000)}"
        case tfds.features.BBoxFeature():
            value = tfds.features.BBox(0.0, 0.0, 0.5, 1.0)
        case tfds.features.Sequence():
            value = [_value(feature.feature, rng) for _ in range(3)]
        case tfds.features.FeaturesDict():
            value = {key: _value(inner, rng) for key, inner in feature.items()}
        case _:
            value = rng.random(feature.shape).astype(feature.np_dtype)
    return value
