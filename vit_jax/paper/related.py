"""Numbers that others published about the same models, each with its source."""

# BiT (Kolesnikov et al., 2020, arXiv 1912.11370), section 3.1.
JFT_CLASSES = 18_291

# BiT, section 2.2: the parameters of R152x4 in millions, "BiT has 928 million parameters". That leaves the head out.
BIT_MILLIONS_WITHOUT_HEAD = {"R152x4": 928}

# Parameters of BiT in millions with a head of 1,000 classes: column `param_count` of results/results-imagenet.csv in
# huggingface/pytorch-image-models, rows resnetv2_*_bit.goog_in21k_ft_in1k.
BIT_MILLIONS_1000_CLASSES = {"R50x3": 217.32, "R101x3": 387.93, "R152x2": 236.34, "R152x4": 936.53}

# Parameters of BiT in millions with a head of ImageNet-21k's 21,843 classes: the cards of
# timm/resnetv2_{50x1,101x1,101x3}_bit.goog_in21k on huggingface.co.
BIT_MILLIONS_21843_CLASSES = {"R50x1": 68.3, "R101x1": 87.2, "R101x3": 516.0}

# ObjectNet by BiT's table 6: the shorter side resized to 512, a central crop of 480, all of the image rather than the
# object's bounding box. The row R101x1 is left out for JFT-300M: it repeats that of R101x3, 54.6 and 75.6.
BIT_OBJECTNET = {
    ("R50x1", "ImageNet"): {"top-1": 30.8, "top-5": 51.8},
    ("R101x1", "ImageNet"): {"top-1": 32.2, "top-5": 54.2},
    ("R50x3", "ImageNet"): {"top-1": 33.7, "top-5": 54.7},
    ("R101x3", "ImageNet"): {"top-1": 34.6, "top-5": 56.4},
    ("R152x4", "ImageNet"): {"top-1": 36.0, "top-5": 57.0},
    ("R50x1", "ImageNet-21k"): {"top-1": 35.0, "top-5": 56.4},
    ("R101x1", "ImageNet-21k"): {"top-1": 39.2, "top-5": 61.3},
    ("R50x3", "ImageNet-21k"): {"top-1": 40.3, "top-5": 62.4},
    ("R101x3", "ImageNet-21k"): {"top-1": 44.3, "top-5": 66.4},
    ("R152x4", "ImageNet-21k"): {"top-1": 47.0, "top-5": 69.0},
    ("R50x1", "JFT-300M"): {"top-1": 37.6, "top-5": 59.5},
    ("R50x3", "JFT-300M"): {"top-1": 49.1, "top-5": 71.1},
    ("R101x3", "JFT-300M"): {"top-1": 54.6, "top-5": 75.6},
    ("R152x4", "JFT-300M"): {"top-1": 58.7, "top-5": 80.0},
}

# AugReg (Steiner et al., 2021): ImageNet top-1 after pre-training on ImageNet-21k and fine-tuning at 384, of the
# checkpoints that its authors recommend; from the README of google-research/vision_transformer.
AUGREG_IMAGENET = {
    "ViT-L/16": 85.59,
    "ViT-B/16": 85.49,
    "ViT-S/16": 83.73,
    "R50+L/32": 85.99,
    "R26+S/32": 83.85,
    "ViT-Ti/16": 78.22,
    "ViT-B/32": 83.59,
    "ViT-S/32": 79.58,
    "R+Ti/16": 75.40,
}

# What the released ImageNet-21k models reach at 384, by the dropout at fine-tuning: the README of
# google-research/vision_transformer as of 2021-05-24, which has 0.1 "as in the ViT paper". Of the paper's table 5,
# 10 of 12 numbers are nearer to the column 0.1. R50+ViT-B/16 is not in that table.
RELEASED_FINE_TUNED = {
    0.0: {
        "ViT-B/16": {"CIFAR-10": 99.02, "CIFAR-100": 92.06, "ImageNet": 84.53},
        "ViT-B/32": {"CIFAR-10": 98.88, "CIFAR-100": 92.31, "ImageNet": 81.66},
        "ViT-L/16": {"CIFAR-10": 99.13, "CIFAR-100": 92.91, "ImageNet": 84.47},
        "ViT-L/32": {"CIFAR-10": 99.06, "CIFAR-100": 93.29, "ImageNet": 81.89},
        "R50+ViT-B/16": {"CIFAR-10": 98.72, "CIFAR-100": 90.88, "ImageNet": 83.72},
    },
    0.1: {
        "ViT-B/16": {"CIFAR-10": 98.76, "CIFAR-100": 91.92, "ImageNet": 84.12},
        "ViT-B/32": {"CIFAR-10": 98.75, "CIFAR-100": 92.05, "ImageNet": 81.31},
        "ViT-L/16": {"CIFAR-10": 99.14, "CIFAR-100": 93.22, "ImageNet": 85.05},
        "ViT-L/32": {"CIFAR-10": 99.09, "CIFAR-100": 93.34, "ImageNet": 81.13},
        "R50+ViT-B/16": {"CIFAR-10": 98.94, "CIFAR-100": 92.30, "ImageNet": 85.08},
    },
}

# BiT's table 1: ImageNet top-1 of BiT-M, which is R152x4, pre-trained on ImageNet-21k; the top of its area in the ViT
# paper's figure 3.
BIT_M_IMAGENET = {"R152x4": 85.39}

# VTAB-1k of BiT-M: the README of google-research/big_transfer, "re-runs and not the exact paper models".
BIT_M_VTAB = {
    "R152x4": {"natural": 80.77, "specialized": 85.67, "structured": 61.08, "mean": 73.51},
    "R101x3": {"natural": 80.29, "specialized": 85.75, "structured": 59.40, "mean": 72.65},
}

# VTAB-1k of a ResNet-50 trained on ImageNet with its labels and by rotation (S4L; Zhai et al., 2019a), by VTAB's
# authors: docs/data/results.csv of google-research/task_adaptation, row Sup-Rotation-100% (the best of 4 settings of
# hyper-parameters for each task), in the order of `tables.VTAB_TASKS`. The ViT paper's figure 2 has a bar for "S4L
# (R50x1)" and does not say whether it is this model.
S4L_VTAB = {
    "natural": (91.69, 53.66, 69.52, 90.76, 88.13, 32.80, 88.46),
    "specialized": (83.44, 96.00, 81.97, 71.06),
    "structured": (47.33, 57.25, 36.58, 88.32, 52.08, 77.06, 51.59, 33.66),
}
