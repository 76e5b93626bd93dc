"""Throughput and memory of `vit_jax.data.prepare imagenet21k`, from few images to many.

    python -m benchmarks.prepare                          # small JPEGs: 1,000, 10,000 and 100,000
    python -m benchmarks.prepare --photos=photos.zip --images=1000,10000

Makes an archive like that of winter 2021 (tars of 1,000 images in a tar; every 50th image has a copy in another class),
prepares it in another process, and prints its seconds, images a second and peak memory.
"""

import argparse
import io
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile

import numpy as np
import simplejpeg

from vit_jax.data.class_names import wordnet_ids

_PER_CLASS = 1000


def _small_jpegs() -> list[bytes]:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (100, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    return [simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=80) for image in coarse]


def _numbered(image: bytes, number: int) -> bytes:
    """The same picture in other bytes, with a comment after the start of the JPEG."""
    return image[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + image[2:]


def make_archive(path: pathlib.Path, pictures: list[bytes], images: int) -> None:
    """Writes an archive in which every 50th image is a copy of the one 1,000 before."""
    wnids = wordnet_ids("imagenet21k")
    numbers = iter(range(images))
    with tarfile.open(path, "w") as outer:
        for class_number in itertools.count():
            of_class = list(itertools.islice(numbers, _PER_CLASS))
            if not of_class:
                return
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for number in of_class:
                    content = number - _PER_CLASS if number % 50 == 0 and number >= _PER_CLASS else number
                    _add(
                        archive,
                        f"{wnids[class_number]}_{number}.JPEG",
                        _numbered(pictures[content % len(pictures)], content),
                    )
            _add(outer, f"winter21_whole/{wnids[class_number]}.tar", inner.getvalue())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def main(arguments: list[str]) -> int:
    """Prints a line of JSON for each number of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="1000,10000,100000", help="numbers of images (default: 1000,10000,100000)")
    parser.add_argument(
        "--photos", type=pathlib.Path, help="zip file of JPEGs to take (default: small ones, made here)"
    )
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    args = parser.parse_args(arguments)
    if args.photos:
        with zipfile.ZipFile(args.photos) as archive:
            pictures = [archive.read(name) for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg"))]
    else:
        pictures = _small_jpegs()
    for images in map(int, args.images.split(",")):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            archive_path = pathlib.Path(folder, "winter21_whole.tar")
            make_archive(archive_path, pictures, images)
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "vit_jax.data.prepare", "imagenet21k", archive_path, f"--out={folder}"],
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
            assert process.stderr is not None
            told = process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            row = {
                "images": images,
                "archive_bytes": archive_path.stat().st_size,
                "seconds": round(seconds, 1),
                "images_per_second": round(images / seconds),
                "max_rss_mib": usage.ru_maxrss // 1024,
                "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
                "passes": [line for line in told.splitlines() if " images/s" in line and " in " in line],
            }
            print(json.dumps(row), flush=True)
            if status:
                print(told, file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
