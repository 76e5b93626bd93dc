"""Removes near-duplicates of test images from a pre-training set, and shows what it removed.

It searches for mirrored test images too, because training mirrors images.
"""

import dataclasses
import html
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vit_jax.console import Progress, num_cpus, show_name
from vit_jax.data.prepare import tfds_layout
from vit_jax.data.prepare.index import Index
from vit_jax.data.prepare.near_duplicates import NEAR, SURE, WORDS, find_pairs, hash_or_zero, thumbnail
from vit_jax.data.prepare.work import MAKE_ROOM, ordered_map, working_in
from vit_jax.data.sources import Source, open_source
from vit_jax.data.sources.records import read_manifest_facts
from vit_jax.errors import UserError, unknown_name
from vit_jax.files import check_space, replace_whole

REPORT, PICTURES = "report.json", "report.html"

_SHOWN = 200  # pairs in report.html


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Images for testing a model.

    Attributes:
      name: as given by the user.
      source: of the images.
    """

    name: str
    source: Source

    @classmethod
    def open(cls, name: str) -> "TestSet":
        """Opens "<data set>:<split>", such as "tfds:cifar10:test" or a folder of images and its split.

        Raises:
          UserError: there is no such data set or split.
        """
        match = re.fullmatch(r"(.+):((?:[^:\[\]]|\[[^\]]*\])+)", name)  # slices such as train[:5] contain colons
        if match is None:
            raise UserError(f"--against={name} has no split. Write <data set>:<split>, such as tfds:cifar10:test.")
        dataset, split = match.groups()
        return cls(show_name(name), open_source(dataset, split))


@dataclasses.dataclass(frozen=True)
class _Pretraining:
    """A prepared data set: TFDS's description, the split to clean, files by split, and the lengths of the split's."""

    info: Any
    split: str
    files: dict[str, list[pathlib.Path]]
    lengths: list[int]
    max_labels: int | None
    exif_orientation: bool

    @classmethod
    def open(cls, folder: pathlib.Path, split: str | None) -> "_Pretraining":
        import tensorflow_datasets as tfds

        if not (folder / "dataset_info.json").is_file():
            raise UserError(
                f"{folder} is not a prepared data set: it has no dataset_info.json. Pass <data set>/<version>."
            )
        info = tfds.builder_from_directory(folder).info
        if info.file_format is None or info.file_format.value != "array_record":
            raise UserError(f"{folder} is not array_record. Prepare it again: python -m vit_jax.data.prepare --help")
        if "image" not in info.features:
            raise UserError(f"{folder} has no feature image, only {', '.join(info.features)}. dedup needs one.")
        if split is None:
            split = next((name for name in ("full", "train") if name in info.splits), None)
            if split is None:
                raise UserError(f"{folder} has no split full or train. Set --split to one of {', '.join(info.splits)}.")
        if split not in info.splits:
            raise unknown_name(f"split of {folder}", split, info.splits)
        files = {name: [pathlib.Path(path) for path in facts.filepaths] for name, facts in info.splits.items()}
        facts = read_manifest_facts(folder)
        lengths = list(info.splits[split].shard_lengths)
        return cls(info, split, files, lengths, facts.max_labels, facts.exif_orientation)

    def state(self) -> list[list[Any]]:
        """Names, sizes and times of all files, JSON-compatible."""
        stats = [(file, file.stat()) for files in self.files.values() for file in files]
        return [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def dedup(
    folder: pathlib.Path,
    against: Sequence[str],
    data_dir: pathlib.Path,
    *,
    split: str | None = None,
    name: str | None = None,
    version: str | None = None,
    near: int = NEAR,
    sure: int = SURE,
    threads: int | None = None,
) -> tuple[dict[str, Any], pathlib.Path]:
    """Writes a pre-training set without the near-duplicates of test images.

    Shards keep their numbers and examples their order; other splits are copied.

    Args:
      folder: a prepared data set, with its version.
      against: test sets, for `TestSet.open`.
      data_dir: folder of data sets.
      split: to clean; None: full or train.
      name: of the new data set; None: the old one's with _dedup.
      version: of the new data set; None: the old one's.
      near: for `find_pairs`.
      sure: for `find_pairs`.
      threads: None: one per core.

    Returns:
      the manifest and the new folder.

    Raises:
      UserError: a data set or split is missing, the result exists with other settings, or it does not fit on the disk.
    """
    old = _Pretraining.open(folder, split)
    name, version = name or f"{old.info.name}_dedup", version or str(old.info.version)
    tfds_layout.check_name(name, version)
    target = data_dir / name / version
    if not against:
        raise UserError("no test set. Pass at least one as --against=<data set>:<split>.")
    if not (0 <= near < 32 and 0 <= sure < 128):
        raise UserError(
            f"--near={near} must be from 0 to 31, --sure={sure} from 0 to 127: half of all bits agree by chance."
        )
    tests = [TestSet.open(one) for one in against]
    settings = {
        "command": "dedup",
        "source": old.info.full_name,
        "split": old.split,
        "against": [[pathlib.PurePath(test.name).name, test.source.fingerprint()] for test in tests],
        "near": near,
        "sure": sure,
    }
    if target.exists():
        manifest = tfds_layout.read_manifest(target)
        if manifest["settings"] != settings:
            raise UserError(
                f"{target} already exists, made with other settings. Remove it, or choose another --name or --version."
            )
        print(f"{target} already exists, with {manifest['counts']['examples']:,} examples.", file=sys.stderr)
        return manifest, target
    work = target.with_name(target.name + tfds_layout.UNFINISHED)
    with working_in(work):
        index = Index(work)
        try:
            if index.fact("settings") not in (None, settings):
                raise UserError(f"{work} was begun with other settings. Use the same settings, or remove it.")
            # Not in the settings, because the manifest has these and file times change when a data set is copied.
            if index.fact("files") not in (None, old.state()):
                raise UserError(f"{folder} has changed since {work} was begun. Remove the latter to start over.")
            index.commit(settings=settings, files=old.state())
            job = _Job(old, tests, index, work, name, threads or num_cpus())
            report = job.find(near, sure)
            manifest = job.write(report, version, settings)
        finally:
            index.close()
        for leftover in [*work.glob("index.sqlite*"), *work.glob("*.npy")]:
            leftover.unlink()
        replace_whole(work, target)
    return manifest, target


@dataclasses.dataclass(frozen=True)
class _Job:
    old: _Pretraining
    tests: list[TestSet]
    index: Index
    work: pathlib.Path
    name: str
    threads: int

    def find(self, near: int, sure: int) -> dict[str, Any]:
        """Hashes and compares all images; returns the report without file names."""
        hashes = [self._hash_test(number, test) for number, test in enumerate(self.tests)]
        ends = np.cumsum([len(one) // 2 for one in hashes])
        plain = [one[: len(one) // 2] for one in hashes]
        mirrored = [one[len(one) // 2 :] for one in hashes]
        targets = np.concatenate([*plain, *mirrored])
        # A hash of zeros marks an image that cannot be hashed and matches nothing.
        sought = np.flatnonzero(targets.any(axis=1))
        pairs: list[dict[str, Any]] = []
        first, not_compared = 0, 0
        with Progress("hash", sum(self.old.lengths)) as progress:
            for file, length in zip(self.old.files[self.old.split], self.old.lengths, strict=True):
                found = self._hash_shard(file, length)
                hashed = np.flatnonzero(found.any(axis=1))
                not_compared += length - len(hashed)
                matches = find_pairs(found[hashed], targets[sought], near=near, sure=sure)
                for query, target, distance in zip(*matches, strict=True):
                    of = int(sought[target]) % int(ends[-1])
                    number = int(np.searchsorted(ends, of, side="right"))
                    pairs.append(
                        {
                            "index": first + int(hashed[query]),
                            "against": self.tests[number].name,
                            "against_index": of - int(ends[number - 1] if number else 0),
                            "mirrored": bool(sought[target] >= ends[-1]),
                            "bits": int(distance),
                        }
                    )
                first += length
                progress.add(length, first)
            progress.finish()
        removed = sorted({pair["index"] for pair in pairs})
        return {
            "near": near,
            "sure": sure,
            "split": self.old.split,
            "examples": sum(self.old.lengths),
            "removed": len(removed),
            # Black images and undecodable ones, which are kept.
            "not_compared": not_compared,
            "against": [
                {
                    "name": test.name,
                    "images": len(test.source),
                    "not_compared": int((~one.any(axis=1)).sum()),
                    "found": len({pair["against_index"] for pair in pairs if pair["against"] == test.name}),
                }
                for test, one in zip(self.tests, plain, strict=True)
            ],
            "pairs": pairs,
        }

    def _cached(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        path = self.work / name
        if not path.exists():
            temporary = path.with_name(path.name + tfds_layout.UNFINISHED)
            with temporary.open("wb") as file:
                np.save(file, make())
            replace_whole(temporary, path)
        return np.load(path)

    def _hash_test(self, number: int, test: TestSet) -> np.ndarray:
        """Returns the hashes `[2 * images, 5]` of the images, then of their mirror images."""

        def both(i: int) -> np.ndarray:
            image = test.source[i]["image"]
            return np.stack([hash_or_zero(image), hash_or_zero(image, mirrored=True)])

        def make() -> np.ndarray:
            made = list(ordered_map(both, range(len(test.source)), self.threads))
            return np.stack(made, axis=1).reshape(-1, WORDS)

        return self._cached(f"against-{number}.npy", make)

    def _hash_shard(self, file: pathlib.Path, length: int) -> np.ndarray:
        def make() -> np.ndarray:
            images = (_image_of(record) for record in tfds_layout.read_shard(file))
            made = list(ordered_map(hash_or_zero, images, self.threads))
            if len(made) != length:
                raise UserError(
                    f"{file} has {len(made)} examples, not {length} as in dataset_info.json. Copy or prepare it again."
                )
            return np.stack(made) if made else np.zeros((0, WORDS), np.uint64)

        return self._cached(f"{file.name}.npy", make)

    def write(self, report: dict[str, Any], version: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Copies the other examples; writes description, report and manifest."""
        removed = {pair["index"] for pair in report["pairs"]}
        pictures = _Pictures(report["pairs"], self.tests)
        names: dict[int, str] = {}
        finished = {name: tfds_layout.Shard(**facts) for name, facts in self.index.shards().items()}
        left = [f for files in self.old.files.values() for f in files if self._new_name(f) not in finished]
        needed = sum(file.stat().st_size for file in left)
        check_space(self.work, needed, MAKE_ROOM)
        total = sum(facts.num_examples for facts in self.old.info.splits.values())
        done = 0
        shards: dict[str, list[tfds_layout.Shard]] = {}
        with Progress("write", total) as progress:
            for split, files in self.old.files.items():
                first = 0
                shards[split] = []
                for file, length in zip(files, self.old.info.splits[split].shard_lengths, strict=True):
                    here = removed & set(range(first, first + length)) if split == self.old.split else set()
                    if here:
                        self._look_at(file, first, here, names, pictures)
                    name = self._new_name(file)
                    if name not in finished:
                        kept = _without(tfds_layout.read_shard(file), {number - first for number in here})
                        finished[name] = tfds_layout.write_shard(self.work / name, kept)
                        self.index.finish_shard(name, dataclasses.asdict(finished[name]))
                    shards[split].append(finished[name])
                    first, done = first + length, done + length
                    progress.add(length, done)
            progress.finish()
        for pair in report["pairs"]:
            pair["file_name"] = names[pair["index"]]
        info = self.old.info
        homepage = next(iter(info.as_proto.location.urls), "")  # `info.homepage` invents one
        sentence = f"Without {len(removed):,} near-duplicates of {', '.join(test.name for test in self.tests)}."
        description = tfds_layout.Description(self.name, version, f"{info.description} {sentence}", homepage, 0, False)
        tfds_layout.write_description(self.work, description, shards, features=info.features)
        (self.work / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (self.work / PICTURES).write_text(pictures.page(report), encoding="utf-8")
        for leftover in self.work.glob(f"*{tfds_layout.UNFINISHED}"):
            leftover.unlink()
        kept_counts = {split: sum(shard.examples for shard in of) for split, of in shards.items()}
        facts = {
            "name": self.name,
            "version": version,
            "format": "array_record",
            # Perhaps a removed example had the most labels; a larger value is harmless.
            **({"max_labels": self.old.max_labels} if self.old.max_labels else {}),
            **({"exif_orientation": True} if self.old.exif_orientation else {}),
            "source": {"tfds": info.full_name},
            "settings": settings,
            "counts": {
                "images": total,
                "broken": 0,
                "merged": 0,
                "near_duplicates": len(removed),
                "examples": sum(kept_counts.values()),
                "classes": _num_classes(info.features),
            },
            "splits": {
                split: {
                    "examples": kept_counts[split],
                    "record_bytes": sum(shard.record_bytes for shard in of),
                    "shards": len(of),
                }
                for split, of in shards.items()
            },
        }
        known = {
            self._new_name(f): s for split, of in shards.items() for f, s in zip(self.old.files[split], of, strict=True)
        }
        tfds_layout.write_manifest(self.work, facts, known)
        return tfds_layout.read_manifest(self.work)

    def _new_name(self, file: pathlib.Path) -> str:
        return self.name + file.name.removeprefix(self.old.info.name)

    def _look_at(
        self, file: pathlib.Path, first: int, numbers: set[int], names: dict[int, str], pictures: "_Pictures"
    ) -> None:
        """Collects names and thumbnails of removed examples."""
        for number, record in enumerate(tfds_layout.read_shard(file), start=first):
            if number in numbers:
                names[number] = _name_of(record)
                pictures.add(number, _image_of(record))


class _Pictures:
    """A page of pairs side by side; the most different, hence most doubtful, come first."""

    def __init__(self, pairs: Sequence[dict[str, Any]], tests: Sequence[TestSet]):
        self._pairs = sorted(pairs, key=lambda pair: -pair["bits"])[:_SHOWN]
        self._wanted = {pair["index"] for pair in self._pairs}
        self._tests = {test.name: test.source for test in tests}
        self._thumbnails: dict[int, str] = {}

    def add(self, number: int, image: bytes) -> None:
        """Keeps a thumbnail of an example if the page shows it."""
        if number in self._wanted:
            self._thumbnails[number] = thumbnail(image)

    def page(self, report: dict[str, Any]) -> str:
        """Returns HTML with embedded images."""
        rows = []
        for pair in self._pairs:
            source = self._tests[pair["against"]]
            other = thumbnail(source[pair["against_index"]]["image"])
            words = f"{pair['bits']} of 256 bits differ{', mirrored' if pair['mirrored'] else ''}"
            where = html.escape(source.where(pair["against_index"]))
            rows.append(
                f"<tr><td>{self._thumbnails[pair['index']]}<br>{html.escape(pair['file_name'])}</td>"
                f"<td>{other}<br>{html.escape(pair['against'])}: {where}</td><td>{words}</td></tr>"
            )
        sets = "".join(
            f"<li>{html.escape(one['name'])}: {one['found']:,} of {one['images']:,} test images found, "
            f"{one['not_compared']:,} could not be compared</li>"
            for one in report["against"]
        )
        return (
            "<!doctype html><meta charset=utf-8><title>Near-duplicates</title>"
            "<style>body{font-family:sans-serif}td{padding:.5em;vertical-align:top;font-size:small}</style>"
            f"<h1>{report['removed']:,} of {report['examples']:,} examples removed</h1>"
            f"<p>{report['not_compared']:,} examples could not be compared because they are black or cannot be "
            f"decoded. They are kept.</p><ul>{sets}</ul>"
            f"<p>{len(rows):,} of {len(report['pairs']):,} pairs, the most different first: left the removed image, "
            f"right the test image. If the first ones are not duplicates, lower --sure (now {report['sure']}).</p>"
            f"<table>{''.join(rows)}</table>\n"
        )


def _without(all_records: Iterable[bytes], left_out: set[int]) -> Iterator[bytes]:
    return (record for number, record in enumerate(all_records) if number not in left_out)


def _fields(record: bytes) -> Any:
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(record).features.feature


def _image_of(record: bytes) -> bytes:
    return _fields(record)["image"].bytes_list.value[0]


def _name_of(record: bytes) -> str:
    values = _fields(record)["file_name"].bytes_list.value
    return values[0].decode(errors="replace") if values else ""


def _num_classes(features: Any) -> int:
    by_name = dict(features.items())
    label = by_name.get("labels", by_name.get("label"))
    return getattr(getattr(label, "feature", label), "num_classes", 0) or 0
