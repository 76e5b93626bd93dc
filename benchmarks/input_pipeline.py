r"""How fast images reach the model: vit_jax's input, tf.data and a PyTorch-style DataLoader, and what bounds them.

    # A few minutes, on the images that are to be trained on: a folder train/<class>/<image>, or a zip file of JPEGs
    python benchmarks/input_pipeline.py --data=imagenet_sample_300.zip

    # The peers may live in environments of their own; one that does not import is reported and left out
    python benchmarks/input_pipeline.py --data=imagenet_sample_300.zip --python_tf=~/tf/bin/python \
        --python_torch=~/torch/bin/python --json=input_pipeline.json

    # Do more threads and processes help? What does a restart in the middle of a long run cost, and is it exact?
    python benchmarks/input_pipeline.py --what=scaling --threads 1 2 4 8 --processes 0 1 2
    python benchmarks/input_pipeline.py --what=restore

All make training batches of the same files without end: Inception crop of 5 to 100 % of the area, resize, flip. In each
round each contender has a fresh process, one after the other, in an order that rotates, so that a machine whose speed
drifts treats them alike; reported are medians over the rounds. A few hundred images are read again and again, so they
lie in the page cache and no disk is measured. `taskset -c 0,1 python ...` measures two cores of a larger machine.

images/s is counted after --warm_up batches, by a consumer that does nothing but take them. CPU seconds are those of
all the contender's processes. "PSS" is their memory, a page that n processes share counted as 1/n for each: the highest
over a few batches after the timed ones. Libraries that other programs on the machine use too count less, so it wants an
idle machine. "Peak RSS" is the sum of the highest resident size of each process, what they share counted every time.
"First s" counts from the start of the process to its first batch, imports included. "Floor" is what no pipeline with
the same decoder can beat: decoding crops drawn as in training, from memory, on all cores, with nothing around it.

What it needs: vit_jax's own dependencies; tensorflow for tf.data, with tensorflow_datasets for --storage=tfrecord;
torch and pillow (not torchvision) for the DataLoader. Memory and CPU seconds are known on Linux alone. JAX runs on the
CPU unless $JAX_PLATFORMS says otherwise.
"""

import argparse
import contextlib
import dataclasses
import functools
import glob
import itertools
import json
import os
import pathlib
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# So that it runs from a clone that is not installed, and by the peers' interpreters. Nothing but the standard library
# is imported before it is known what this process is to be.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from vit_jax.errors import UserError, unknown_name

JPEG_SUFFIXES = (".jpg", ".jpeg")
AREA = (0.05, 1.0)  # of the crops, as a share of the image
MEASURED = ["images_per_second", "images_per_second_per_core", "images_per_cpu_second"]
MEASURED += ["pss_bytes", "peak_rss_bytes", "startup_seconds"]
FLOOR = "decode crop (vit_jax)"  # the one that the pipelines are compared with
CROPS_PER_IMAGE = 3  # of the floor
MODULES = ["jax", "grain", "numpy", "simplejpeg", "cv2", "tensorflow", "tensorflow_datasets", "torch", "PIL"]
RESTORE_EXAMPLES, RESTORE_STEP, WALKED_STEPS = 14_000_000, 1_000_000, 1000  # as many images as ImageNet-21k has


@dataclasses.dataclass(frozen=True)
class Contender:
    """What is measured as one row.

    Attributes:
      name: of the row.
      worker: what makes its batches, by its name in `BATCHES`.
      python: interpreter of its process.
      includes: what is done for a batch before it counts, for the reader.
      options: more for the worker's task.
    """

    name: str
    worker: str
    python: str
    includes: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


# --- Processes of the contenders: each imports what it needs, and nothing else ---------------------------------------


def vit_jax_batches(task: dict[str, Any]) -> Iterator[Any]:
    """Batches of this project: as arrays on the device, or as the host has them if the task says so."""
    import jax

    from vit_jax.data.pipeline import TrainBatches
    from vit_jax.data.sources import open_source
    from vit_jax.data.transforms import TrainTransform
    from vit_jax.sharding import batch_sharding, make_mesh

    source = open_source(task["records"] or task["folder"], "train")
    if task["storage"] == "memory":
        source = in_memory(source)
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


def in_memory(source: Any) -> Any:
    """The same source with all its examples read."""
    examples = [source[index] for index in range(len(source))]

    class InMemory(type(source)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__.update(vars(source))

        def __getitem__(self, index: int) -> Any:
            return examples[index]

    return InMemory()


def tf_data_batches(task: dict[str, Any]) -> Iterator[Any]:
    """Batches of tf.data, with the operations, the order of stages and the options that big_vision trains with.

    Two things are more favourable than there: the number of parallel calls is tuned, not 100; and the shuffle buffer
    holds the bytes of nothing but these few images.
    """
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    files = list_files(task)
    labels = [label for _, label in files]
    if task["records"]:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(task["records"])
        encoded = {"image": tfds.decode.SkipDecoding()}
        data = builder.as_dataset(split="train", shuffle_files=True, decoders=encoded)
        data = data.map(lambda example: (example["image"], example["label"]))
    elif task["storage"] == "memory":
        data = tf.data.Dataset.from_tensor_slices(([path.read_bytes() for path, _ in files], labels))
    else:
        data = tf.data.Dataset.from_tensor_slices(([str(path) for path, _ in files], labels))

    size, read = task["image_size"], task["storage"] == "files"

    def preprocess(image: Any, label: Any) -> dict[str, Any]:
        content = tf.io.read_file(image) if read else image
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

    The crop is drawn as torchvision's RandomResizedCrop does, and as there the whole image is decoded and the resize
    is antialiased. More favourable than torchvision's usual chain: uint8 as it comes, no float32, no transposition.
    """
    import io
    import math

    import numpy as np
    import torch
    from PIL import Image

    files = list_files(task)
    contents = [path.read_bytes() for path, _ in files] if task["storage"] == "memory" else []
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
            with Image.open(io.BytesIO(contents[index]) if contents else path) as opened:
                image = opened.convert("RGB")
            image = image.crop(crop_box(*image.size)).resize((size, size), Image.Resampling.BILINEAR)
            if random.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return torch.from_numpy(np.array(image)), label

    images = Images()
    loader = torch.utils.data.DataLoader(
        images,
        batch_size=task["batch_size"],
        # Epoch after epoch within one: at its end the workers would have nothing to do.
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


def measure(name: str, task: dict[str, Any]) -> dict[str, Any]:
    """Takes batches from a contender in this process; returns one round of a row."""
    batches = BATCHES[name](task)
    first = next(batches)
    startup_seconds = time.monotonic() - task["started"]
    for _ in range(task["warm_up"]):
        next(batches)
    start, cpu_start = time.perf_counter(), cpu_seconds()
    for _ in range(task["batches"]):
        next(batches)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    images = task["batches"] * task["batch_size"]
    memory = [memory_bytes() for _ in itertools.islice(batches, 5)]
    return {
        "images_per_second": images / seconds,
        "images_per_second_per_core": images / seconds / task["cores"],
        "images_per_cpu_second": images / cpu if cpu else None,
        "pss_bytes": max(pss for pss, _ in memory) or None,
        "peak_rss_bytes": max(peak for _, peak in memory) or None,
        "startup_seconds": startup_seconds,
        "batch": f"{str(first.dtype).removeprefix('torch.')} {list(first.shape)}",
    }


def read_if_there(file: pathlib.Path) -> str:
    """Text of a file of /proc; empty where its thread or process has ended meanwhile."""
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def process_tree() -> list[pathlib.Path]:
    """This process and all that it started, as folders of /proc; nothing where there is no such folder."""
    found, new = [], [pathlib.Path(f"/proc/{os.getpid()}")]
    while new:
        process = new.pop()
        found.append(process)
        for children in glob.glob(f"{process}/task/*/children"):
            new += [pathlib.Path(f"/proc/{child}") for child in read_if_there(pathlib.Path(children)).split()]
    return [process for process in found if process.exists()]


def cpu_seconds() -> float:
    """CPU time that the processes of this tree have used, in user and kernel mode; 0 where it is not known."""
    # The name of the program, in parentheses, may hold spaces; the two numbers are the 12th and 13th after it.
    stats = [read_if_there(process / "stat").rpartition(")")[2].split() for process in process_tree()]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats if stat) / os.sysconf("SC_CLK_TCK") if stats else 0.0


def memory_bytes() -> tuple[int, int]:
    """PSS and peak RSS of this tree, each summed; 0 where they are not known."""

    def kilobytes(file: str, field: str) -> int:
        lines = [line.split() for process in process_tree() for line in read_if_there(process / file).splitlines()]
        return sum(int(words[1]) for words in lines if words[0] == f"{field}:")

    return 1024 * kilobytes("smaps_rollup", "Pss"), 1024 * kilobytes("status", "VmHWM")


def list_files(task: dict[str, Any]) -> list[tuple[pathlib.Path, int]]:
    """Images with their classes, in the order that vit_jax has them in."""
    classes = sorted(path for path in pathlib.Path(task["folder"], "train").iterdir() if path.is_dir())
    return [(file, label) for label, folder in enumerate(classes) for file in sorted(folder.iterdir())]


# --- The floor -------------------------------------------------------------------------------------------------------


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


def floor(name: str, task: dict[str, Any]) -> dict[str, Any]:
    """What the libraries do alone, by name: see `rates`."""
    encoded = [path.read_bytes() for path, _ in list_files(task)]
    boxes = json.loads(pathlib.Path(task["crops"]).read_text()) if pathlib.Path(task["crops"]).exists() else []
    works: dict[str, Callable[[int], Any]] = {}
    if name == "floor_tf":
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


# --- Restoring -------------------------------------------------------------------------------------------------------


def restore(name: str, task: dict[str, Any]) -> dict[str, Any]:
    """Goes to a late step of a large data set whose images are made from their number, and checks what is there."""
    import grain
    import jax
    import numpy as np

    from vit_jax.data.pipeline import PositionRandom, TrainBatches
    from vit_jax.data.transforms import TrainTransform
    from vit_jax.sharding import batch_sharding, make_mesh

    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)

    class Numbers:
        name = split = "numbers"
        splits, class_names, num_classes, max_labels = ("numbers",), None, RESTORE_EXAMPLES, 1

        def __len__(self) -> int:
            return RESTORE_EXAMPLES

        def __getitem__(self, index: int) -> dict[str, Any]:
            # Three bytes of the number, one for each channel: no two images are alike.
            return {"image": noise + np.array([index & 255, index >> 8 & 255, index >> 16], np.uint8), "label": index}

        def fingerprint(self) -> str:
            return "numbers"

        def where(self, index: int) -> str:
            return f"number {index}"

    source: Any = Numbers()
    sharding, seed, batch_size = batch_sharding(make_mesh()), 0, task["batch_size"]

    def make(image_size: int) -> Any:
        transform = TrainTransform(image_size)
        return transform, TrainBatches(source, transform, sharding, batch_size=batch_size, seed=seed)

    def equal(batch: Any, other: Any) -> bool:
        return all(np.array_equal(batch[name], other[name]) for name in ("image", "label"))

    # As far as walking is affordable: a restored iterator gives the batch that another walked to.
    (_, walking), (_, restored) = make(8), make(8)
    for _ in itertools.islice(walking, WALKED_STEPS):
        pass
    state = json.loads(json.dumps(walking.get_state()))
    restored.set_state(state)
    equals_walked = equal(next(restored), next(walking))

    jax.block_until_ready(next(make(task["image_size"])[1]))  # what the first batch of a process pays for
    first = task["step"] * batch_size
    start = time.perf_counter()
    transform, late = make(task["image_size"])
    late.set_state({**state, "images": first})
    set_seconds = time.perf_counter() - start
    batch = jax.block_until_ready(next(late))
    seconds = time.perf_counter() - start

    # Beyond: image by image, by what is promised of a position in the stream, without iterator, batch or state. It is
    # said once more here on purpose. The order is Grain's shuffle; crop and flip follow from the position's generator.
    order = grain.MapDataset.range(len(source)).shuffle(seed * 0x9E3779B1 % 2**32).repeat(2**31)
    labels = [int(order[first + i]) for i in range(batch_size)]
    random = PositionRandom(seed)
    images = [transform(source[label]["image"], random.at(first + i)) for i, label in enumerate(labels)]
    equals_defined = equal(batch, {"image": np.stack(images), "label": np.array(labels)})
    return {
        "examples": len(source),
        "step": task["step"],
        "set_state_seconds": set_seconds,
        "restore_seconds": seconds,
        "state_bytes": len(json.dumps(late.get_state())),
        "equals_defined": equals_defined,
        "equals_walked": equals_walked,
        "is_exact": equals_defined and equals_walked,
    }


# --- The data --------------------------------------------------------------------------------------------------------


def unpack(archive: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the JPEG files of a zip file as train/<class>/<file>.

    The class is the file's folder, or what comes before the first underscore of its name where it has none.

    Raises:
      UserError: not a zip file of JPEG files.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [name for name in opened.namelist() if name.lower().endswith(JPEG_SUFFIXES)]
            for member in members:
                path = pathlib.PurePosixPath(member)
                target = folder / "train" / (path.parent.name or path.name.partition("_")[0]) / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(opened.read(member))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--data: cannot read {archive} as a zip file of JPEG files: {error}.") from error
    if not members:
        raise UserError(f"--data: {archive} has no .jpg or .jpeg files.")


def write_records(name: str, task: dict[str, Any]) -> dict[str, Any]:
    """Writes the images as TensorFlow Datasets stores them, TFRecord files and their description; returns where."""
    import tensorflow_datasets as tfds

    files = list_files(task)

    class InputPipelineSample(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            classes = tfds.features.ClassLabel(names=sorted({path.parent.name for path, _ in files}))
            features = {"image": tfds.features.Image(encoding_format="jpeg"), "label": classes}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for path, label in files:
                yield f"{path.parent.name}/{path.name}", {"image": str(path), "label": label}

    builder = InputPipelineSample(data_dir=task["target"], file_format="tfrecord")
    builder.download_and_prepare()
    return {"records": str(builder.data_path)}


# --- The process that the user starts --------------------------------------------------------------------------------

WORKERS: dict[str, Callable[[str, dict[str, Any]], dict[str, Any]]] = {
    **dict.fromkeys(BATCHES, measure),
    "floor": floor,
    "floor_tf": floor,
    "restore": restore,
    "write_records": write_records,
}


def work(name: str, task: dict[str, Any]) -> int:
    """What a contender's process does; its last line of output is the result as JSON."""
    try:
        result = WORKERS[name](name, task)
    except ImportError as error:
        result = {"problem": f"not installed: {error}"}
    except Exception as error:
        traceback.print_exc()
        result = {"problem": f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    loaded = {module: sys.modules[module] for module in MODULES if module in sys.modules}
    versions = {module: getattr(loaded[module], "__version__", "?") for module in loaded}
    print(json.dumps(result | {"versions": {"python": platform.python_version(), **versions}}), flush=True)
    return 0


def run_worker(worker: str, python: str, task: dict[str, Any]) -> dict[str, Any]:
    """Runs one of `WORKERS` in a process of its own; returns its result, or a "problem"."""
    task = {**task, "started": time.monotonic()}  # a clock that all processes share
    command = [python, str(pathlib.Path(__file__).resolve()), "--worker", worker, json.dumps(task)]
    environment = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
        except OSError as error:
            raise UserError(f"cannot start {python} ({error.strerror}); --python_... take an interpreter.") from error
        assert process.stdout
        try:
            result = next((json.loads(line) for line in process.stdout if line.startswith('{"')), None)
        finally:
            # What ends by itself gives its shared memory back. The rest must not disturb whose turn is next.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
        if result is None:
            result = {"problem": f"failed: its process ended with status {process.returncode}", "versions": {}}
        if result.get("problem", "").startswith("failed"):
            errors.seek(0)
            print(errors.read()[-2000:], file=sys.stderr)
    return result


def contenders(arguments: argparse.Namespace) -> list[Contender]:
    """Who takes part."""
    ours = functools.partial(Contender, worker="vit_jax", python=sys.executable)
    if arguments.what == "scaling":
        note = "uint8 batches as global arrays on the device; the threads are those of each process"
        return [
            ours(
                f"threads {threads}, processes {processes}",
                includes=note,
                options={"device": True, "num_threads": threads, "num_workers": processes},
            )
            for processes, threads in itertools.product(arguments.processes, arguments.threads)
        ]
    host = "uint8 batches as NumPy arrays, nothing sent"
    device = "uint8 batches as global arrays on the device"
    float32 = "as tf.data, but float32 in [-1, 1], as big_vision makes them"
    pil = "uint8 batches as tensors in the main process, from a worker process for each core"
    if arguments.storage == "tfrecord":
        pil += "; of the files, not the records"
    tf_data = functools.partial(Contender, worker="tf_data", python=arguments.python_tf)
    own_pool, no_pool = f"{host}; big_vision's options (48 threads)", f"{host}; tf.data's own options"
    return [
        ours("vit_jax", includes=device, options={"device": True}),
        ours("vit_jax host", includes=host, options={"device": False}),
        tf_data("tf.data", includes=own_pool, options={"float32": False, "pool": 48}),
        tf_data("tf.data defaults", includes=no_pool, options={"float32": False, "pool": None}),
        tf_data("tf.data float32", includes=float32, options={"float32": True, "pool": 48}),
        Contender("PIL", "data_loader", arguments.python_torch, pil),
    ]


def throughput(arguments: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    """Measures all contenders and the floor in turns."""
    every = contenders(arguments)
    for name in arguments.only:
        if name not in [each.name for each in every]:
            raise unknown_name("contender", name, [each.name for each in every])
    every = [each for each in every if not arguments.only or each.name in arguments.only]
    # The floor first, and vit_jax's part of it before TensorFlow's, which reads the crops that the former drew.
    floors = [
        Contender("floor", "floor", sys.executable, "the first four rows of the floor"),
        Contender("floor of TensorFlow", "floor_tf", arguments.python_tf, "the last row of the floor"),
    ]
    floors = floors if arguments.what == "throughput" else []
    rounds: dict[str, list[dict[str, Any]]] = {each.name: [] for each in [*floors, *every]}
    problems: dict[str, str] = {}
    versions: dict[str, dict[str, str]] = {}
    for number in range(arguments.rounds):
        turn = number % len(every)
        for each in floors + every[turn:] + every[:turn]:
            if each.name not in problems:
                print(f"round {number + 1} of {arguments.rounds}: {each.name}", file=sys.stderr, flush=True)
                result = run_worker(each.worker, each.python, task | each.options)
                versions[each.name] = result.pop("versions")
                if "problem" in result:
                    problems[each.name] = result["problem"]
                else:
                    rounds[each.name].append(result)

    floor_rates = {
        what: {threads: statistics.median(result[what][threads] for result in rounds[each.name]) for threads in rates}
        for each in floors
        for what, rates in (rounds[each.name] or [{}])[0].items()
    }
    rows = [summarise(each, rounds[each.name], problems.get(each.name)) for each in every]
    speeds = {row["name"]: row["images_per_second"] for row in rows}
    references = {
        "to_tf_data": max(speeds.get("tf.data") or 0, speeds.get("tf.data defaults") or 0),  # the faster of two
        "to_pil": speeds.get("PIL"),
        "of_floor": floor_rates.get(FLOOR, {}).get("all_cores"),
    }
    for row in rows:
        for name, reference in references.items():
            row[name] = row["images_per_second"] / reference if reference and row["images_per_second"] else None
    notes = {each.name: problems.get(each.name, each.includes) for each in every + floors}
    return {"rows": rows, "floor": floor_rates, "notes": notes, "versions": versions}


def summarise(contender: Contender, rounds: list[dict[str, Any]], problem: str | None) -> dict[str, Any]:
    """A row: medians over the rounds, each of which is what `measure` returned; None for what is not known."""
    row: dict[str, Any] = {"name": contender.name, "problem": problem}
    for name in MEASURED:
        values = [each[name] for each in rounds if each[name] is not None]
        row[name] = statistics.median(values) if values else None
    speeds = [each["images_per_second"] for each in rounds]
    return row | {"least_and_most": [min(speeds), max(speeds)] if speeds else None, "rounds": rounds}


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table, its first column to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)) + " |"
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    )


def describe(result: dict[str, Any]) -> str:
    """The result for people."""

    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else f"{value * scale:{form}}"

    parts = []
    if rows := result.get("rows"):
        header = "pipeline|images/s|min to max|a core|a CPU s|to tf.data|to PIL|of floor|PSS MB|peak RSS MB|first s"
        table = [
            [
                row["name"],
                number(row["images_per_second"], ".0f"),
                " to ".join(f"{speed:.0f}" for speed in row["least_and_most"] or []) or "-",
                number(row["images_per_second_per_core"], ".0f"),
                number(row["images_per_cpu_second"], ".0f"),
                *(number(row[name], ".3f") for name in ("to_tf_data", "to_pil", "of_floor")),
                number(row["pss_bytes"], ".0f", 1e-6),
                number(row["peak_rss_bytes"], ".0f", 1e-6),
                number(row["startup_seconds"], ".1f"),
            ]
            for row in rows
        ]
        parts.append(format_table(header.split("|"), table) + "\n")
    if floors := result.get("floor"):
        table = [[what, f"{rate['one_thread']:.0f}", f"{rate['all_cores']:.0f}"] for what, rate in floors.items()]
        parts.append(format_table(["floor, images/s", "one thread", "all cores"], table) + "\n")
    if "restore_seconds" in result:
        milliseconds = {name: 1e3 * result[f"{name}_seconds"] for name in ("set_state", "restore")}
        parts.append(
            f"step {result['step']:,} of {result['examples']:,} examples: new iterator and set_state "
            f"{milliseconds['set_state']:.1f} ms, with the first batch {milliseconds['restore']:.1f} ms; "
            f"state {result['state_bytes']} bytes\nequal to the batch made image by image from its positions: "
            f"{result['equals_defined']}; to the one after {WALKED_STEPS:,} steps walked: {result['equals_walked']}\n"
        )
    for name, versions in result["versions"].items():
        note = f"{result['notes'][name]} " if "notes" in result else ""
        parts.append(f"- {name}: {note}({', '.join(' '.join(item) for item in versions.items())})")
    return "\n".join(parts)


def machine_facts() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": (models or [platform.processor() or platform.machine()])[0],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
    }


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = pathlib.Path(os.environ.get("VIT_JAX_DATA", "."), "imagenet_sample_300.zip")  # as the tests look for it
    parser.add_argument("--what", default="throughput", help="throughput, scaling or restore")
    home = os.path.expanduser  # shells leave the ~ in --flag=~/file alone
    parser.add_argument(
        "--data",
        type=lambda text: pathlib.Path(home(text)),
        default=data,
        help="zip file of JPEGs or folder with train/",
    )
    parser.add_argument(
        "--storage", default="files", help="files; memory: read before the first batch; tfrecord: as TFDS stores them"
    )
    parser.add_argument("--python_tf", type=home, default=sys.executable, help="interpreter that has tensorflow")
    parser.add_argument("--python_torch", type=home, default=sys.executable, help="interpreter that has torch and PIL")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="contenders by the name of their row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=150, help="timed batches of a round")
    parser.add_argument("--warm_up", type=int, default=30, help="batches before them")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of --what=scaling")
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1, 2], help="of --what=scaling; 0: no workers")
    parser.add_argument("--step", type=int, default=RESTORE_STEP, help="of --what=restore")
    parser.add_argument("--json", type=pathlib.Path, help="file for all that was measured")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # a contender's process: name and task
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Checks the flags.

    Raises:
      UserError: a flag has a value that means nothing.
    """
    choices = {"what": ["throughput", "scaling", "restore"], "storage": ["files", "memory", "tfrecord"]}
    for name, known in choices.items():
        if getattr(arguments, name) not in known:
            raise unknown_name(f"--{name}", getattr(arguments, name), known)
    for name in ("rounds", "batches", "batch_size", "image_size", "step"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    if arguments.what != "restore" and not arguments.data.exists():
        raise UserError(f"--data: {arguments.data} does not exist. Give a zip file of JPEGs or a folder with train/.")


def benchmark(arguments: argparse.Namespace) -> int:
    """Measures, prints and writes everything; returns the exit status."""
    check_arguments(arguments)
    facts = machine_facts()
    settings = {
        name: str(value) if isinstance(value, pathlib.Path) else value for name, value in vars(arguments).items()
    }
    task = {**settings, "cores": facts["cores"], "records": None}
    print(f"{facts['cpu']}, {facts['cores']} cores, load average {facts['load_average']:.2f} before; {facts['system']}")
    with tempfile.TemporaryDirectory(prefix="input-pipeline-") as temporary:
        if arguments.what == "restore":
            result = run_worker("restore", sys.executable, task)
            result["versions"] = {"restore": result["versions"]}
        else:
            task |= {"folder": str(arguments.data), "crops": f"{temporary}/crops.json"}
            if not arguments.data.is_dir():
                task["folder"] = f"{temporary}/images"
                unpack(arguments.data, pathlib.Path(task["folder"]))
            sizes = [path.stat().st_size for path, _ in list_files(task)]
            facts |= {"images": len(sizes), "bytes": sum(sizes)}
            print(f"{len(sizes)} images of {sum(sizes) / len(sizes) / 1e3:.0f} kB on average, from the page cache")
            if arguments.storage == "tfrecord":
                written = run_worker("write_records", arguments.python_tf, {**task, "target": f"{temporary}/tfds"})
                if "problem" in written:
                    raise UserError(f"--storage=tfrecord, with --python_tf={arguments.python_tf}: {written['problem']}")
                task["records"] = written["records"]
            result = throughput(arguments, task)
    if "problem" in result:
        raise UserError(result["problem"])
    print(f"\n{describe(result)}")
    if arguments.json:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = {"command": sys.argv[1:], "time": now, "machine": facts, "settings": settings, **result}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    failed = any(note.startswith("failed") for note in result.get("notes", {}).values())
    return int(failed or not result.get("is_exact", True))


def main() -> int:
    """The command; returns its exit status."""
    arguments = make_parser().parse_args()
    try:
        if arguments.worker:
            return work(arguments.worker[0], json.loads(arguments.worker[1]))
        return benchmark(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
