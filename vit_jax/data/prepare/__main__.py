"""Prepares data sets for training, which reads them without TensorFlow.

  python -m vit_jax.data.prepare imagenet21k winter21_whole.tar      archives of image-net.org
  python -m vit_jax.data.prepare image_folder birds/                 <split>/<class>/<image>, a folder or zip file
  python -m vit_jax.data.prepare manifest list.jsonl                 a list of images with labels, of any size
  python -m vit_jax.data.prepare tfds cifar10 oxford_iiit_pet        data sets of the TFDS catalogue
  python -m vit_jax.data.prepare dedup imagenet21k/1.0.0 --against tfds:cifar10:test
  python -m vit_jax.data.prepare check imagenet21k/1.0.0             verifies all files by the manifest

Each command has its own --help. All write <out>/<name>/<version>/: encoded images as array_record, the files that TFDS
needs to read them, and manifest.json with counts, sizes and hashes. After an interruption (Ctrl-C, kill -9, full disk)
rerun the same command to resume; the result has the same bytes. A data set gets its final name once it is complete.
"""

import argparse
import os
import pathlib
import sqlite3
import sys
from collections.abc import Callable
from typing import Any

from vit_jax.console import run_command
from vit_jax.errors import UserError


def _path(text: str) -> pathlib.Path:
    return pathlib.Path(text).expanduser()


def _command(commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text.strip().splitlines()[0],
        description=text.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=_path,
        default=_path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"),
        help="folder of data sets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)",
    )


def _add_options(parser: argparse.ArgumentParser, name_help: str) -> None:
    _add_out(parser)
    parser.add_argument("--name", help=name_help)
    parser.add_argument("--version", default="1.0.0", help="of the data set (default: 1.0.0)")
    parser.add_argument("--num_shards", type=int, help="files per split (default: by size, as in TFDS)")
    parser.add_argument(
        "--no_verify",
        action="store_true",
        help="do not decode each image, which takes most of the time; broken images stay",
    )
    parser.add_argument(
        "--max_broken", type=int, default=100, help="most broken images to skip before it is an error (default: 100)"
    )
    _add_threads(parser)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, help="default: one per core; does not change the result")


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the commands."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    imagenet = _command(
        commands,
        "imagenet21k",
        """
ImageNet-21k from the archives of image-net.org.

  python -m vit_jax.data.prepare imagenet21k winter21_whole.tar --out=/data
  python -m vit_jax.data.prepare imagenet21k fall11_whole.tar --labels=single --out=/data
  python -m vit_jax.data.prepare imagenet21k classes/ --out=/data                       a folder of n01440764.tar, ...

Needs: the uncompressed archives on a disk with fast random reads (an SSD), about their size again at --out (1.1 to
1.3 TB in all), and little memory, whatever the number of images.
Takes: two reads of the archives and one decoding of all images, about 300 images per second and core.
Copies of an image are merged into one example with the labels of all (--labels=multi), as for the released models.
The result has one split, full. Held out for the released models: test full[:25600], val full[25600:51200].""",
        _imagenet21k,
    )
    imagenet.add_argument("archives", nargs="+", type=_path, metavar="TAR", help="tar file, or folder of tar files")
    imagenet.add_argument(
        "--labels",
        choices=("multi", "single"),
        default="multi",
        help="multi: merge copies, keep all labels; single: one example per image and class (default: multi)",
    )
    imagenet.add_argument(
        "--classes",
        default="released",
        help="order of the labels: released (the 21,843 of the released heads), fall11 (21,841), archive (those of the "
        "archive, sorted) or a text file of WordNet ids (default: released)",
    )
    _add_options(imagenet, "default: imagenet21k, or imagenet21k_single with --labels=single")

    folder = _command(
        commands,
        "image_folder",
        """
Images in folders or in a zip file: <split>/<class>/<image>.

  python -m vit_jax.data.prepare image_folder birds/ --out=/data
  python -m vit_jax.data.prepare image_folder birds.zip --name=my_birds --out=/data
  python -m vit_jax.data.prepare image_folder birds.zip --name=owls --classes=barn_owl,snowy_owl

Training reads such folders directly too. Prepared, they are a few large files, which are faster on network disks and
buckets. Needs the size of the images again at --out.""",
        _image_folder,
    )
    folder.add_argument("source", type=_path, metavar="DIR_OR_ZIP")
    folder.add_argument("--classes", metavar="NAME,NAME,...", help="take only these classes (default: all)")
    _add_options(folder, "default: the folder's name")

    listing = _command(
        commands,
        "manifest",
        """
A list of images with labels, the format of web-scale data sets: JSON lines or parquet.

  python -m vit_jax.data.prepare manifest web/list.jsonl --classes=web/classes.txt --out=/data
  python -m vit_jax.data.prepare manifest list.parquet --images_root=/images --merge --out=/data

Rows are {"image": "a/1.jpg", "label": 5}. The label, also spelled "labels", is a number, a name, or a list of either.
Paths are relative to the list and must not leave its folder, or --images_root. Needs the size of the images again at
--out, and about 0.4 kB per image for sorting. Memory does not grow with the list.""",
        _manifest,
    )
    listing.add_argument("list", type=_path, metavar="JSONL_OR_PARQUET")
    listing.add_argument("--images_root", type=_path, help="folder that paths are relative to (default: the list's)")
    listing.add_argument("--classes", type=_path, help="text file of names, one per line, in the order of the labels")
    listing.add_argument("--num_classes", type=int, help="of numbered labels (default: the largest plus one)")
    listing.add_argument("--single_label", action="store_true", help="one label per example instead of a list")
    listing.add_argument("--merge", action="store_true", help="merge copies of an image, with the labels of all")
    listing.add_argument("--split", default="train", help="name of the split (default: train)")
    _add_options(listing, "default: the list's name")

    catalogue = _command(
        commands,
        "tfds",
        """
Data sets of the TFDS catalogue, as array_record.

  python -m vit_jax.data.prepare tfds cifar10 cifar100 oxford_iiit_pet oxford_flowers102 --out=/data
  python -m vit_jax.data.prepare tfds imagenet2012 --manual_dir=/archives --out=/data
  python -m vit_jax.data.prepare tfds my_birds --import=my.builders

TFDS downloads and prepares them. For most it needs TensorFlow (pip install --editable '.[prepare]'); training does not.
After an interruption, downloads are kept, but the unfinished data set starts over.""",
        _tfds,
    )
    catalogue.add_argument("names", nargs="+", metavar="NAME", help="such as cifar10 or imagenet_v2/matched-frequency")
    catalogue.add_argument("--manual_dir", type=_path, help="folder with archives that TFDS cannot download")
    catalogue.add_argument("--import", dest="module", help="Python module that defines the builder")
    _add_out(catalogue)

    dedup = _command(
        commands,
        "dedup",
        """
Removes near-duplicates of test images from a pre-training set.

  python -m vit_jax.data.prepare dedup /data/imagenet21k/1.0.0 --out=/data \\
      --against tfds:cifar10:test tfds:imagenet2012:validation photos/:test

Writes a new data set with report.json (all pairs) and report.html (pairs side by side, to be looked at). Finds copies
that were re-encoded, resized, made grey, mirrored or cropped by a few percent. Needs the size of the data set again at
--out. Takes: about 500 images per second and core, and a quick copy.""",
        _dedup,
    )
    dedup.add_argument("source", type=_path, metavar="DIR", help="prepared data set, with its version")
    dedup.add_argument(
        "--against", nargs="+", required=True, metavar="SET:SPLIT", help="test sets, as in data.dataset, or folders"
    )
    dedup.add_argument("--split", help="split to clean; others are copied (default: full or train)")
    dedup.add_argument("--near", type=int, help="most differing bits of the 64-bit hash (default: 11)")
    dedup.add_argument(
        "--sure", type=int, help="most differing bits of the 256-bit hash; lower removes fewer (default: 72)"
    )
    dedup.add_argument("--name", help="of the new data set (default: the old one's with _dedup)")
    dedup.add_argument("--version", help="of the new data set (default: the old one's)")
    _add_threads(dedup)
    _add_out(dedup)

    check = _command(
        commands,
        "check",
        """
Compares a prepared data set with its manifest, reading every byte.

  python -m vit_jax.data.prepare check /data/imagenet21k/1.0.0

Use it after copying. Takes the time to read the data set.""",
        _check,
    )
    check.add_argument("folder", type=_path, metavar="DIR", help="prepared data set, with its version")
    return parser


def main(arguments: list[str]) -> int:
    """Runs a command; returns the exit status."""
    args = make_parser().parse_args(arguments)
    try:
        threads = getattr(args, "threads", None)
        if threads is not None and threads < 1:
            raise UserError(f"--threads must be at least 1, got {threads}.")
        return args.run(args)
    except BrokenPipeError:  # for `run_command`
        raise
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except sqlite3.DatabaseError as error:  # index.sqlite is damaged or another file
        print(f"error: the unfinished index is damaged ({error}). Remove the .incomplete folder.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume", file=sys.stderr)
        return 130


def _imagenet21k(args: argparse.Namespace) -> int:
    from vit_jax.data.prepare.imagenet21k import ImageNet21k

    origin = ImageNet21k(args.archives, labels=args.labels, classes=args.classes)
    return _prepare(origin, args, args.name or ("imagenet21k" if args.labels == "multi" else "imagenet21k_single"))


def _image_folder(args: argparse.Namespace) -> int:
    from vit_jax.data.prepare.image_folders import ImageFolder

    name = args.name or _name_of(args.source)
    source, result = args.source.resolve(), (args.out / name).resolve()
    if result.is_relative_to(source):
        raise UserError(f"the result {result} would be among the images in {source}. Choose another --out or --name.")
    classes = None if args.classes is None else [each for each in args.classes.split(",") if each]
    return _prepare(ImageFolder(args.source, classes=classes), args, name)


def _manifest(args: argparse.Namespace) -> int:
    from vit_jax.data.prepare.image_lists import ImageList

    options = _options(args, "images_root", "num_classes", "single_label", "merge", "split")
    origin = ImageList(args.list, class_names=args.classes, **options)
    return _prepare(origin, args, args.name or _name_of(args.list))


def _options(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _name_of(path: pathlib.Path) -> str:
    """Makes a name that TFDS accepts from that of a file."""
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in path.resolve().stem.lower()).strip("_")
    return name if name[:1].isalpha() else f"set_{name}"


def _prepare(origin: Any, args: argparse.Namespace, name: str) -> int:
    from vit_jax.data.prepare.passes import prepare, summary

    options = _options(args, "version", "num_shards", "max_broken", "threads")
    print(summary(*prepare(origin, args.out, name, verify=not args.no_verify, **options)))
    return 0


def _tfds(args: argparse.Namespace) -> int:
    from vit_jax.data.prepare.catalogue import prepare_catalogue
    from vit_jax.data.prepare.passes import summary

    for name in args.names:
        print(summary(*prepare_catalogue(name, args.out, manual_dir=args.manual_dir, module=args.module)))
    return 0


def _dedup(args: argparse.Namespace) -> int:
    from vit_jax.data.prepare import dedup
    from vit_jax.data.prepare.passes import summary

    options = _options(args, "split", "name", "version", "near", "sure", "threads")
    manifest, folder = dedup.dedup(args.source, args.against, args.out, **options)
    print(summary(manifest, folder))
    print(f"  near-duplicates removed: {manifest['counts']['near_duplicates']:,}; see {folder / dedup.PICTURES}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from vit_jax.data.prepare.tfds_layout import check, read_manifest

    wrong = list(check(args.folder))
    for line in wrong:
        print(line)
    if wrong:
        raise UserError(f"{args.folder} differs from its manifest in {len(wrong)} files. Copy or prepare it again.")
    print(f"{args.folder}: all {len(read_manifest(args.folder)['files']):,} files match the manifest")
    return 0


if __name__ == "__main__":
    run_command(main)
