"""ImageNet's other test sets, as data: names, sizes, and where to get them."""

import dataclasses

NUM_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class TestSet:
    """What the authors of a test set publish.

    Attributes:
      title: name for readers.
      num_images: number of images.
      num_folders: number of folders, one for each class that occurs.
      url: download address.
      without_label: number of images that have no label and do not count.
    """

    title: str
    num_images: int
    num_folders: int
    url: str
    without_label: int = 0

    @property
    def num_labelled(self) -> int:
        """Number of images that have a label and count."""
        return self.num_images - self.without_label


# Sources of the numbers:
# - ReaL: README.md of google-research/reassessed-imagenet; 46,837 images have a label in its real.json.
# - ImageNet-V2: README.md of modestyachts/ImageNetV2 (three test sets of 10,000); archives and folder names are in
#   imagenet_v2_dataset_builder.py of tensorflow/datasets.
# - ImageNet-R: README.md of hendrycks/imagenet-r. ImageNet-A: eval.py of hendrycks/natural-adv-examples (200 classes);
#   7,500 images in results/README.md of huggingface/pytorch-image-models.
# - ImageNet-Sketch: 50,889 files in TFDS (datasets/imagenet_sketch/README.md of tensorflow/datasets); the authors'
#   README says 50,000.
# - ObjectNet: 18,574 images in 113 folders overlap with ImageNet (locuslab/FLYP, issue 7; 113 is the length of
#   mapping_files/additional_mappping_files/objectnet_id_overlap.json in abarbu/objectnet-template-tensorflow).
IMAGENET_TEST_SETS = {
    "real": TestSet(
        "ImageNet ReaL",
        50_000,
        NUM_CLASSES,
        "https://raw.githubusercontent.com/google-research/reassessed-imagenet/master/real.json",
        without_label=50_000 - 46_837,
    ),
    "imagenet_v2": TestSet("ImageNet-V2", 10_000, NUM_CLASSES, "https://huggingface.co/datasets/vaishaal/ImageNetV2"),
    "imagenet_r": TestSet("ImageNet-R", 30_000, 200, "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar"),
    "imagenet_a": TestSet("ImageNet-A", 7_500, 200, "https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar"),
    "imagenet_sketch": TestSet("ImageNet-Sketch", 50_889, NUM_CLASSES, "https://github.com/HaohanWang/ImageNet-Sketch"),
    "objectnet": TestSet("ObjectNet", 18_574, 113, "https://objectnet.dev/download.html"),
}
