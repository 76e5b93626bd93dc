"""Prepares data sets of the TFDS catalogue, or of your own builders, as array_record with TFDS itself."""

import importlib
import importlib.util
import pathlib
from typing import Any

from vit_jax.data.prepare import tfds_layout
from vit_jax.errors import UserError

# They need TensorFlow to fix some images, the first after hours.
_LATE_TO_FAIL = ("imagenet2012",)
_INSTALL = "pip install --editable '.[prepare]'"


def prepare_catalogue(
    name: str, data_dir: pathlib.Path, *, manual_dir: pathlib.Path | None = None, module: str | None = None
) -> tuple[dict[str, Any], pathlib.Path]:
    """Downloads and prepares a data set, unless it exists.

    Args:
      name: TFDS's name, such as "cifar10", "imagenet_v2/matched-frequency" or "cifar10:3.0.2".
      data_dir: folder of data sets.
      manual_dir: folder with archives that TFDS cannot download.
      module: Python module to import first, which defines the builder.

    Returns:
      the manifest and the folder.

    Raises:
      UserError: the data set is unknown or needs TensorFlow, an archive is missing, or the download failed.
    """
    import tensorflow_datasets as tfds

    if name.startswith(_LATE_TO_FAIL) and importlib.util.find_spec("tensorflow") is None:
        raise UserError(f"preparing {name} needs TensorFlow (training does not). Type: {_INSTALL}")
    try:
        if module is not None:
            importlib.import_module(module)
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        config = tfds.download.DownloadConfig(manual_dir=manual_dir)
        builder.download_and_prepare(download_config=config)
    except ImportError as error:
        if (error.name or "").split(".")[0] in ("tensorflow", "apache_beam") or "tensorflow" in str(error):
            raise UserError(f"preparing {name} needs TensorFlow (training does not). Type: {_INSTALL}") from error
        raise UserError(f"preparing {name} needs a package that is not installed: {error}.") from error
    except tfds.core.registered.DatasetNotFoundError as error:
        hint = next((line for line in str(error).splitlines() if line.startswith("Did you mean")), "")
        raise UserError(
            f"TFDS knows no data set {name!r}. {hint} For a builder of your own, add --import=my.module; for images in "
            "folders, use the command image_folder."
        ) from error
    except (AssertionError, ValueError, TypeError, OSError) as error:  # raised by TFDS and its downloads
        raise UserError(f"TFDS could not prepare {name}: {error}") from error
    folder = pathlib.Path(builder.data_dir)
    if builder.info.file_format is None or builder.info.file_format.value != "array_record":
        raise UserError(f"{folder} already exists, as {builder.info.file_format}. Remove it, or choose another --out.")
    if not (folder / tfds_layout.MANIFEST).exists():
        write_manifest(folder, builder.info)
    return tfds_layout.read_manifest(folder), folder


def write_manifest(folder: pathlib.Path, info: Any) -> None:
    """Writes the manifest of a data set that TFDS prepared; `info` is its `tfds.core.DatasetInfo`."""
    splits = {
        split: {"examples": facts.num_examples, "record_bytes": facts.num_bytes, "shards": facts.num_shards}
        for split, facts in info.splits.items()
    }
    labels = [feature.num_classes for feature in info.features.values() if hasattr(feature, "num_classes")]
    tfds_layout.write_manifest(
        folder,
        splits,
        name=info.name,
        version=str(info.version),
        num_classes=max(labels, default=0),
        source={"tfds": info.full_name, "download_bytes": int(info.download_size or 0)},
        settings={"command": "tfds"},
    )
