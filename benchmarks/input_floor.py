"""The speed of only decoding and resizing, the upper bound for pipelines with the same libraries."""

import functools
import json
import pathlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.input_peers import list_files

FLOOR = "decode crop (vit_jax)"  # the row that pipelines are compared with
CROPS_PER_IMAGE = 3


def rates(work: Callable[[int], Any], items: int, cores: int) -> dict[str, float]:
    """Images/s on one thread and on as many as there are cores."""

    def rate(threads: int) -> float:
        chunks = [range(first, min(first + 8, items)) for first in range(0, items, 8)]
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            for _ in pool.map(lambda chunk: [work(item) for item in chunk] and None, chunks):
                pass
            return items / (time.perf_counter() - start)

    work(0)
    return {"one_thread": rate(1), "all_cores": rate(cores)}


def floor(task: dict[str, Any]) -> dict[str, Any]:
    """Rates of the libraries alone, by name; see `rates`."""
    encoded = [path.read_bytes() for path, _ in list_files(task)]
    boxes = json.loads(pathlib.Path(task["crops"]).read_text()) if pathlib.Path(task["crops"]).exists() else []
    works: dict[str, Callable[[int], Any]] = {}
    if task["library"] == "tensorflow":
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        contents = [tf.constant(content) for content in encoded]
        windows = [tf.constant(box, tf.int32) for box in boxes]
        decode_tf = functools.partial(tf.io.decode_and_crop_jpeg, channels=3)
        works["decode crop (TensorFlow)"] = lambda item: decode_tf(contents[item % len(contents)], windows[item])
    else:
        import cv2
        import numpy as np
        import simplejpeg

        from vit_jax.data import transforms as images

        if not boxes:  # drawn once, for TensorFlow as well
            rng = np.random.default_rng(0)
            shapes = [simplejpeg.decode_jpeg_header(content)[:2] for content in encoded]
            boxes = [images.inception_crop_box(h, w, rng) for _ in range(CROPS_PER_IMAGE) for h, w in shapes]
            pathlib.Path(task["crops"]).write_text(json.dumps(boxes))
        size = (task["image_size"], task["image_size"])

        def decode_crop(item: int) -> Any:
            return images.decode_crop(encoded[item % len(encoded)], *boxes[item])

        def finish(crop: Any) -> Any:
            return cv2.flip(cv2.resize(crop, size, interpolation=cv2.INTER_LINEAR), 1)

        works["decode all (simplejpeg)"] = lambda item: simplejpeg.decode_jpeg(
            encoded[item % len(encoded)], "RGB", fastdct=True
        )
        crops = [images.decode_crop(content, *box) for content, box in zip(encoded, boxes, strict=False)]
        works[FLOOR] = decode_crop
        works["resize and flip (OpenCV)"] = lambda item: finish(crops[item % len(crops)])
        works["decode crop, resize, flip"] = lambda item: finish(decode_crop(item))
    return {what: rates(work, len(boxes), task["cores"]) for what, work in works.items()}
