"""From a source to an iterator of global batches on the devices, exact on restart.

Everything follows from the seed and the position in the stream: which example is at position p, and how it is
augmented. Threads, processes and interruptions change neither, and the iterator's state is one number.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from vit_jax.data.images import EvalTransform, TrainTransform
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.partitioning import global_batch, num_cpus

LocalBatch = dict[str, np.ndarray]


class BatchLoader:
    """Loads batches on a thread pool; each image is decoded and transformed straight into its place."""

    def __init__(self, num_threads: int | None = None):
        """Uses `num_threads` threads, by default one for each core this process may run on."""
        self._num_threads = num_threads or num_cpus()
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="data")

    def load(
        self, image_size: int, items: int, load_chunk: Callable[[range, np.ndarray, np.ndarray], None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fills images uint8 `[items, image_size, image_size, 3]` and labels int32 `[items]`.

        Args:
          image_size: side of the images.
          items: number of examples.
          load_chunk: fills the given range of images and labels.

        Returns:
          images and labels.
        """
        images = np.empty((items, image_size, image_size, 3), np.uint8)
        labels = np.empty((items,), np.int32)
        bounds = np.linspace(0, items, min(items, 4 * self._num_threads) + 1, dtype=int)
        chunks = [range(start, stop) for start, stop in itertools.pairwise(bounds.tolist())]
        for _ in self._pool.map(lambda chunk: load_chunk(chunk, images, labels), chunks):
            pass
        return images, labels


class PositionRandom:
    """Random generators by position: the one at a position is the same whoever asks, in whatever order.

    They are Philox streams (Salmon et al., 2011) that differ in the counter. Setting the counter of one generator is
    ten times faster than making a generator per image. Not for use by two threads at once.
    """

    def __init__(self, seed: int):
        self._philox = np.random.Philox(key=seed)
        self._state: Any = self._philox.state
        self._generator = np.random.Generator(self._philox)

    def at(self, position: int) -> np.random.Generator:
        """The generator of that position. The next call takes it back."""
        # A stream counts in the lowest of the four words, so streams 2^192 apart never meet.
        self._state["state"]["counter"] = np.array([0, 0, 0, position], np.uint64)
        self._philox.state = self._state
        return self._generator


def _local_slice(global_batch_size: int) -> slice:
    """The part of each global batch that this process loads."""
    local = global_batch_size // jax.process_count()
    return slice(jax.process_index() * local, (jax.process_index() + 1) * local)


class TrainBatches(Iterator[dict[str, jax.Array]]):
    """An endless iterator of training batches.

    Each batch is `{"image": uint8 [batch, image_size, image_size, 3], "label": int32 [batch]}`, sharded over the
    devices. Every epoch visits every example once, in an order of its own; a batch may straddle two epochs.
    """

    def __init__(
        self,
        source: Source,
        transform: TrainTransform,
        sharding: NamedSharding,
        *,
        batch_size: int,
        seed: int,
        num_threads: int | None = None,
        prefetch: int = 2,
    ):
        """Reads nothing before the first batch is asked for, and ahead from then on.

        Args:
          source: the examples.
          transform: what is done to each image.
          sharding: how batches lie on the devices.
          batch_size: examples in a global batch, over all processes.
          seed: of order and augmentation.
          num_threads: see `BatchLoader`.
          prefetch: batches made ready on the host, and again on the devices, while a step runs.
        """
        loader = BatchLoader(num_threads)
        local = _local_slice(batch_size)

        def load_batch(batch_index: int, indices: np.ndarray) -> LocalBatch:
            first_position = batch_index * batch_size + local.start
            indices = indices[local]

            def load_chunk(chunk: range, images: np.ndarray, labels: np.ndarray) -> None:
                random = PositionRandom(seed)
                for i in chunk:
                    example = source[int(indices[i])]
                    images[i] = transform(example["image"], random.at(first_position + i))
                    labels[i] = example["label"]

            images, labels = loader.load(transform.image_size, len(indices), load_chunk)
            return {"image": images, "label": labels}

        # Global batches of indices first, this process's part of each second: the data do not depend on the number of
        # processes. Indices are cheap; only this process's images are read.
        # Grain adds the number of the epoch to the seed, so that neighbouring seeds would share their orders; the
        # golden ratio's multiples lie far apart.
        shuffle_seed = seed * 0x9E3779B1 % 2**32
        # More epochs than anyone trains; Grain's endless `repeat()` overflows at batch size 1.
        stream = grain.MapDataset.range(len(source)).shuffle(shuffle_seed).repeat(2**31).batch(batch_size)
        self._host_iterator = (
            stream.map_with_index(load_batch)
            .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch))
            .__iter__()
        )
        self._examples = source.fingerprint()
        self._sharding = sharding
        self._prefetch = prefetch
        self._ready: collections.deque[tuple[dict[str, jax.Array], dict]] = collections.deque()
        self._position: dict = self._host_iterator.get_state()

    def __next__(self) -> dict[str, jax.Array]:
        while len(self._ready) < self._prefetch:
            batch = global_batch(next(self._host_iterator), self._sharding)
            self._ready.append((batch, self._host_iterator.get_state()))
        batch, self._position = self._ready.popleft()
        return batch

    def get_state(self) -> dict:
        """The position after the last batch that was handed out, as JSON-compatible data."""
        return {"position": self._position, "examples": self._examples}

    def set_state(self, state: dict) -> None:
        """Goes to a position from `get_state`, in constant time.

        Raises:
          UserError: the list of examples is not the one that the position was in.
        """
        if state["examples"] != self._examples:
            raise UserError(
                "the data set has changed since the last start: it has other files, or other names of files. Bring "
                "back what it was to go on, or start in a new workdir."
            )
        self._ready.clear()
        self._host_iterator.set_state(state["position"])
        self._position = state["position"]


class EvalBatches:
    """An iterable of evaluation batches: fixed order, every example exactly once over all processes.

    Each batch is `{"image": uint8 [batch, image_size, image_size, 3], "label": int32 [batch], "mask": float32
    [batch]}`. The last one is filled up with zeros whose mask is 0.
    """

    def __init__(
        self,
        source: Source,
        transform: EvalTransform,
        sharding: NamedSharding,
        *,
        batch_size: int,
        num_threads: int | None = None,
    ):
        """See `TrainBatches` for the arguments. Nothing is read before iteration."""
        self._source = source
        self._transform = transform
        self._sharding = sharding
        self._batch_size = batch_size
        self._loader = BatchLoader(num_threads)

    def __len__(self) -> int:
        return math.ceil(len(self._source) / self._batch_size)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        local = _local_slice(self._batch_size)

        def load_batch(batch_index: int) -> LocalBatch:
            start = batch_index * self._batch_size
            indices = np.arange(start + local.start, start + local.stop)
            mask = (indices < len(self._source)).astype(np.float32)

            def load_chunk(chunk: range, images: np.ndarray, labels: np.ndarray) -> None:
                for i in chunk:
                    if mask[i]:
                        example = self._source[int(indices[i])]
                        images[i], labels[i] = self._transform(example["image"]), example["label"]
                    else:
                        images[i], labels[i] = 0, 0

            images, labels = self._loader.load(self._transform.image_size, len(indices), load_chunk)
            return {"image": images, "label": labels, "mask": mask}

        batches = grain.MapDataset.range(len(self)).map(load_batch)
        for batch in batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)):
            yield global_batch(batch, self._sharding)
