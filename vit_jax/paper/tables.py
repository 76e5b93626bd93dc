"""The numbers of "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021, arXiv 2010.11929), table by table.

Accuracies are top-1 in percent unless said otherwise. Models bear the names of `vit_jax.models.create_model`; the paper
writes "R50x1+ViT-B/32" for R50+ViT-B/32, and "BiT-L" for the R152x4 that was trained on JFT-300M.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """A row of table 1."""

    num_layers: int
    hidden_dim: int
    mlp_dim: int
    num_heads: int
    millions: int  # of parameters


# 86 and 632 are B/16 and H/14 with the pre-logits layer and without the head. Counted so, L/16 has 304.4M and L/32
# 306.6M.
TABLE_1 = {
    "ViT-B": Size(12, 768, 3072, 12, millions=86),
    "ViT-L": Size(24, 1024, 4096, 16, millions=307),
    "ViT-H": Size(32, 1280, 5120, 16, millions=632),
}


@dataclasses.dataclass(frozen=True)
class Score:
    """A published number.

    Attributes:
      mean: of three fine-tuning runs, or what the table gives.
      std: their standard deviation, where the table gives it.
      also: a second number that the table gives for the same.
    """

    mean: float
    std: float | None = None
    also: float | None = None


# Table 2, by model and what it was pre-trained on: means and deviations. ImageNet is at resolution 512 (L/16) or 518
# (H/14) and with Polyak averaging (section 4.1), unlike that of tables 5 and 6.
_TABLE_2_TASKS = ("ImageNet", "ImageNet ReaL", "CIFAR-10", "CIFAR-100", "Pets", "Flowers-102", "VTAB")


def _table_2_row(*numbers: tuple[float, ...]) -> dict[str, Score]:
    return {task: Score(*each) for task, each in zip(_TABLE_2_TASKS, numbers, strict=True)}


TABLE_2 = {
    ("ViT-H/14", "JFT-300M"): _table_2_row(
        (88.55, 0.04), (90.72, 0.05), (99.50, 0.06), (94.55, 0.04), (97.56, 0.03), (99.68, 0.02), (77.63, 0.23)
    ),
    ("ViT-L/16", "JFT-300M"): _table_2_row(
        (87.76, 0.03), (90.54, 0.03), (99.42, 0.03), (93.90, 0.05), (97.32, 0.11), (99.74, 0.00), (76.28, 0.46)
    ),
    ("ViT-L/16", "ImageNet-21k"): _table_2_row(
        (85.30, 0.02), (88.62, 0.05), (99.15, 0.03), (93.25, 0.05), (94.67, 0.15), (99.61, 0.02), (72.72, 0.21)
    ),
    ("R152x4", "JFT-300M"): _table_2_row(
        (87.54, 0.02), (90.54,), (99.37, 0.06), (93.51, 0.08), (96.62, 0.23), (99.63, 0.03), (76.29, 1.70)
    ),
    # 88.4 as published (Xie et al., 2020), 88.5 by Touvron et al. (2020, FixEfficientNet).
    ("Noisy Student EffNet-L2", "ImageNet and unlabelled JFT-300M"): {
        "ImageNet": Score(88.4, also=88.5),
        "ImageNet ReaL": Score(90.55),
    },
}

# Table 2, last row: cores (two a chip) times days of pre-training.
TPUV3_CORE_DAYS = {
    ("ViT-H/14", "JFT-300M"): 2500,
    ("ViT-L/16", "JFT-300M"): 680,
    ("ViT-L/16", "ImageNet-21k"): 230,
    ("R152x4", "JFT-300M"): 9900,
    ("Noisy Student EffNet-L2", "ImageNet and unlabelled JFT-300M"): 12300,
}


@dataclasses.dataclass(frozen=True)
class PreTraining:
    """A row of table 3. Resolution 224, batch 4096, Adam with beta 0.9 and 0.999, 10,000 steps of warm-up."""

    models: tuple[str, ...]
    data: str
    epochs: tuple[int, ...]
    learning_rate: float
    schedule: str
    weight_decay: float
    dropout: float


TABLE_3 = (
    PreTraining(("ViT-B/16", "ViT-B/32"), "JFT-300M", (7,), 8e-4, "linear", 0.1, 0.0),
    PreTraining(("ViT-L/32",), "JFT-300M", (7,), 6e-4, "linear", 0.1, 0.0),
    PreTraining(("ViT-L/16",), "JFT-300M", (7, 14), 4e-4, "linear", 0.1, 0.0),
    PreTraining(("ViT-H/14",), "JFT-300M", (14,), 3e-4, "linear", 0.1, 0.0),
    PreTraining(("R50x1", "R50x2"), "JFT-300M", (7,), 1e-3, "linear", 0.1, 0.0),
    PreTraining(("R101x1",), "JFT-300M", (7,), 8e-4, "linear", 0.1, 0.0),
    PreTraining(("R152x1", "R152x2"), "JFT-300M", (7,), 6e-4, "linear", 0.1, 0.0),
    PreTraining(("R50+ViT-B/16", "R50+ViT-B/32"), "JFT-300M", (7,), 8e-4, "linear", 0.1, 0.0),
    PreTraining(("R50+ViT-L/32",), "JFT-300M", (7,), 2e-4, "linear", 0.1, 0.0),
    PreTraining(("R50+ViT-L/16",), "JFT-300M", (7, 14), 4e-4, "linear", 0.1, 0.0),
    PreTraining(("ViT-B/16", "ViT-B/32"), "ImageNet-21k", (90,), 1e-3, "linear", 0.03, 0.1),
    PreTraining(("ViT-L/16", "ViT-L/32"), "ImageNet-21k", (30, 90), 1e-3, "linear", 0.03, 0.1),
    PreTraining(("*",), "ImageNet", (300,), 3e-3, "cosine", 0.3, 0.1),
)


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A row of table 4. Resolution 384, SGD with momentum 0.9, batch 512, cosine decay, no weight decay."""

    steps: int
    learning_rates: tuple[float, ...]  # tried


TABLE_4 = {
    "ImageNet": FineTuning(20_000, (0.003, 0.01, 0.03, 0.06)),  # 0.06 for ResNets and hybrids only
    "CIFAR-100": FineTuning(10_000, (0.001, 0.003, 0.01, 0.03)),
    "CIFAR-10": FineTuning(10_000, (0.001, 0.003, 0.01, 0.03)),
    "Pets": FineTuning(500, (0.001, 0.003, 0.01, 0.03)),
    "Flowers-102": FineTuning(500, (0.001, 0.003, 0.01, 0.03)),
    "VTAB": FineTuning(2_500, (0.01,)),
}

# Table 5: fine-tuned at 384; by pre-training data and task, one number for each of `TABLE_5_MODELS`. There is no H/14
# trained on ImageNet.
TABLE_5_MODELS = ("ViT-B/16", "ViT-B/32", "ViT-L/16", "ViT-L/32", "ViT-H/14")
TABLE_5: dict[str, dict[str, tuple[float | None, ...]]] = {
    "ImageNet": {
        "CIFAR-10": (98.13, 97.77, 97.86, 97.94, None),
        "CIFAR-100": (87.13, 86.31, 86.35, 87.07, None),
        "ImageNet": (77.91, 73.38, 76.53, 71.16, None),
        "ImageNet ReaL": (83.57, 79.56, 82.19, 77.83, None),
        "Flowers-102": (89.49, 85.43, 89.66, 86.36, None),
        "Pets": (93.81, 92.04, 93.64, 91.35, None),
    },
    "ImageNet-21k": {
        "CIFAR-10": (98.95, 98.79, 99.16, 99.13, 99.27),
        "CIFAR-100": (91.67, 91.97, 93.44, 93.04, 93.82),
        "ImageNet": (83.97, 81.28, 85.15, 80.99, 85.13),
        "ImageNet ReaL": (88.35, 86.63, 88.40, 85.65, 88.70),
        "Flowers-102": (99.38, 99.11, 99.61, 99.19, 99.51),
        "Pets": (94.43, 93.02, 94.73, 93.09, 94.82),
    },
    "JFT-300M": {
        "CIFAR-10": (99.00, 98.61, 99.38, 99.19, 99.50),
        "CIFAR-100": (91.87, 90.49, 94.04, 92.52, 94.55),
        "ImageNet": (84.15, 80.73, 87.12, 84.37, 88.04),
        "ImageNet ReaL": (88.85, 86.27, 89.99, 88.28, 90.33),
        "Flowers-102": (99.56, 99.27, 99.56, 99.45, 99.68),
        "Pets": (95.80, 93.40, 97.11, 95.83, 97.56),
    },
}

JFT_IMAGES = 303_000_000  # section 4.1
PRE_TRAINING_SIZE = 224  # section 4.1


@dataclasses.dataclass(frozen=True)
class JftScaling:
    """A row of table 6: pre-trained on JFT-300M at 224, fine-tuned at 384."""

    model: str
    epochs: int
    imagenet: float
    real: float
    cifar10: float
    cifar100: float
    pets: float
    flowers: float
    exaflops: int  # of the whole pre-training

    @property
    def scores(self) -> dict[str, float]:
        """By task, named as in table 5."""
        accuracies = (self.imagenet, self.real, self.cifar10, self.cifar100, self.pets, self.flowers)
        return dict(zip(_TABLE_6_TASKS, accuracies, strict=True))


_TABLE_6_TASKS = ("ImageNet", "ImageNet ReaL", "CIFAR-10", "CIFAR-100", "Pets", "Flowers-102")
TABLE_6 = (
    JftScaling("ViT-B/32", 7, 80.73, 86.27, 98.61, 90.49, 93.40, 99.27, 55),
    JftScaling("ViT-B/16", 7, 84.15, 88.85, 99.00, 91.87, 95.80, 99.56, 224),
    JftScaling("ViT-L/32", 7, 84.37, 88.28, 99.19, 92.52, 95.83, 99.45, 196),
    JftScaling("ViT-L/16", 7, 86.30, 89.43, 99.38, 93.46, 96.81, 99.66, 783),
    JftScaling("ViT-L/16", 14, 87.12, 89.99, 99.38, 94.04, 97.11, 99.56, 1567),
    JftScaling("ViT-H/14", 14, 88.08, 90.36, 99.50, 94.71, 97.11, 99.71, 4262),
    JftScaling("R50x1", 7, 77.54, 84.56, 97.67, 86.07, 91.11, 94.26, 50),
    JftScaling("R50x2", 7, 82.12, 87.94, 98.29, 89.20, 93.43, 97.02, 199),
    JftScaling("R101x1", 7, 80.67, 87.07, 98.48, 89.17, 94.08, 95.95, 96),
    JftScaling("R152x1", 7, 81.88, 87.96, 98.82, 90.22, 94.17, 96.94, 141),
    JftScaling("R152x2", 7, 84.97, 89.69, 99.06, 92.05, 95.37, 98.62, 563),
    JftScaling("R152x2", 14, 85.56, 89.89, 99.24, 91.92, 95.75, 98.75, 1126),
    JftScaling("R200x3", 14, 87.22, 90.15, 99.34, 93.53, 96.32, 99.04, 3306),
    JftScaling("R50+ViT-B/32", 7, 84.90, 89.15, 99.01, 92.24, 95.75, 99.46, 106),
    JftScaling("R50+ViT-B/16", 7, 85.58, 89.65, 99.14, 92.63, 96.65, 99.40, 274),
    JftScaling("R50+ViT-L/32", 7, 85.68, 89.04, 99.24, 92.93, 96.97, 99.43, 246),
    JftScaling("R50+ViT-L/16", 7, 86.60, 89.72, 99.18, 93.64, 97.03, 99.40, 859),
    JftScaling("R50+ViT-L/16", 14, 87.12, 89.76, 99.31, 93.89, 97.36, 99.11, 1668),
)

# Table 7: ResNets pre-trained on JFT-300M with either optimizer. To be checked against the paper: the numbers with SGD.
# Those with Adam are table 6's, and each of the four means is the mean of its numbers.
TABLE_7_AVERAGE = "Average"
_TABLE_7_COLUMNS = ("ImageNet", "CIFAR-10", "CIFAR-100", "Pets", "Flowers-102", TABLE_7_AVERAGE)
TABLE_7 = {
    key: dict(zip(_TABLE_7_COLUMNS, row, strict=True))
    for key, row in {
        ("R50x1", "adam"): (77.54, 97.67, 86.07, 91.11, 94.26, 89.33),
        ("R50x1", "sgd"): (78.24, 97.46, 85.17, 91.00, 92.06, 88.79),
        ("R152x2", "adam"): (84.97, 99.06, 92.05, 95.37, 98.62, 94.01),
        ("R152x2", "sgd"): (84.37, 99.07, 91.06, 94.79, 99.32, 93.72),
    }.items()
}

# Table 8: ViT-B/16, ImageNet 5-shot linear accuracy (a fraction here as there), by kind and place in the terms of
# `vit_jax.models.position_embeddings`.
TABLE_8 = {
    ("none", "stem"): 0.61382,
    ("learned_1d", "stem"): 0.64206,
    ("learned_1d", "every_layer"): 0.63964,
    ("learned_1d", "shared"): 0.64292,
    ("learned_2d", "stem"): 0.64001,
    ("learned_2d", "every_layer"): 0.64046,
    ("learned_2d", "shared"): 0.64022,
    ("relative", "stem"): 0.64032,
}

# Table 9: VTAB-1k by task, in the order of `VTAB_TASKS`.
VTAB_TASKS = {
    "natural": ("Caltech101", "CIFAR-100", "DTD", "Flowers102", "Pets", "SUN397", "SVHN"),
    "specialized": ("Camelyon", "EuroSAT", "Resisc45", "Retinopathy"),
    "structured": ("Clevr-Count", "Clevr-Dist", "DMLab", "dSpr-Loc", "dSpr-Ori", "KITTI-Dist", "sNORB-Azim",
                   "sNORB-Elev"),
}  # fmt: skip
TABLE_9 = {
    ("ViT-H/14", "JFT-300M"): {
        "natural": (95.3, 85.5, 75.2, 99.7, 97.2, 65.0, 88.9),
        "specialized": (83.3, 96.7, 91.4, 76.6),
        "structured": (91.7, 63.8, 53.1, 79.4, 63.3, 84.5, 33.2, 51.2),
    },
    ("ViT-L/16", "JFT-300M"): {
        "natural": (95.4, 81.9, 74.3, 99.7, 96.7, 63.5, 87.4),
        "specialized": (83.6, 96.5, 89.7, 77.1),
        "structured": (86.4, 63.1, 49.7, 74.5, 60.5, 82.2, 36.2, 51.1),
    },
    ("ViT-L/16", "ImageNet-21k"): {
        "natural": (90.8, 84.1, 74.1, 99.3, 92.7, 61.0, 80.9),
        "specialized": (82.5, 95.6, 85.2, 75.3),
        "structured": (70.3, 56.1, 41.9, 74.7, 64.9, 79.9, 30.5, 41.7),
    },
}
TABLE_9_MEANS = {("ViT-H/14", "JFT-300M"): 77.6, ("ViT-L/16", "JFT-300M"): 76.3, ("ViT-L/16", "ImageNet-21k"): 72.7}

# Figure 9 (appendix D.3): learning rates with which the class token and global average pooling work alike.
FIGURE_9 = {"cls": 8e-4, "gap": 3e-4}

# Figure 13 (appendix D.6): axial models and their counterparts. The paper prints no numbers of this plot; the exaFLOPs
# of the models without axial attention are in table 6.
FIGURE_13_COUNTERPARTS = {"Axial-ViT-B/32": "ViT-B/32", "Axial-ViT-B/16": "ViT-B/16", "AxialResNet-50": "R50x1"}

# Appendix D.9: ObjectNet.
OBJECTNET = {("ViT-H/14", "JFT-300M"): {"top-1": 61.7, "top-5": 82.1}}

# Appendix B.1.2: ImageNet top-1 of ViT-B/16 after masked patch prediction on JFT-300M.
MASKED_PATCH_IMAGENET = {"ViT-B/16": 79.9}

# Not in the paper: its authors' answers in the issues of google-research/vision_transformer.
# Precision at 1 of the released models on the validation split of ImageNet-21k:
IMAGENET21K_PRECISION = {"ViT-B/16": 47.88, "ViT-B/32": 44.04, "ViT-L/16": 49.90, "ViT-L/32": 45.42, "ViT-H/14": 49.06}
# Trained on ImageNet at 224 for 300 epochs, without fine-tuning (issue 62):
IMAGENET_FROM_SCRATCH = {"ViT-B/32": 69.19, "ViT-B/16": 74.79, "ViT-L/32": 66.90, "ViT-L/16": 72.59}
