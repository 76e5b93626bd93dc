"""Prepares data sets for training, which reads them without TensorFlow.

  python -m vit_jax.data.prepare imagenet21k winter21_whole.tar      the archives of image-net.org
  python -m vit_jax.data.prepare image_folder birds/                 <split>/<class>/<image>, a folder or zip file
  python -m vit_jax.data.prepare manifest list.jsonl                 a list of images with labels, of any size
  python -m vit_jax.data.prepare tfds cifar10 oxford_iiit_pet        data sets of the TFDS catalogue
  python -m vit_jax.data.prepare dedup imagenet21k/1.0.0 --against tfds:cifar10:test
  python -m vit_jax.data.prepare check imagenet21k/1.0.0             compares all files with the manifest

Each command has its own --help. All write <out>/<name>/<version>/: files of encoded images in array_record, what TFDS
needs to read them, and manifest.json with counts, sizes and hashes. A command that was interrupted, by Ctrl-C, kill -9
or a full disk, goes on where it was when it is run again, and the result is the same to the byte. Under the final name
there is a whole data set or none.
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

_COMMANDS = "imagenet21k | image_folder | manifest | tfds | dedup | check"


def _path(text: str) -> pathlib.Path:
    return pathlib.Path(text).expanduser()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


_positive.__name__ = "number"  # as argparse calls it


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


def _add_options(parser: argparse.ArgumentParser, name: str | None, name_help: str) -> None:
    _add_out(parser)
    parser.add_argument("--name", default=name, help=name_help)
    parser.add_argument("--version", default="1.0.0", help="of the data set (default: 1.0.0)")
    parser.add_argument("--num_shards", type=int, help="files of each split (default: by size, as TFDS would)")
    parser.add_argument(
        "--no_verify",
        action="store_true",
        help="do not decode each image, which takes most of the time; broken ones stay in",
    )
    parser.add_argument(
        "--max_broken", type=int, default=100, help="more broken images are an error; fewer are left out (default: 100)"
    )
    _add_threads(parser)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_positive, help="default: one for each core; does not change the result")


def make_parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar=_COMMANDS)

    imagenet = _command(
        commands,
        "imagenet21k",
        """
ImageNet-21k from the archives of image-net.org.

  python -m vit_jax.data.prepare imagenet21k winter21_whole.tar --out=/data
  python -m vit_jax.data.prepare imagenet21k fall11_whole.tar --labels=single --out=/data
  python -m vit_jax.data.prepare imagenet21k classes/ --out=/data                       a folder of n01440764.tar, ...

Needs: the archives, uncompressed, on a disk that reads from the middle of files quickly (an SSD), about their size once
more at --out (1.1 to 1.3 TB for the whole), and little memory, whatever the number of images.
Takes: the time to read the archives twice and to decode all images once, about 300 images a second and core.
Copies of an image are merged into one example with the labels of all (--labels=multi), as for the released models.
The result has one split, full. Held out for the released models: test full[:25600], val full[25600:51200].""",
        _imagenet21k,
    )
    imagenet.add_argument("archives", nargs="+", type=_path, metavar="TAR", help="tar file, or folder of tar files")
    imagenet.add_argument(
        "--labels",
        choices=("multi", "single"),
        default="multi",
        help="multi: copies merged, all labels; single: an example for each pair of image and class (default: multi)",
    )
    imagenet.add_argument(
        "--classes",
        default="released",
        help="order of the labels: released (21,843, as the released heads have them), fall11 (21,841), archive (those "
        "that the archive has, sorted) or a text file of WordNet ids (default: released)",
    )
    _add_options(imagenet, None, "default: imagenet21k, or imagenet21k_single with --labels=single")

    folder = _command(
        commands,
        "image_folder",
        """
Images in folders or in a zip file: <split>/<class>/<image>.

  python -m vit_jax.data.prepare image_folder birds/ --out=/data
  python -m vit_jax.data.prepare image_folder birds.zip --name=my_birds --out=/data

Training reads such folders as they are, too; prepared, they are a few large files, which network disks and buckets
like better. Needs the size of the images once more at --out.""",
        _image_folder,
    )
    folder.add_argument("source", type=_path, metavar="DIR_OR_ZIP")
    _add_options(folder, None, "default: that of the folder")

    listing = _command(
        commands,
        "manifest",
        """
A list of images with labels, as web-scale sets have it: JSON lines or parquet.

  python -m vit_jax.data.prepare manifest web/list.jsonl --classes=web/classes.txt --out=/data
  python -m vit_jax.data.prepare manifest list.parquet --images_root=/images --merge --out=/data

Rows are {"image": "a/1.jpg", "label": 5}; the label may be a number, a name, or a list of either (also under "labels").
Paths are relative to the list and may not leave its folder, or that of --images_root. Needs the size of the images once
more at --out, and about 0.4 kB an image for sorting. The memory needed does not grow with the list.""",
        _manifest,
    )
    listing.add_argument("list", type=_path, metavar="JSONL_OR_PARQUET")
    listing.add_argument("--images_root", type=_path, help="folder that paths are relative to (default: of the list)")
    listing.add_argument("--classes", type=_path, help="text file of names, one a line, in the order of the labels")
    listing.add_argument("--num_classes", type=int, help="of numbered labels (default: as many as the largest wants)")
    listing.add_argument("--single_label", action="store_true", help="examples have one label, not a list")
    listing.add_argument("--merge", action="store_true", help="copies of an image become one example, with all labels")
    listing.add_argument("--split", default="train", help="name of the split (default: train)")
    _add_options(listing, None, "default: that of the list")

    catalogue = _command(
        commands,
        "tfds",
        """
Data sets of the TFDS catalogue, as array_record.

  python -m vit_jax.data.prepare tfds cifar10 cifar100 oxford_iiit_pet oxford_flowers102 --out=/data
  python -m vit_jax.data.prepare tfds imagenet2012 --manual_dir=/archives --out=/data
  python -m vit_jax.data.prepare tfds my_birds --import=my.builders

TFDS downloads and prepares them. Most need TensorFlow for it (pip install --editable '.[prepare]'); training does not.
Of an interrupted command downloads are kept, but the data set that was being written is begun anew.""",
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
Takes near-duplicates of test images out of a pre-training set.

  python -m vit_jax.data.prepare dedup /data/imagenet21k/1.0.0 --out=/data \\
      --against tfds:cifar10:test tfds:imagenet2012:validation photos/:test

Writes a new data set, and in it report.json (all pairs) and report.html (pairs side by side: look at them). Finds
copies that were encoded anew, resized, made grey, mirrored or cropped by a few percent. Needs the size of the data set
once more at --out. Takes: about 500 images a second and core, and a quick copy.""",
        _dedup,
    )
    dedup.add_argument("source", type=_path, metavar="DIR", help="prepared data set, with its version")
    dedup.add_argument(
        "--against",
        nargs="+",
        required=True,
        metavar="SET:SPLIT",
        help="test sets: as data.dataset names them, or folders",
    )
    dedup.add_argument("--split", help="to clean; others are copied (default: full or train)")
    dedup.add_argument("--near", type=int, help="bits of the 64-bit hash that may differ (default: 11)")
    dedup.add_argument(
        "--sure", type=int, help="bits of the 256-bit hash that may differ; lower spares more (default: 72)"
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
        return args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # for `run_command`
        raise
    except OSError as error:  # such as an unreadable folder
        print(f"error: {error}", file=sys.stderr)
        return 1
    except sqlite3.DatabaseError as error:  # a file that the index took for its own
        print(
            f"error: the index of what was begun is damaged ({error}). Remove the .incomplete folder.", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
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
        raise UserError(f"the result, {result}, would lie among the images in {source}. Give another --out or --name.")
    return _prepare(ImageFolder(args.source), args, name)


def _manifest(args: argparse.Namespace) -> int:
    from vit_jax.data.prepare.image_lists import ImageList

    origin = ImageList(
        args.list,
        images_root=args.images_root,
        class_names=args.classes,
        num_classes=args.num_classes,
        single_label=args.single_label,
        merge=args.merge,
        split=args.split,
    )
    return _prepare(origin, args, args.name or _name_of(args.list))


def _name_of(path: pathlib.Path) -> str:
    """A name that TFDS can find, made of that of a file."""
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in path.resolve().stem.lower()).strip("_")
    return name if name[:1].isalpha() else f"set_{name}"


def _prepare(origin: Any, args: argparse.Namespace, name: str) -> int:
    from vit_jax.data.prepare.passes import Options, prepare, summary

    options = Options(
        data_dir=args.out,
        name=name,
        version=args.version,
        num_shards=args.num_shards,
        verify=not args.no_verify,
        max_broken=args.max_broken,
        threads=args.threads,
    )
    print(summary(prepare(origin, options), options.folder))
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

    manifest, folder = dedup.dedup(
        args.source,
        args.against,
        args.out,
        split=args.split,
        name=args.name,
        version=args.version,
        near=dedup.NEAR if args.near is None else args.near,
        sure=dedup.SURE if args.sure is None else args.sure,
        threads=args.threads,
    )
    print(summary(manifest, folder))
    print(f"  near-duplicates taken out: {manifest['counts']['near_duplicates']:,}; look at {folder / dedup.PICTURES}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from vit_jax.data.prepare.tfds_layout import check, read_manifest

    wrong = list(check(args.folder))
    for line in wrong:
        print(line)
    if wrong:
        raise UserError(f"{args.folder} is not as it was written ({len(wrong)} files). Copy or prepare it again.")
    print(f"{args.folder}: all {len(read_manifest(args.folder)['files']):,} files are as they were written")
    return 0


if __name__ == "__main__":
    run_command(main)
