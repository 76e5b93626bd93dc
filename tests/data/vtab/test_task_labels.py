import itertools

import cv2
import numpy as np
import pytest

from vit_jax.data.transforms import ImageError
from vit_jax.data.vtab import task_labels

CAR, VAN, TRUCK, PEDESTRIAN, TRAM = 0, 1, 2, 3, 6


def clevr(distances):
    coordinates = [[100.0, 50.0, distance] for distance in distances]
    return {"objects/size": [0] * len(distances), "objects/pixel_coords": [*itertools.chain(*coordinates)]}


def kitti(*objects):
    """Objects: (type, z)."""
    return {
        "objects/type": [kind for kind, _ in objects],
        "objects/location": [*itertools.chain(*([-3.0, 1.5, z] for _, z in objects))],
    }


def number_in_dsprites(number):
    """Classes of an image by its number: the last of colour, shape, scale, orientation, x and y changes fastest."""
    _, shape, scale, orientation, x, y = np.unravel_index(number, (1, 3, 6, 40, 32, 32))
    return {
        "label_shape": [int(shape)],
        "label_scale": [int(scale)],
        "label_orientation": [int(orientation)],
        "label_x_position": [int(x)],
        "label_y_position": [int(y)],
    }


@pytest.mark.parametrize("count", range(3, 11))
def test_clevr_count_is_the_number_of_objects_from_3_on(count):
    assert task_labels.clevr_count(clevr([10.0] * count)) == count - 3


@pytest.mark.parametrize("count", [0, 2, 11])
def test_clevr_count_of_other_numbers_is_refused(count):
    with pytest.raises(ValueError, match=f"it has {count} objects, but images of CLEVR have 3 to 10"):
        task_labels.clevr_count(clevr([10.0] * count))


@pytest.mark.parametrize(
    ("distance", "label"),
    [
        (0.5, 0),
        (7.99, 0),
        (8.0, 0),  # ends of bins belong to the nearer one
        (8.01, 1),
        (8.5, 1),
        (8.51, 2),
        (9.0, 2),
        (9.01, 3),
        (9.5, 3),
        (9.51, 4),
        (10.0, 4),
        (10.01, 5),
        (15.0, 5),
    ],
)
def test_clevr_distance_is_the_bin_of_the_closest_object(distance, label):
    assert task_labels.clevr_distance(clevr([12.0 + distance, distance, 99.0])) == label


def test_clevr_distance_of_no_object_is_refused():
    with pytest.raises(ValueError, match="it has no objects"):
        task_labels.clevr_distance(clevr([]))


def test_distance_outside_of_all_bins_is_refused():
    with pytest.raises(ValueError, match=r"closest object is -0.5 away, not more than 0.0"):
        task_labels.clevr_distance(clevr([-0.5, 9.0]))


@pytest.mark.parametrize(
    ("objects", "label"),
    [
        ([(CAR, 1.0)], 0),
        ([(CAR, 10.0)], 1),
        ([(CAR, 30.0)], 2),
        ([(PEDESTRIAN, 30.0)], 3),
        ([(CAR, 30.0), (VAN, 1.0)], 0),
        ([(TRUCK, 8.0)], 0),
        ([(TRUCK, 8.01)], 1),
        ([(VAN, 20.0)], 1),
        ([(VAN, 20.01)], 2),
        ([(CAR, 25.0), (PEDESTRIAN, 2.0), (TRAM, 3.0)], 2),
        ([(CAR, -1.0)], 0),
        ([], 3),
    ],
)
def test_kitti_distance_is_the_bin_of_the_closest_car_van_or_truck(objects, label):
    assert task_labels.kitti_distance(kitti(*objects)) == label


def test_dsprites_location_groups_neighbours_in_twos():
    found = [task_labels.dsprites_location({"label_x_position": [x]}) for x in range(32)]
    assert found == [label for label in range(16) for _ in range(2)]


def test_dsprites_orientation_groups_neighbours_in_threes_and_twos():
    found = [task_labels.dsprites_orientation({"label_orientation": [value]}) for value in range(40)]
    assert found[:10] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert found == [label for pair in range(8) for label in [2 * pair] * 3 + [2 * pair + 1] * 2]
    assert found == (np.arange(40, dtype=np.float32) // np.float32(40 / 16)).tolist()  # as the benchmark computes it


@pytest.mark.parametrize(
    ("number", "orientation", "location"),
    [
        (0, 0, 0),
        (31, 0, 0),  # only y differs
        (64, 0, 1),  # x = 2
        (1024 * 39 + 32 * 31, 15, 15),
        (16_399, 6, 0),  # 16 x 1,024 + 0 x 32 + 15: orientation 16, x = 0
        (634_903, 8, 0),  # 15 x 40,960 + 20 x 1,024 + 0 x 32 + 23: orientation 20, x = 0
        (84_902, 0, 14),  # 2 x 40,960 + 2,982, which is 2 x 1,024 + 29 x 32 + 6: orientation 2, x = 29
        (737_279, 15, 15),
    ],
)
def test_labels_of_dsprites_follow_from_the_number_of_an_image(number, orientation, location):
    features = number_in_dsprites(number)
    assert task_labels.dsprites_orientation(features) == orientation
    assert task_labels.dsprites_location(features) == location


@pytest.mark.parametrize(
    ("rule", "feature"),
    [(task_labels.dsprites_location, "label_x_position"), (task_labels.dsprites_orientation, "label_orientation")],
)
def test_record_of_dsprites_without_the_value_is_refused(rule, feature):
    with pytest.raises(ValueError, match=f"{feature} has 0 values instead of one"):
        rule({feature: []})


def test_all_images_of_dsprites_fall_evenly_into_the_classes():
    grid = itertools.product(range(40), range(32))
    found = [
        (
            task_labels.dsprites_orientation({"label_orientation": [orientation]}),
            task_labels.dsprites_location({"label_x_position": [x]}),
        )
        for orientation, x in grid
    ]
    # 3 shapes, 6 scales and 32 y for each
    by_location = np.bincount([location for _, location in found]) * 3 * 6 * 32
    assert by_location.tolist() == [46_080] * 16
    by_orientation = np.bincount([orientation for orientation, _ in found]) * 3 * 6 * 32
    assert by_orientation.tolist() == [55_296, 36_864] * 8
    assert by_orientation.sum() == by_location.sum() == 737_280


def test_pixels_that_dsprites_does_not_have_are_refused():
    with pytest.raises(ImageError, match="it has pixels of 255, but those of dSprites are 0 and 1"):
        task_labels.dsprites_pixels(cv2.imencode(".png", np.full((64, 64, 1), 255, np.uint8))[1].tobytes())


def test_dsprites_pixels_are_black_and_white():
    pixels = np.random.default_rng(0).integers(0, 2, (64, 64, 1), np.uint8)
    found = task_labels.dsprites_pixels(cv2.imencode(".png", pixels)[1].tobytes())
    assert (found.dtype, found.shape) == (np.uint8, (64, 64, 3))
    np.testing.assert_array_equal(found, np.repeat(255 * pixels, 3, axis=-1))
