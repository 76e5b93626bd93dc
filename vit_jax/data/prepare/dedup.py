"""Removes near-duplicates of test images from a pre-training set, and shows what it removed.

It searches for mirrored test images too, because training mirrors images.
"""

import dataclasses
import functools
import html
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vit_jax.console import Progress, num_cpus, show_name
from vit_jax.data.prepare import tfds_layout
from vit_jax.data.prepare.index import Index
from vit_jax.data.prepare.near_duplicates import NEAR, SURE, WORDS, find_pairs, hash_or_zero, thumbnail
from vit_jax.data.prepare.work import build, ordered_map, write_shards
from vit_jax.data.sources import Source, open_source
from vit_jax.data.sources.records import parse_example, read_manifest_facts
from vit_jax.errors import UserError, unknown_name
from vit_jax.files import replace_whole

REPORT, PICTURES = "report.json", "report.html"

_SHOWN = 200  # pairs in report.html


def dedup(
    folder: pathlib.Path,
    against: Sequence[str],
    data_dir: pathlib.Path,
    *,
    split: str | None = None,
    name: str | None = None,
    version: str | None = None,
    near: int | None = None,
    sure: int | None = None,
    threads: int | None = None,
) -> tuple[dict[str, Any], pathlib.Path]:
    """Writes a pre-training set without the near-duplicates of test images.

    Shards keep their numbers and examples their order; other splits are copied.

    Args:
      folder: a prepared data set, with its version.
      against: test sets, as "<data set>:<split>".
      data_dir: folder of data sets.
      split: to clean; None: full or train.
      name: of the new data set; None: the old one's with _dedup.
      version: of the new data set; None: the old one's.
      near: for `find_pairs`; None: its default.
      sure: likewise.
      threads: None: one per core.

    Returns:
      the manifest and the new folder.

    Raises:
      UserError: a data set or split is missing, the result exists with other settings, or it does not fit on the disk.
    """
    info, split = _open_prepared(folder, split)
    name, version = name or f"{info.name}_dedup", version or str(info.version)
    tfds_layout.check_name(name, version)
    near, sure = NEAR if near is None else near, SURE if sure is None else sure
    if not (0 <= near < 32 and 0 <= sure < 128):
        raise UserError(
            f"--near={near} must be from 0 to 31, --sure={sure} from 0 to 127: half of all bits agree by chance."
        )
    if not against:
        raise UserError("no test set. Pass at least one as --against=<data set>:<split>.")
    tests = {show_name(each): _open_test_set(each) for each in against}
    files = [pathlib.Path(path) for facts in info.splits.values() for path in facts.filepaths]
    stats = [(file.name, file.stat()) for file in files]
    settings = {
        "command": "dedup",
        "source": info.full_name,
        "split": split,
        "against": [[pathlib.PurePath(test).name, source.fingerprint()] for test, source in tests.items()],
        "near": near,
        "sure": sure,
        "files": [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats],
    }

    def write(work: pathlib.Path, index: Index, public_settings: dict[str, Any]) -> None:
        job = _Job(folder, info, split, tests, index, work, name, version, threads or num_cpus())
        job.write(job.find(near, sure), public_settings)

    target = data_dir / name / version
    return build(target, settings, {"tfds": info.full_name}, write), target


def _open_test_set(name: str) -> Source:
    match = re.fullmatch(r"(.+):((?:[^:\[\]]|\[[^\]]*\])+)", name)  # slices such as train[:5] contain colons
    if match is None:
        raise UserError(f"--against={name} has no split. Write <data set>:<split>, such as tfds:cifar10:test.")
    return open_source(*match.groups())


def _open_prepared(folder: pathlib.Path, split: str | None) -> tuple[Any, str]:
    """Opens TFDS's description of a data set, and chooses the split to clean."""
    import tensorflow_datasets as tfds

    if not (folder / "dataset_info.json").is_file():
        raise UserError(f"{folder} is not a prepared data set: it has no dataset_info.json. Pass <data set>/<version>.")
    info = tfds.builder_from_directory(folder).info
    if info.file_format is None or info.file_format.value != "array_record":
        raise UserError(f"{folder} is not array_record. Prepare it again: python -m vit_jax.data.prepare --help")
    if "image" not in info.features:
        raise UserError(f"{folder} has no feature image, only {', '.join(info.features)}. dedup needs one.")
    split = split or next((name for name in ("full", "train") if name in info.splits), None)
    if split is None:
        raise UserError(f"{folder} has no split full or train. Set --split to one of {', '.join(info.splits)}.")
    if split not in info.splits:
        raise unknown_name(f"split of {folder}", split, info.splits)
    return info, split


@dataclasses.dataclass(frozen=True)
class _Job:
    folder: pathlib.Path
    info: Any
    split: str
    tests: dict[str, Source]
    index: Index
    work: pathlib.Path
    name: str
    version: str
    threads: int

    def _files(self, split: str) -> Iterator[tuple[pathlib.Path, int, int]]:
        """Yields the files of a split, each with its first example's number and its length."""
        first, facts = 0, self.info.splits[split]
        for path, length in zip(facts.filepaths, facts.shard_lengths, strict=True):
            yield pathlib.Path(path), first, length
            first += length

    def find(self, near: int, sure: int) -> dict[str, Any]:
        """Hashes and compares all images; returns the report without file names."""
        hashes = [self._hash_test(number, source) for number, source in enumerate(self.tests.values())]
        ends = np.cumsum([len(one) // 2 for one in hashes])
        plain = [one[: len(one) // 2] for one in hashes]
        mirrored = [one[len(one) // 2 :] for one in hashes]
        targets = np.concatenate([*plain, *mirrored])
        # A hash of zeros marks an image that cannot be hashed and matches nothing.
        sought = np.flatnonzero(targets.any(axis=1))
        pairs: list[dict[str, Any]] = []
        not_compared, total = 0, self.info.splits[self.split].num_examples
        with Progress("hash", total) as progress:
            for file, first, length in self._files(self.split):
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
                            "against": list(self.tests)[number],
                            "against_index": of - int(ends[number - 1] if number else 0),
                            "mirrored": bool(sought[target] >= ends[-1]),
                            "bits": int(distance),
                        }
                    )
                progress.add(length, first + length)
            progress.finish()
        return {
            "near": near,
            "sure": sure,
            "split": self.split,
            "examples": total,
            "removed": len({pair["index"] for pair in pairs}),
            # Black images and undecodable ones, which are kept.
            "not_compared": not_compared,
            "against": [
                {
                    "name": name,
                    "images": len(one),
                    "not_compared": int((~one.any(axis=1)).sum()),
                    "found": len({pair["against_index"] for pair in pairs if pair["against"] == name}),
                }
                for name, one in zip(self.tests, plain, strict=True)
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

    def _hash_test(self, number: int, source: Source) -> np.ndarray:
        """Returns the hashes `[2 * images, 5]` of the images, then of their mirror images."""

        def both(i: int) -> np.ndarray:
            image = source[i]["image"]
            return np.stack([hash_or_zero(image), hash_or_zero(image, mirrored=True)])

        def make() -> np.ndarray:
            made = list(ordered_map(both, range(len(source)), self.threads))
            return np.stack(made, axis=1).reshape(-1, WORDS)

        return self._cached(f"against-{number}.npy", make)

    def _hash_shard(self, file: pathlib.Path, length: int) -> np.ndarray:
        def make() -> np.ndarray:
            images = (_bytes_of(record, "image") for record in tfds_layout.read_shard(file))
            made = list(ordered_map(hash_or_zero, images, self.threads))
            if len(made) != length:
                raise UserError(
                    f"{file} has {len(made)} examples, not {length} as in dataset_info.json. Copy or prepare it again."
                )
            return np.array(made, np.uint64).reshape(-1, WORDS)

        return self._cached(f"{file.name}.npy", make)

    def write(self, report: dict[str, Any], settings: dict[str, Any]) -> None:
        """Copies the other examples; writes description, report and manifest."""
        pairs, info = report["pairs"], self.info
        removed = {pair["index"] for pair in pairs}
        # The most different, hence most doubtful, come first.
        shown = sorted(pairs, key=lambda pair: -pair["bits"])[:_SHOWN]
        in_page = {pair["index"] for pair in shown}
        names: dict[int, str] = {}
        thumbnails: dict[int, str] = {}
        for file, first, length in self._files(self.split):
            here = removed & set(range(first, first + length))
            for number, record in enumerate(tfds_layout.read_shard(file) if here else (), start=first):
                if number in here:
                    names[number] = _bytes_of(record, "file_name").decode(errors="replace")
                if number in here & in_page:
                    thumbnails[number] = thumbnail(_bytes_of(record, "image"))

        def kept(file: pathlib.Path, first: int, left_out: set[int]) -> Iterator[bytes]:
            return (record for n, record in enumerate(tfds_layout.read_shard(file), start=first) if n not in left_out)

        plan = [
            (
                split,
                self.name + file.name.removeprefix(info.name),
                functools.partial(kept, file, first, removed if split == self.split else set()),
            )
            for split in info.splits
            for file, first, _ in self._files(split)
        ]
        total = sum(facts.num_examples for facts in info.splits.values())
        needed = sum(file.stat().st_size for split in info.splits for file, *_ in self._files(split))
        shards = write_shards(self.work, self.index, plan, total=total, needed=needed)
        for pair in pairs:
            pair["file_name"] = names[pair["index"]]
        (self.work / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (self.work / PICTURES).write_text(_page(report, shown, thumbnails, self.tests), encoding="utf-8")
        features, facts = dict(info.features.items()), read_manifest_facts(self.folder)
        label = features.get("labels", features.get("label"))
        sentence = f"Without {len(removed):,} near-duplicates of {', '.join(self.tests)}."
        tfds_layout.describe(
            self.work,
            shards,
            info.features,
            name=self.name,
            version=self.version,
            description=f"{info.description} {sentence}",
            homepage=next(iter(info.as_proto.location.urls), ""),  # `info.homepage` invents one
            num_classes=getattr(getattr(label, "feature", label), "num_classes", 0) or 0,
            source={"tfds": info.full_name},
            settings=settings,
            counts={"images": total, "near_duplicates": len(removed)},
            max_labels=facts.max_labels,  # perhaps a removed example had so many; a larger value is harmless
            exif_orientation=facts.exif_orientation or None,
        )


def _page(
    report: dict[str, Any], shown: Sequence[dict[str, Any]], thumbnails: dict[int, str], tests: dict[str, Source]
) -> str:
    """Returns HTML with pairs side by side."""
    rows = []
    for pair in shown:
        source, number = tests[pair["against"]], pair["against_index"]
        words = f"{pair['bits']} of 256 bits differ{', mirrored' if pair['mirrored'] else ''}"
        rows.append(
            f"<tr><td>{thumbnails[pair['index']]}<br>{html.escape(pair['file_name'])}</td>"
            f"<td>{thumbnail(source[number]['image'])}<br>"
            f"{html.escape(pair['against'])}: {html.escape(source.where(number))}</td><td>{words}</td></tr>"
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


def _bytes_of(record: bytes, feature: str) -> bytes:
    """The first value of a feature; empty if there is none."""
    return next(iter(parse_example(record)[feature].bytes_list.value), b"")
