"""From a source to an iterator of global batches on the devices, exact on restart.

Everything follows from the seed and the position in the stream: which example is at position p, and how it is
augmented. Threads, processes and interruptions change neither, and the iterator's state is one number.
"""

import dataclasses
import functools
import logging
import math
import mmap
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from grain.experimental import index_shuffle
from jax.sharding import NamedSharding

from vit_jax.console import num_cpus
from vit_jax.data.permutation import permutation
from vit_jax.data.sources.base import NO_LABEL, BadRecordError, Example, Source, turns_images
from vit_jax.data.sources.mixture import Mixture
from vit_jax.data.transforms import EvalTransform, ImageError, TrainTransform
from vit_jax.errors import UserError
from vit_jax.sharding import global_batch, local_rows

logger = logging.getLogger(__name__)

LocalBatch = dict[str, np.ndarray]

_BATCHES_IN_WORK = 2  # so that the threads have work while the last images of a batch are being finished
_MAX_CHUNK = 8  # images that a thread takes at once
_SHORT = 2**16  # Grain's permutations take 2^16 / length times as long for data sets shorter than this
_MAKE_POOL = threading.Lock()
_NO_EXAMPLE = -1  # index that fills up the last batch of an evaluation


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


class BatchMemory:
    """Memory for images, used again once nobody holds the array it was given out as, nor a view of it.

    New memory costs a page fault for every 4 kB, at a batch of 512 images a tenth of the time; and what malloc keeps to
    save them grows to a multiple of what is in use.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_free": []}

    def empty(self, *shape: int) -> np.ndarray:
        """An array of uint8 with any contents."""
        size = math.prod(shape)
        try:  # several threads ask, so that to look first would not do
            memory = self._free.pop()
        except IndexError:
            memory = None
        if memory is None or len(memory) != size:
            # Begins at a page, so that the CPU backend takes it without copying it.
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Views refer to this array, not to what is below: that is no array.
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, self._free.append, memory)
        return array.reshape(shape)


class BatchLoader:
    """Loads examples on a pool of threads; each image is decoded and transformed straight into its place.

    It can be sent to another process, which makes a pool of its own.
    """

    def __init__(
        self,
        source: Source,
        transform: TrainTransform | EvalTransform,
        *,
        num_classes: int | None = None,
        num_threads: int | None = None,
    ):
        """Starts no thread and reads nothing yet.

        Args:
          source: the examples.
          transform: what is done to each image.
          num_classes: labels must be less; None: as the source says.
          num_threads: by default one for each core this process may run on.
        """
        self._source, self._transform = source, transform
        self._num_classes = num_classes or source.num_classes
        self._num_threads = num_threads or num_cpus()
        self._memory = BatchMemory()
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None}

    def load(
        self, indices: Sequence[int] | np.ndarray, positions: Sequence[int] | None = None, seed: int = 0
    ) -> tuple[LocalBatch, dict[int, str]]:
        """Loads the examples at `indices`; negative ones stand for images and labels that are not there.

        Args:
          indices: of the examples in the source.
          positions: of the examples in the stream; with the seed they decide the augmentation. None: 0, 1, ...
          seed: of the augmentation.

        Returns:
          `image`, uint8 `[len(indices), image_size, image_size, 3]`, and `label`, int32 `[len(indices)]`, or
          `[len(indices), max_labels]` if the source has several; then, by index, messages about the examples that
          could not be read, whose images are zeros without label.

        Raises:
          UserError: a label that there cannot be.
        """
        size, max_labels = self._transform.image_size, self._source.max_labels
        images = self._memory.empty(len(indices), size, size, 3)
        labels = np.full((len(indices), max_labels), NO_LABEL, np.int32)
        bad: dict[int, str] = {}
        positions = range(len(indices)) if positions is None else positions

        def load_chunk(chunk: range) -> None:
            random = PositionRandom(seed)
            for i in chunk:
                index = int(indices[i])
                if index == _NO_EXAMPLE:
                    images[i] = 0
                    continue
                try:
                    example = self._source[index]
                    turn = example.get("exif_orientation", False)
                    if isinstance(self._transform, EvalTransform):
                        images[i] = self._transform(example["image"], exif_orientation=turn)
                    else:
                        rng = random.at(positions[i])
                        images[i] = self._transform(example["image"], rng, exif_orientation=turn)
                except BadRecordError as error:
                    images[i] = 0
                    bad[index] = str(error).rstrip(".")
                except ImageError as error:
                    images[i] = 0
                    bad[index] = f"cannot read {self._source.where(index)}: {error}"
                else:
                    self._fill_labels(labels[i], example, index)

        with _MAKE_POOL:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="data")
        step = max(1, min(_MAX_CHUNK, len(indices) // (4 * self._num_threads)))
        chunks = [range(start, min(start + step, len(indices))) for start in range(0, len(indices), step)]
        for _ in self._pool.map(load_chunk, chunks):
            pass
        return {"image": images, "label": labels if max_labels > 1 else labels[:, 0]}, dict(sorted(bad.items()))

    def forget_memory(self) -> None:
        """Gives memory for batches back, as soon as nobody holds them."""
        self._memory = BatchMemory()

    def _fill_labels(self, row: np.ndarray, example: Example, index: int) -> None:
        label = example["label"]
        given = [int(label)] if isinstance(label, int | np.integer) else [int(each) for each in label]
        if len(given) > len(row):
            raise UserError(
                f"{self._source.where(index)} has {len(given)} labels, but at most {len(row)} are provided for. Set "
                f"data.max_labels to the most there are."
            )
        for each in given:
            if each < NO_LABEL or (self._num_classes is not None and each >= self._num_classes):
                raise UserError(
                    f"{self._source.where(index)} has label {each}, but there are {self._num_classes} classes: labels "
                    f"are 0 to {(self._num_classes or 0) - 1}, or {NO_LABEL} for none. Check the data, or set "
                    "model.num_classes."
                )
        row[: len(given)] = given


class BadRecords:
    """Counts examples that could not be read, each once however often it comes, and raises when there are too many."""

    def __init__(self, limit: int):
        """Allows for `limit` of them from now on."""
        self._limit = limit
        self._indices: set[int] = set()

    @property
    def count(self) -> int:
        """How many there were."""
        return len(self._indices)

    def add(self, messages: Mapping[int, str]) -> None:
        """Takes messages by index from `BatchLoader.load`.

        Raises:
          UserError: there are more than the limit.
        """
        for index in sorted(messages.keys() - self._indices):
            self._indices.add(index)
            if self.count > self._limit:
                most = f" These are more than data.max_bad_records={self._limit}." if self._limit else ""
                raise UserError(
                    f"{messages[index]}.{most}\nReplace the file, or set data.max_bad_records to leave out up to so "
                    "many images with a warning."
                )
            logger.warning("%s; left out (%d of at most %d)", messages[index], self.count, self._limit)


class IndexStream:
    """The endless order of a source's examples: `stream[position]` is an index, found at once for any position.

    Each epoch visits every example once, in an order of its own. Of a mixture that holds for each of its sources.
    """

    def __init__(self, source: Source, seed: int):
        """Computes nothing yet; `seed` decides the order."""
        # Neighbouring seeds must not share their orders, though the number of the epoch is added to them; the multiples
        # of the golden ratio lie far apart.
        self._seed = seed * 0x9E3779B1
        self._starts: tuple[int, ...] = (0, len(source))
        self._turns: grain.MapDataset | None = None
        if isinstance(source, Mixture):
            self._starts = source.starts
            turns = [
                grain.MapDataset.range(2**40).map(lambda i, part=part: (part, i)) for part in range(len(source.weights))
            ]
            self._turns = grain.MapDataset.mix(turns, source.weights)

    def __getitem__(self, position: int) -> int:
        part, position = (0, position) if self._turns is None else self._turns[position]
        start, stop = self._starts[part : part + 2]
        epoch, position = divmod(position, stop - start)
        seed = (self._seed + part * 0x85EBCA6B + epoch) % 2**32
        return start + _shuffled(position, stop - start, seed)


def _shuffled(position: int, length: int, seed: int) -> int:
    """Where `position` goes in the permutation of `range(length)` that `seed` stands for."""
    if length < _SHORT:
        return int(_permutation(length, seed)[position])
    return index_shuffle(position, max_index=length - 1, seed=seed, rounds=4)


# Of each part of a mixture, as neighbouring positions are in different ones.
_permutation = functools.lru_cache(maxsize=64)(permutation)


@dataclasses.dataclass
class _LoadTrainBatch:
    """Maps a batch's number to this process's rows of it. Sent to worker processes."""

    loader: BatchLoader
    order: IndexStream
    batch_size: int
    rows: np.ndarray
    seed: int

    def __call__(self, batch_index: int) -> tuple[LocalBatch, dict[int, str]]:
        # Positions in the global batch: the data do not depend on the number of processes.
        positions = [batch_index * self.batch_size + int(row) for row in self.rows]
        return self.loader.load([self.order[position] for position in positions], positions, self.seed)


def _start_worker(index: int, count: int) -> None:
    """Makes a worker process leave Ctrl-C to its parent, and end when that is gone, killed perhaps."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class TrainBatches(Iterator[dict[str, jax.Array]]):
    """An endless iterator of training batches.

    Each batch is `{"image": uint8 [batch, image_size, image_size, 3], "label": int32 [batch] or [batch, max_labels]}`,
    sharded over the devices. Every epoch visits every example once, in an order of its own; a batch may straddle two
    epochs.

    Attributes:
      bad_records: counts the examples that could not be read since the start.
    """

    def __init__(
        self,
        source: Source,
        transform: TrainTransform,
        sharding: NamedSharding,
        *,
        batch_size: int,
        seed: int,
        num_classes: int | None = None,
        num_threads: int | None = None,
        num_workers: int = 0,
        prefetch: int = 2,
        max_bad_records: int = 0,
        rows: np.ndarray | None = None,
    ):
        """Reads nothing before the first batch is asked for, and ahead from then on.

        Args:
          source: the examples.
          transform: what is done to each image.
          sharding: how batches lie on the devices.
          batch_size: examples in a global batch, over all processes.
          seed: of order and augmentation.
          num_classes: labels must be less; None: as the source says.
          num_threads: that decode, in each worker process if there are some; None: share the cores out.
          num_workers: worker processes that load whole batches in turn, for hosts with more cores than one Python
            process can feed (some 15); 0: this process does it. The batches do not depend on it.
          prefetch: batches made ready on the host while a step runs. They go to the devices when they are asked for,
            which is some steps ahead: the loop does not wait for the devices.
          max_bad_records: examples that may be left out because they cannot be read, before it is an error; one that
            comes in each epoch is counted once.
          rows: which rows of each global batch this process loads, int64, ascending; None: those on its devices.
        """
        self._batch_size, self._sharding, self._prefetch = batch_size, sharding, prefetch
        self._fingerprint, self._num_workers = source.fingerprint(), num_workers
        self._turns = turns_images(source) if transform.exif_orientation is None else transform.exif_orientation
        threads = num_threads or max(1, num_cpus() // max(1, num_workers))
        loader = BatchLoader(source, transform, num_classes=num_classes, num_threads=threads)
        rows = local_rows(sharding, batch_size) if rows is None else rows
        load_batch = _LoadTrainBatch(loader, IndexStream(source, seed), batch_size, rows, seed)
        self._batches = grain.MapDataset.range(2**40).map(load_batch)
        self.bad_records = BadRecords(max_bad_records)
        self._host_iterator: grain.DatasetIterator | None = None
        self._num_done = 0  # batches handed out

    def _start(self) -> grain.DatasetIterator:
        """Starts to read at the batch after those handed out."""
        options = grain.ReadOptions(
            num_threads=min(_BATCHES_IN_WORK, self._prefetch), prefetch_buffer_size=self._prefetch
        )
        batches = self._batches[self._num_done :].to_iter_dataset(options)
        if not flags.FLAGS.is_parsed():
            # Grain reads its flags, also where there is no command line. To parse an empty one would fail for a program
            # whose own flags are required.
            flags.FLAGS.mark_as_parsed()
        # Worker i takes batches i, i + num_workers, ... and they come back in turn: the same stream.
        workers = grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=1)
        return iter(batches.mp_prefetch(workers, worker_init_fn=_start_worker))

    def next_local(self) -> LocalBatch:
        """This process's part of the next batch, on the host.

        Raises:
          UserError: more examples cannot be read than may be left out, a label cannot be, or a worker process is gone.
        """
        if self._host_iterator is None:
            self._host_iterator = self._start()
        try:
            batch, bad = next(self._host_iterator)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise UserError(
                f"a worker process of the input was killed, by the system perhaps because memory ran out ({error}) Use "
                "fewer of data.num_workers, or smaller data.prefetch, and run the same command again."
            ) from error
        self.bad_records.add(bad)
        self._num_done += 1
        return batch

    def __next__(self) -> dict[str, jax.Array]:
        return global_batch(self.next_local(), self._sharding, self._batch_size)

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch that was handed out, as JSON-compatible data."""
        return {
            "images": self._num_done * self._batch_size,
            "examples": self._fingerprint,
            "num_workers": self._num_workers,
            "exif_orientation": self._turns,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position from `get_state`, in constant time.

        Raises:
          UserError: the list of examples is not the one that the position was in, or no batch begins there.
        """
        if "images" not in state:
            raise UserError("the checkpoint was written by an older version of this code: start in a new workdir.")
        if state["examples"] != self._fingerprint:
            raise UserError(
                "the data set has changed since the last start: it has other files, other names of files, or "
                "another rule for labels. Bring back what it was to go on, or start in a new workdir."
            )
        if self._turns and "exif_orientation" not in state:
            raise UserError(
                "the run began with a version that did not turn images as their EXIF says. Pass "
                "--config.data.exif_orientation=False --allow_config_change to go on as before, or start in a new "
                "workdir."
            )
        if state["images"] % self._batch_size:
            raise UserError(
                f"the last start saw {state['images']:,} images, and no batch of {self._batch_size} ends there. Use "
                "the batch size from before, or one that divides that number."
            )
        if state["num_workers"] != self._num_workers:
            logger.info(
                "data.num_workers is %d, and was %d; the batches stay the same", self._num_workers, state["num_workers"]
            )
        self.close()
        self._num_done = state["images"] // self._batch_size

    def close(self) -> None:
        """Ends threads and worker processes; a next batch would start them again."""
        if self._host_iterator is not None:
            self._host_iterator.close()
            self._host_iterator = None


class EvalBatches:
    """An iterable of evaluation batches: fixed order, every example exactly once over all processes.

    Each batch is `{"image": uint8 [batch, image_size, image_size, 3], "label": int32 [batch] or [batch, max_labels],
    "mask": float32 [batch]}`. The last one is filled up with zeros whose mask is 0.
    """

    def __init__(
        self,
        source: Source,
        transform: EvalTransform,
        sharding: NamedSharding,
        *,
        batch_size: int,
        num_classes: int | None = None,
        num_threads: int | None = None,
        max_bad_records: int = 0,
        rows: np.ndarray | None = None,
    ):
        """See `TrainBatches` for the arguments. Nothing is read before iteration."""
        self._loader = BatchLoader(source, transform, num_classes=num_classes, num_threads=num_threads)
        self._num_examples, self._batch_size, self._sharding = len(source), batch_size, sharding
        self._rows = local_rows(sharding, batch_size) if rows is None else rows
        self._bad_records = BadRecords(max_bad_records)

    def __len__(self) -> int:
        return math.ceil(self._num_examples / self._batch_size)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        try:
            for batch, bad in iter(self._local_batches()):
                self._bad_records.add(bad)
                yield global_batch(batch, self._sharding, self._batch_size)
        finally:
            self._loader.forget_memory()  # training goes on, perhaps for hours

    def _local_batches(self) -> grain.IterDataset:
        def load_batch(batch_index: int) -> tuple[LocalBatch, dict[int, str]]:
            indices = batch_index * self._batch_size + self._rows
            is_there = indices < self._num_examples
            batch, bad = self._loader.load(np.where(is_there, indices, _NO_EXAMPLE))
            return batch | {"mask": is_there.astype(np.float32)}, bad

        options = grain.ReadOptions(num_threads=_BATCHES_IN_WORK, prefetch_buffer_size=_BATCHES_IN_WORK)
        return grain.MapDataset.range(len(self)).map(load_batch).to_iter_dataset(options)
