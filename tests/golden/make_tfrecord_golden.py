"""Makes tests/golden/records: data sets as TensorFlow and TFDS write them, and what TensorFlow reads from them.

The tests that compare with them need no TensorFlow. Made with tensorflow 2.21, tensorflow-datasets 4.9.10 and pillow,
from the project's root: python tests/golden/make_tfrecord_golden.py

records/golden_animals/1.0.0/     TFDS: two splits of 3 shards, one label an image
records/golden_scenes/1.0.0/      TFDS: two splits of 1 shard, none to three labels an image
records/web/                      tf.io.TFRecordWriter: 2 shards, names of features as older scripts have them
records/expected.json             by data set and split: file names, labels and digests of the images, in the order
                                  in which TensorFlow reads the files
"""

import hashlib
import io
import json
import pathlib
import shutil
import tempfile
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

FOLDER = pathlib.Path(__file__).parent / "records"
CLASSES = ["ant", "bee", "cat"]
SPLITS = {"train": 20, "validation": 7}
SPECS = (
    "train", "validation", "train[:90%]", "train[33%:67%]", "train[5:15]", "train[-10%:]", "train[:8]+validation[:2]",
    "validation+train", "train[:12.5%]+validation", "train[1shard]", "train[1shard:]", "all",
)  # fmt: skip


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=50)
    return buffer.getvalue()


def example(split: str, number: int) -> tuple[str, bytes, list[int]]:
    """File name, image and labels (none to three) of an image."""
    seed = number + 100 * (split == "validation")
    labels = np.random.default_rng(seed).permutation(3)[: number % 4].tolist()
    return f"{split}_{number:04d}.JPEG", jpeg(seed), labels


class GoldenAnimals(tfds.core.GeneratorBasedBuilder):
    """Animals, of a sort."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "file_name": tfds.features.Text(),
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        for i in range(SPLITS[split]):
            name, image, _ = example(split, i)
            yield name, {"file_name": name, "image": image, "label": i % 3}


class GoldenScenes(GoldenAnimals):
    """Scenes with any number of animals in them."""

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "file_name": tfds.features.Text(),
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=CLASSES)),
                }
            ),
        )

    def _generate_examples(self, split):
        for i in range(SPLITS[split]):
            name, image, labels = example(split, i)
            yield name, {"file_name": name, "image": image, "labels": labels}


def described(name: bytes, label, image: bytes) -> dict:
    return {"file_name": name.decode(), "label": label, "image": hashlib.sha256(image).hexdigest()}


def prepare(builder_class, data_dir: str, num_shards: int, specs: Sequence[str]) -> dict:
    builder = builder_class(data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=num_shards))
    config = tfds.ReadConfig(interleave_cycle_length=1)  # one file after the other
    expected = {}
    for spec in specs:
        examples = builder.as_dataset(
            split=spec,
            shuffle_files=False,
            read_config=config,
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        expected[spec] = [
            described(e["file_name"], (e["label"] if "label" in e else e["labels"]).tolist(), e["image"])
            for e in examples.as_numpy_iterator()
        ]
    return expected


def write_web() -> list[dict]:
    def feature(**kind):
        return tf.train.Feature(**kind)

    (FOLDER / "web").mkdir()
    for shard in range(2):
        path = FOLDER / "web" / f"web-{shard:05d}-of-00002"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for i in range(5 * shard, 5 * shard + 5):
                name, image, labels = example("train", i)
                features = {
                    "image/encoded": feature(bytes_list=tf.train.BytesList(value=[image])),
                    "image/class/label": feature(int64_list=tf.train.Int64List(value=labels)),
                    "image/filename": feature(bytes_list=tf.train.BytesList(value=[name.encode()])),
                    "image/height": feature(int64_list=tf.train.Int64List(value=[8])),
                }
                message = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(message.SerializeToString())
    expected = []
    for record in tf.data.TFRecordDataset(sorted(map(str, (FOLDER / "web").glob("web-*")))).as_numpy_iterator():
        features = tf.train.Example.FromString(record).features.feature
        expected.append(
            described(
                features["image/filename"].bytes_list.value[0],
                list(features["image/class/label"].int64_list.value),
                features["image/encoded"].bytes_list.value[0],
            )
        )
    return expected


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    expected = {}
    with tempfile.TemporaryDirectory() as data_dir:
        expected["golden_animals"] = prepare(GoldenAnimals, data_dir, 3, SPECS)
        expected["golden_scenes"] = prepare(GoldenScenes, data_dir, 1, ["train"])
        for name in ("golden_animals", "golden_scenes"):
            shutil.copytree(pathlib.Path(data_dir, name), FOLDER / name)
    expected["web"] = write_web()
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=0) + "\n")


if __name__ == "__main__":
    main()
