"""Turns a source into an iterator of global batches on the devices that restarts exactly.

The seed and the position in the stream decide which example comes and how it is augmented. Threads, processes and
restarts change neither, so the iterator's state is one number.
"""

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

_BATCHES_IN_WORK = 2  # keeps all threads busy while the last images of a batch finish
_MAX_CHUNK = 8  # images a thread takes at once
_SHORT = 2**16  # Grain's permutations take 2^16 / length times as long for data sets shorter than this
_MAKE_POOL = threading.Lock()
_NO_EXAMPLE = -1  # index that pads the last batch of an evaluation


class PositionRandom:
    """One random generator per position in the stream, independent of the order of calls.

    These are Philox streams (Salmon et al., 2011) with different counters. Setting the counter of one generator is ten
    times faster than making a generator per image. Not thread-safe.
    """

    def __init__(self, seed: int):
        self._philox = np.random.Philox(key=seed)
        self._state: Any = self._philox.state
        self._generator = np.random.Generator(self._philox)

    def at(self, position: int) -> np.random.Generator:
        """Returns the generator of a position, valid until the next call."""
        # A stream counts in the lowest of the four words; streams 2^192 apart never overlap.
        self._state["state"]["counter"] = np.array([0, 0, 0, position], np.uint64)
        self._philox.state = self._state
        return self._generator


class BatchMemory:
    """Memory for images, reused once its array and all views of it are gone.

    New memory costs a page fault per 4 kB, a tenth of the time at a batch of 512 images. malloc's own reuse lets the
    process grow to a multiple of the memory in use.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_free": []}

    def empty(self, *shape: int) -> np.ndarray:
        """Returns an uninitialised uint8 array."""
        size = math.prod(shape)
        try:  # not `if self._free`: other threads pop too
            memory = self._free.pop()
        except IndexError:
            memory = None
        if memory is None or len(memory) != size:
            # Aligned to a page, so the CPU backend uses it without a copy.
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Views keep this array alive: it is the lowest array over the memory.
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, self._free.append, memory)
        return array.reshape(shape)


class BatchLoader:
    """Loads examples on a thread pool and writes each transformed image straight into the batch.

    It can be pickled; another process starts its own pool.
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
          transform: applied to each image.
          num_classes: labels must be smaller; None: the source's number.
          num_threads: default: one per core available to this process.
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
        """Loads the examples at `indices`. -1 gives an image of zeros without a label.

        Args:
          indices: of the examples in the source.
          positions: of the examples in the stream, which with the seed decide the augmentation; None: 0, 1, ...
          seed: of the augmentation.

        Returns:
          The batch, and messages by index about examples that cannot be read. The batch has `image`, uint8
          `[len(indices), image_size, image_size, 3]`, and `label`, int32 `[len(indices)]`, or
          `[len(indices), max_labels]` if the source has several. Unreadable images are zeros without a label.

        Raises:
          UserError: a label is out of range, or an example has more than `max_labels`.
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
        """Frees the memory of unused batches."""
        self._memory = BatchMemory()

    def _fill_labels(self, row: np.ndarray, example: Example, index: int) -> None:
        label = example["label"]
        given = [int(label)] if isinstance(label, int | np.integer) else [int(each) for each in label]
        if len(given) > len(row):
            raise UserError(
                f"{self._source.where(index)} has {len(given)} labels, but at most {len(row)} fit. Set "
                "data.max_labels to the largest number of labels of an example."
            )
        for each in given:
            if each < NO_LABEL or (self._num_classes is not None and each >= self._num_classes):
                raise UserError(
                    f"{self._source.where(index)} has label {each}, but with {self._num_classes} classes labels are 0 "
                    f"to {(self._num_classes or 0) - 1}, or {NO_LABEL} for none. Check the data, or set "
                    "model.num_classes."
                )
        row[: len(given)] = given


class BadRecords:
    """Counts distinct unreadable examples, and raises above a limit."""

    def __init__(self, limit: int):
        """Allows `limit` unreadable examples."""
        self._limit = limit
        self._indices: set[int] = set()

    @property
    def count(self) -> int:
        """Number of distinct unreadable examples."""
        return len(self._indices)

    def add(self, messages: Mapping[int, str]) -> None:
        """Adds messages by index from `BatchLoader.load`.

        Raises:
          UserError: the count exceeds the limit.
        """
        for index in sorted(messages.keys() - self._indices):
            self._indices.add(index)
            if self.count > self._limit:
                most = f" More than data.max_bad_records={self._limit} cannot be read." if self._limit else ""
                raise UserError(
                    f"{messages[index]}.{most}\nReplace the file, or set data.max_bad_records to skip up to that many "
                    "images with a warning."
                )
            logger.warning("%s; skipped (%d of at most %d)", messages[index], self.count, self._limit)


class IndexStream:
    """The endless order of a source's examples: `stream[position]` is an index, in constant time for any position.

    Each epoch visits every example once, in its own order. In a mixture, this holds for each source.
    """

    def __init__(self, source: Source, seed: int):
        """Computes nothing yet; `seed` decides the order."""
        # The epoch is added to the seed. Multiples of the golden ratio are far apart, so neighbouring seeds do not
        # share orders.
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
    """Maps `position` by the permutation of `range(length)` that `seed` chooses."""
    if length < _SHORT:
        return int(_permutation(length, seed)[position])
    return index_shuffle(position, max_index=length - 1, seed=seed, rounds=4)


# Neighbouring positions are in different parts of a mixture; each part has its own permutation.
_permutation = functools.lru_cache(maxsize=64)(permutation)


def _load_train_batch(
    loader: BatchLoader, order: IndexStream, batch_size: int, rows: np.ndarray, seed: int, batch_index: int
) -> tuple[LocalBatch, dict[int, str]]:
    """Maps a batch's number to this process's rows of it."""
    # Positions in the global batch, so the data do not depend on the number of processes.
    positions = [batch_index * batch_size + int(row) for row in rows]
    return loader.load([order[position] for position in positions], positions, seed)


def _start_worker(index: int, count: int) -> None:
    """Makes a worker process ignore Ctrl-C, and exit when its parent has exited or was killed."""
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
    sharded over the devices. Every epoch visits every example once, in its own order; a batch may span two epochs.

    Attributes:
      bad_records: counts the unreadable examples since the start.
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
        """Reads nothing until the first batch is requested; from then on it reads ahead.

        Args:
          source: the examples.
          transform: applied to each image.
          sharding: of the batches over the devices.
          batch_size: examples in a global batch, over all processes.
          seed: of order and augmentation.
          num_classes: labels must be smaller; None: the source's number.
          num_threads: decoding threads, per worker process if there are any; None: divide the cores among them.
          num_workers: worker processes that load whole batches in turn, for hosts with more cores than one Python
            process can use (about 15); 0: load in this process. The batches do not depend on it.
          prefetch: batches prepared on the host while a step runs. Each goes to the devices when it is requested,
            which is some steps ahead because the loop does not wait for the devices.
          max_bad_records: number of unreadable examples to skip; more are an error. One that recurs in each epoch
            counts once.
          rows: rows of each global batch that this process loads, int64, ascending; None: those on its devices.
        """
        self._batch_size, self._sharding, self._prefetch = batch_size, sharding, prefetch
        self._fingerprint, self._num_workers = source.fingerprint(), num_workers
        self._turns = turns_images(source) if transform.exif_orientation is None else transform.exif_orientation
        threads = num_threads or max(1, num_cpus() // max(1, num_workers))
        loader = BatchLoader(source, transform, num_classes=num_classes, num_threads=threads)
        rows = local_rows(sharding, batch_size) if rows is None else rows
        load_batch = functools.partial(_load_train_batch, loader, IndexStream(source, seed), batch_size, rows, seed)
        self._batches = grain.MapDataset.range(2**40).map(load_batch)
        self.bad_records = BadRecords(max_bad_records)
        self._host_iterator: grain.DatasetIterator | None = None
        self._num_done = 0  # batches handed out

    def _start(self) -> grain.DatasetIterator:
        """Starts reading at the next batch."""
        options = grain.ReadOptions(
            num_threads=min(_BATCHES_IN_WORK, self._prefetch), prefetch_buffer_size=self._prefetch
        )
        batches = self._batches[self._num_done :].to_iter_dataset(options)
        if not flags.FLAGS.is_parsed():
            # Grain reads its flags even without a command line. Parsing an empty one would fail in a program with
            # required flags.
            flags.FLAGS.mark_as_parsed()
        # Worker i loads batches i, i + num_workers, ...; they return in turn, so the stream stays the same.
        workers = grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=1)
        return iter(batches.mp_prefetch(workers, worker_init_fn=_start_worker))

    def next_local(self) -> LocalBatch:
        """Returns this process's part of the next batch, on the host.

        Raises:
          UserError: too many examples are unreadable, a label is out of range, or a worker process was killed.
        """
        if self._host_iterator is None:
            self._host_iterator = self._start()
        try:
            batch, bad = next(self._host_iterator)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise UserError(
                f"a worker process of the input was killed, perhaps because memory ran out ({error}) Lower "
                "data.num_workers or data.prefetch, and rerun the same command."
            ) from error
        self.bad_records.add(bad)
        self._num_done += 1
        return batch

    def __next__(self) -> dict[str, jax.Array]:
        return global_batch(self.next_local(), self._sharding, self._batch_size)

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch as JSON-compatible data."""
        return {
            "images": self._num_done * self._batch_size,
            "examples": self._fingerprint,
            "num_workers": self._num_workers,
            "exif_orientation": self._turns,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position from `get_state`, in constant time.

        Raises:
          UserError: the list of examples has changed, or no batch begins at this position.
        """
        if "images" not in state:
            raise UserError("the checkpoint was written by an older version of this code: start in a new workdir.")
        if state["examples"] != self._fingerprint:
            raise UserError(
                "the data set has changed since the last start: its files, their names or the rule for labels differ. "
                "Restore the old data to resume, or start in a new workdir."
            )
        if self._turns and "exif_orientation" not in state:
            raise UserError(
                "the run began with a version that ignored the EXIF orientation of images. Pass "
                "--config.data.exif_orientation=False --allow_config_change to keep ignoring it, or start in a new "
                "workdir."
            )
        if state["images"] % self._batch_size:
            raise UserError(
                f"the run has seen {state['images']:,} images, and no batch of {self._batch_size} ends there. Use the "
                "previous batch size, or one that divides this number."
            )
        if state["num_workers"] != self._num_workers:
            logger.info(
                "data.num_workers changed from %d to %d; the batches stay the same",
                state["num_workers"],
                self._num_workers,
            )
        self.close()
        self._num_done = state["images"] // self._batch_size

    def close(self) -> None:
        """Stops threads and worker processes; the next batch restarts them."""
        if self._host_iterator is not None:
            self._host_iterator.close()
            self._host_iterator = None


class EvalBatches:
    """An iterable of evaluation batches in fixed order; every example comes exactly once over all processes.

    Each batch is `{"image": uint8 [batch, image_size, image_size, 3], "label": int32 [batch] or [batch, max_labels],
    "mask": float32 [batch]}`. Zeros with mask 0 pad the last batch.
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
        """Takes the arguments of `TrainBatches`. Reads nothing before iteration."""
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
            self._loader.forget_memory()  # the next evaluation may be hours away

    def _local_batches(self) -> grain.IterDataset:
        def load_batch(batch_index: int) -> tuple[LocalBatch, dict[int, str]]:
            indices = batch_index * self._batch_size + self._rows
            is_there = indices < self._num_examples
            batch, bad = self._loader.load(np.where(is_there, indices, _NO_EXAMPLE))
            return batch | {"mask": is_there.astype(np.float32)}, bad

        options = grain.ReadOptions(num_threads=_BATCHES_IN_WORK, prefetch_buffer_size=_BATCHES_IN_WORK)
        return grain.MapDataset.range(len(self)).map(load_batch).to_iter_dataset(options)
