"""Makes timm_counts.json, beside this file: the numbers of parameters of timm's models.

Nothing of vit_jax is imported. Models are made on torch's meta device, without memory for their weights.

Made with torch 2.13.0 (CPU) and timm 1.0.31:

    python -m venv oracle
    oracle/bin/pip install torch==2.13.0 numpy==2.4.6 pyyaml huggingface_hub safetensors pillow
    oracle/bin/pip install --no-deps timm==1.0.31
    oracle/bin/python tests/golden/make_timm_counts.py

Contents: a list of

    model       name of the model in vit_jax
    overrides   attributes in which it differs from what the name says
    timm        name of the model in timm
    image_size  side of the images in pixels
    counts      parameters by number of classes: none, ImageNet's 1,000, ImageNet-21k's 21,843
"""

import json
import pathlib

from make_vit_golden import import_timm

OUTPUT = pathlib.Path(__file__).with_name("timm_counts.json")
NUM_CLASSES = (0, 1000, 21_843)

# vit_jax's name, then timm's without the image size: all that timm 1.0.31 lists of these sizes and patches.
WITH_IMAGE_SIZE = {
    "ViT-Ti/16": "vit_tiny_patch16",
    "ViT-S/8": "vit_small_patch8",
    "ViT-S/16": "vit_small_patch16",
    "ViT-S/32": "vit_small_patch32",
    "ViT-B/8": "vit_base_patch8",
    "ViT-B/16": "vit_base_patch16",
    "ViT-B/32": "vit_base_patch32",
    "ViT-L/14": "vit_large_patch14",
    "ViT-L/16": "vit_large_patch16",
    "ViT-L/32": "vit_large_patch32",
    "ViT-H/14": "vit_huge_patch14",
    "R+Ti/16": "vit_tiny_r_s16_p8",
    "R26+S/32": "vit_small_r26_s32",
    "R26+B/32": "vit_base_r26_s32",
    "R50+ViT-B/16": "vit_base_r50_s16",
    "R50+L/32": "vit_large_r50_s32",
}
POOLINGS = {
    ("ViT-B/16", "gap"): ("vit_base_patch16_gap_224", 224),
    ("ViT-H/14", "gap"): ("vit_huge_patch14_gap_224", 224),
    ("ViT-B/16", "map"): ("vit_base_patch16_siglip_224", 224),
    ("ViT-B/32", "map"): ("vit_base_patch32_siglip_256", 256),
    ("ViT-L/16", "map"): ("vit_large_patch16_siglip_384", 384),
}
RESNETS = ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4")
RESNET_IMAGE_SIZE = 224  # makes no difference


def main() -> None:
    import_timm()
    import timm
    import torch

    rows = []

    def add(model: str, timm_name: str, image_size: int, **overrides: str) -> None:
        counts = {}
        for num_classes in NUM_CLASSES:
            with torch.device("meta"):
                module = timm.create_model(timm_name, num_classes=num_classes)
            counts[str(num_classes)] = sum(parameter.numel() for parameter in module.parameters())
        rows.append(
            {"model": model, "overrides": overrides, "timm": timm_name, "image_size": image_size, "counts": counts}
        )

    known = set(timm.list_models())
    for model, family in WITH_IMAGE_SIZE.items():
        for image_size in (224, 384):
            if f"{family}_{image_size}" in known:
                add(model, f"{family}_{image_size}", image_size)
    for (model, pool), (timm_name, image_size) in POOLINGS.items():
        add(model, timm_name, image_size, pool=pool)
    for size in RESNETS:
        add(f"R{size}", f"resnetv2_{size}_bit", RESNET_IMAGE_SIZE)

    lines = ",\n".join(json.dumps(row) for row in rows)
    OUTPUT.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
