"""The progress of a preparation: one SQLite database beside the shards, which survives a kill at any moment."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

Arrangement = Literal["each", "merged", "pairs"]
"""What becomes an example: "each" image; each content with the labels of all its copies ("merged"); or each pair of
content and label ("pairs")."""

_TABLES = """
CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS label (id INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE IF NOT EXISTS image (
  split TEXT, file_name TEXT, labels TEXT, content BLOB, file INTEGER, offset INTEGER, size INTEGER);
CREATE TABLE IF NOT EXISTS broken (split TEXT, file_name TEXT, place TEXT, reason TEXT);
CREATE TABLE IF NOT EXISTS shard (name TEXT PRIMARY KEY, facts TEXT);
"""

# A content takes its first file name. SQLite takes a bare column beside MIN() from the row with the minimum.
_SELECT: dict[Arrangement, str] = {
    "each": """
      SELECT split, file_name, relabel(labels) AS labels, content, file, offset, size FROM image
      ORDER BY split, order_key(split, file_name), file_name, content, labels""",
    "merged": """
      SELECT split, MIN(file_name) AS file_name, relabel_all(labels) AS labels, content, file, offset, size FROM image
      GROUP BY split, content
      ORDER BY split, order_key(split, MIN(file_name)), file_name, content""",
    # Copies of an image are neighbours, so that slices of a split hardly ever share one.
    "pairs": """
      SELECT split, file_name, labels, content, file, offset, size FROM (
        SELECT split, MIN(file_name) AS file_name, relabel(labels) AS labels, content, file, offset, size
        FROM image GROUP BY split, content, labels)
      ORDER BY split, order_key(split, MIN(file_name) OVER (PARTITION BY split, content)),
        content, file_name, labels""",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """An image and its location.

    Attributes:
      split: its split.
      file_name: its unique name.
      labels: numbers of its classes, final once the index is arranged.
      content: hash of the bytes.
      file: number of the file that holds it; the origin numbers them.
      offset: in that file, in bytes or the origin's unit.
      size: in bytes.
    """

    split: str
    file_name: str
    labels: tuple[int, ...]
    content: bytes
    file: int
    offset: int
    size: int


def content_hash(content: bytes) -> bytes:
    """Hashes the bytes of an image to 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


def tfds_order(split: str, key: str) -> bytes:
    """Returns TFDS's sort key of an example: the MD5 of the split's name and the example's key.

    The order is that of a data set prepared by TFDS itself, so a slice such as `full[:25600]` holds the same images
    (`tensorflow_datasets/core/hashing.py` and `shuffle.py`).
    """
    return hashlib.md5(f"{split}{key}".encode(), usedforsecurity=False).digest()


class Index:
    """Images found, position of the scan, broken images and finished shards.

    Only `commit` ends a transaction, with a mark of the scan's position. After a kill, the scan repeats from that mark.
    """

    def __init__(self, folder: pathlib.Path):
        """Opens or creates the index in a folder. Not thread-safe."""
        self.path = folder / "index.sqlite"
        self._db = sqlite3.connect(self.path, isolation_level=None)
        # Sorting millions of rows needs temporary files, which may not fit in /tmp.
        with contextlib.suppress(sqlite3.Error):
            self._db.execute(f"PRAGMA temp_store_directory = '{str(folder).replace(chr(39), 2 * chr(39))}'")
        self._db.execute("PRAGMA cache_size = -16384")  # KiB, whatever the number of images
        self._db.executescript(_TABLES)
        self._labels: dict[str, int] = dict(self._db.execute("SELECT name, id FROM label"))
        self._db.create_function("order_key", 2, tfds_order, deterministic=True)
        self._db.execute("BEGIN")

    def close(self) -> None:
        """Closes the file; uncommitted changes are lost."""
        self._db.close()

    def commit(self, **facts: Any) -> None:
        """Commits all additions together with facts: JSON-compatible values by name."""
        for name, value in facts.items():
            self._db.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (name, json.dumps(value)))
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")

    def fact(self, name: str) -> Any:
        """Returns a committed fact, or None."""
        row = self._db.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
        return row and json.loads(row[0])

    def add(
        self, split: str, file_name: str, labels: Sequence[str], content: bytes, place: tuple[int, int, int]
    ) -> None:
        """Adds an image by its class names and its place: file, offset and size."""
        numbers = []
        for label in labels:
            if label not in self._labels:
                self._labels[label] = len(self._labels)
                self._db.execute("INSERT INTO label VALUES (?, ?)", (self._labels[label], label))
            numbers.append(self._labels[label])
        text = ",".join(map(str, sorted(set(numbers))))
        self._db.execute("INSERT INTO image VALUES (?, ?, ?, ?, ?, ?, ?)", (split, file_name, text, content, *place))

    def add_broken(self, split: str, file_name: str, place: str, reason: str) -> None:
        """Adds an image that is skipped."""
        self._db.execute("INSERT INTO broken VALUES (?, ?, ?, ?)", (split, file_name, place, reason))

    def label_names(self) -> list[str]:
        """Returns the names of all classes that occur."""
        return list(self._labels)

    def count(self, table: Literal["image", "broken", "example"]) -> int:
        """Counts the rows of a table."""
        return self._db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]  # noqa: S608

    def broken(self) -> list[dict[str, str]]:
        """Lists the skipped images by name."""
        names = ("split", "file_name", "place", "reason")
        rows = self._db.execute(f"SELECT {', '.join(names)} FROM broken ORDER BY split, file_name, reason")  # noqa: S608
        return [dict(zip(names, row, strict=True)) for row in rows]

    def arrange(self, arrangement: Arrangement, numbers: Mapping[str, int]) -> None:
        """Builds the examples in their final order.

        Args:
          arrangement: what becomes an example.
          numbers: label by class name.
        """
        final = {number: numbers[name] for name, number in self._labels.items()}

        def relabel(*texts: str) -> str:
            found = {final[int(number)] for text in texts for number in text.split(",") if number}
            return ",".join(map(str, sorted(found)))

        class RelabelAll:
            def __init__(self):
                self.texts: set[str] = set()

            def step(self, text: str) -> None:
                self.texts.add(text)

            def finalize(self) -> str:
                return relabel(*self.texts)

        self._db.create_function("relabel", 1, relabel, deterministic=True)
        self._db.create_aggregate("relabel_all", 1, RelabelAll)  # type: ignore[arg-type]
        self._db.execute("DROP TABLE IF EXISTS example")
        self._db.execute(
            "CREATE TABLE example (position INTEGER PRIMARY KEY, "
            "split TEXT, file_name TEXT, labels TEXT, content BLOB, file INTEGER, offset INTEGER, size INTEGER)"
        )
        columns = "split, file_name, labels, content, file, offset, size"
        self._db.execute(f"INSERT INTO example ({columns}) {_SELECT[arrangement]}")

    def splits(self) -> dict[str, tuple[int, int, int]]:
        """Returns by split the position of the first example, number of examples and bytes of their images."""
        rows = self._db.execute("SELECT split, MIN(position), COUNT(*), SUM(size) FROM example GROUP BY split")
        return {split: (first, count, size) for split, first, count, size in rows}

    def examples(self, first: int, count: int) -> Iterator[Row]:
        """Yields `count` examples from position `first` on."""
        rows = self._db.execute(
            "SELECT split, file_name, labels, content, file, offset, size FROM example "
            "WHERE position >= ? AND position < ? ORDER BY position",
            (first, first + count),
        )
        for split, file_name, labels, content, file, offset, size in rows:
            numbers = tuple(map(int, labels.split(","))) if labels else ()
            yield Row(split, file_name, numbers, content, file, offset, size)

    def finish_shard(self, name: str, facts: Mapping[str, Any]) -> None:
        """Records a shard that is complete on disk."""
        self._db.execute("INSERT OR REPLACE INTO shard VALUES (?, ?)", (name, json.dumps(facts)))
        self.commit()

    def shards(self) -> dict[str, dict[str, Any]]:
        """Returns the facts of finished shards by name."""
        return {name: json.loads(facts) for name, facts in self._db.execute("SELECT name, facts FROM shard")}
