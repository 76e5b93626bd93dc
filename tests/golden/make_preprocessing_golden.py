"""Makes preprocessing.npz: results of transformers and timm on an image for each configuration of preprocessing.json.

Run it from the root of the repository where torch, transformers and timm are installed:

    python -m tests.golden.make_preprocessing_golden

Made with torch 2.14.1, transformers 5.24.0, timm 1.0.31, Pillow 11.
"""

import json
import pathlib

import numpy as np
import PIL.Image
import transformers
from timm.data import create_transform, resolve_data_config

FOLDER = pathlib.Path(__file__).parent


def make_image() -> np.ndarray:
    """Smooth colours with sharp edges, `[41, 63, 3]`, in which every way to resample shows."""
    rng = np.random.default_rng(0)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    image = np.array(coarse.resize((63, 41), PIL.Image.Resampling.BICUBIC))
    image[10:30:3, 20:50] = 255 - image[10:30:3, 20:50]
    return image


def by_transformers(image: np.ndarray, config: dict) -> np.ndarray:
    """`[height, width, 3]`, float32, by the processor that uses Pillow."""
    kind = config.get("image_processor_type", "ViTImageProcessor")
    arguments = {name: value for name, value in config.items() if not name.endswith("_type")}
    processor = getattr(transformers, kind + "Pil")(**arguments)
    return np.asarray(processor(PIL.Image.fromarray(image))["pixel_values"][0], np.float32).transpose(1, 2, 0)


def by_timm(image: np.ndarray, config: dict) -> np.ndarray:
    """`[height, width, 3]`, float32."""
    transform = create_transform(**resolve_data_config(pretrained_cfg=config), is_training=False)
    return transform(PIL.Image.fromarray(image)).numpy().transpose(1, 2, 0)


def main() -> None:
    """Writes the file."""
    image = make_image()
    arrays = {"image": image}
    for library, make in (("huggingface", by_transformers), ("timm", by_timm)):
        for name, config in json.loads((FOLDER / "preprocessing.json").read_text())[library].items():
            arrays[f"{library}/{name}"] = make(image, config)
    # The reader's file has no image of 224x224; 64 of its pixels are enough.
    arrays["huggingface/all defaults"] = arrays["huggingface/all defaults"][::28, ::28]
    np.savez_compressed(FOLDER / "preprocessing.npz", **arrays)


if __name__ == "__main__":
    main()
