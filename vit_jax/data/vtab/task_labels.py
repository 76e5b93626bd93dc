"""Labels and pixels that VTAB derives from the features of a record. Pure functions with the benchmark's own numbers.

Features are flat, as in a record: the coordinates of n objects are 3 n numbers. The rules are those of
google-research/task_adaptation, `task_adaptation/data/{clevr,kitti,dsprites}.py`. Functions raise ValueError for
features that have no label.
"""

import bisect

import numpy as np

from vit_jax.data.sources.records import Features
from vit_jax.data.transforms import ImageError, decode

# Lower ends of the bins, exclusive: a distance of exactly 8 is in the first. clevr.py and kitti.py.
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)  # metres
_NO_VEHICLE = 1000.0  # metres; kitti.py's distance for an image without vehicle
_VEHICLES = 3  # types below this are Car, Van and Truck, in the order of TFDS's kitti builder


def clevr_count(features: Features) -> int:
    """The number of objects, 3 to 10, minus 3."""
    count = len(features["objects/size"])
    if not 3 <= count <= 10:  # as in the test split, which has no descriptions
        raise ValueError(f"it has {count} objects, but images of CLEVR have 3 to 10")
    return count - 3


def clevr_distance(features: Features) -> int:
    """The bin, of 6, of the closest object's distance from the camera."""
    distances = features["objects/pixel_coords"][2::3]  # x and y in pixels, then the distance
    if not distances:
        raise ValueError("it has no objects")
    return _bin(min(distances), CLEVR_DISTANCES)


def kitti_distance(features: Features) -> int:
    """The bin, of 4, of the closest vehicle's distance along the camera's axis; class 3 is an image without vehicle.

    Vehicles are cars, vans and trucks.
    """
    distances = features["objects/location"][2::3]  # x, y and z in metres
    vehicles = [z for z, kind in zip(distances, features["objects/type"], strict=True) if kind < _VEHICLES]
    return _bin(min([*vehicles, _NO_VEHICLE]), KITTI_DISTANCES)


def dsprites_location(features: Features) -> int:
    """The horizontal position, 32 values in 16 classes."""
    return _only(features, "label_x_position") * 16 // 32


def dsprites_orientation(features: Features) -> int:
    """The orientation, 40 values in 16 classes of two or three values each: 0-2, 3-4, 5-7, ..."""
    return _only(features, "label_orientation") * 16 // 40


def dsprites_pixels(encoded: bytes) -> np.ndarray:
    """Decodes an image of dSprites, whose pixels are 0 and 1, as black and white, uint8 `[64, 64, 3]`.

    Raises:
      ImageError: it has other pixels, so it is no image of dSprites, or was already converted.
    """
    pixels = decode(encoded)
    if pixels.max() > 1:
        raise ImageError(f"it has pixels of {pixels.max()}, but those of dSprites are 0 and 1")
    return pixels * np.uint8(255)


def _only(features: Features, name: str) -> int:
    if len(values := features[name]) != 1:
        raise ValueError(f"{name} has {len(values)} values instead of one")
    return values[0]


def _bin(value: float, lower_ends: tuple[float, ...]) -> int:
    number = bisect.bisect_left(lower_ends, value) - 1
    if number < 0:
        raise ValueError(f"its closest object is {value} away, not more than {lower_ends[0]}")
    return number
