"""The pipelines that the input benchmark compares. Each imports only its own libraries."""

import contextlib
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

AREA = (0.05, 1.0)  # of the crops, as a share of the image


def list_files(task: dict[str, Any]) -> list[tuple[pathlib.Path, int]]:
    """Images with their classes, in the order of vit_jax."""
    classes = sorted(path for path in pathlib.Path(task["folder"], "train").iterdir() if path.is_dir())
    return [(file, label) for label, folder in enumerate(classes) for file in sorted(folder.iterdir())]


def vit_jax_batches(task: dict[str, Any]) -> Iterator[Any]:
    """Batches of this project: arrays on the device, or of the host if the task says so."""
    import jax

    from vit_jax.data.pipeline import TrainBatches
    from vit_jax.data.sources import open_source
    from vit_jax.data.transforms import TrainTransform
    from vit_jax.sharding import batch_sharding, make_mesh

    source = open_source(task["folder"], "train")
    options = {name: task[name] for name in ("num_threads", "num_workers") if name in task}
    batches = TrainBatches(
        source,
        TrainTransform(task["image_size"], min_area=AREA[0]),
        batch_sharding(make_mesh()),
        batch_size=task["batch_size"],
        seed=0,
        **options,
    )
    with contextlib.closing(batches):  # workers that are killed leave their shared memory behind
        while True:
            yield jax.block_until_ready(next(batches))["image"] if task["device"] else batches.next_local()["image"]


def tf_data_batches(task: dict[str, Any]) -> Iterator[Any]:
    """Batches of tf.data, with the operations, the order of stages and the options that big_vision trains with.

    Two settings favour it over big_vision: the number of parallel calls is tuned, not 100, and the shuffle buffer holds
    only these few images.
    """
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    files = list_files(task)
    data = tf.data.Dataset.from_tensor_slices(([str(path) for path, _ in files], [label for _, label in files]))
    size = task["image_size"]

    def preprocess(path: Any, label: Any) -> dict[str, Any]:
        content = tf.io.read_file(path)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(content),
            tf.zeros([0, 0, 4], tf.float32),
            area_range=AREA,
            aspect_ratio_range=(0.75, 1.33),
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        image = tf.image.decode_and_crop_jpeg(content, tf.concat([begin[:2], extent[:2]], 0), channels=3)
        image = tf.cast(tf.clip_by_value(tf.image.resize(image, (size, size)), 0, 255), tf.uint8)
        image = tf.image.random_flip_left_right(image)
        if task["float32"]:
            image = tf.cast(image, tf.float32) / 127.5 - 1.0
        return {"image": image, "label": label}

    options = tf.data.Options()
    if task["pool"]:
        options.threading.private_threadpool_size = task["pool"]
        options.threading.max_intra_op_parallelism = 1
        options.experimental_optimization.inject_prefetch = False
    data = data.with_options(options).shuffle(len(files)).repeat()
    data = data.map(preprocess, num_parallel_calls=tf.data.AUTOTUNE)
    data = data.batch(task["batch_size"], drop_remainder=True).prefetch(2)
    return (batch["image"] for batch in data.as_numpy_iterator())


def data_loader_batches(task: dict[str, Any]) -> Iterator[Any]:
    """Batches of torch's DataLoader, a worker process for each core; PIL decodes, crops, resizes and flips.

    As in torchvision's RandomResizedCrop, which draws the same crops, the whole image is decoded and the resize is
    antialiased. Faster than torchvision's usual chain: images stay uint8, without float32 and transposition.
    """
    import math

    import numpy as np
    import torch
    from PIL import Image

    files = list_files(task)
    size = task["image_size"]

    def crop_box(width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * random.uniform(*AREA)
            aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        return 0, 0, width, height

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            path, label = files[index]
            with Image.open(path) as opened:
                image = opened.convert("RGB")
            image = image.crop(crop_box(*image.size)).resize((size, size), Image.Resampling.BILINEAR)
            if random.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return torch.from_numpy(np.array(image)), label

    images = Images()
    loader = torch.utils.data.DataLoader(
        images,
        batch_size=task["batch_size"],
        # Without end: at the end of an epoch the workers would be idle.
        sampler=torch.utils.data.RandomSampler(images, num_samples=2**40),
        num_workers=task["cores"],
        drop_last=True,
        multiprocessing_context="fork",
    )
    return (batch for batch, _ in loader)


BATCHES: dict[str, Callable[[dict[str, Any]], Iterator[Any]]] = {
    "vit_jax": vit_jax_batches,
    "tf_data": tf_data_batches,
    "data_loader": data_loader_batches,
}
