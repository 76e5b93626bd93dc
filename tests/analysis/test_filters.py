"""Principal components of the first embedding's filters."""

import ml_dtypes
import numpy as np
import pytest
import sklearn.decomposition

from tests.analysis.tiny_weights import make_weights
from vit_jax.analysis.filters import draw_filters, embedding_filters, principal_components
from vit_jax.errors import UserError


def test_components_are_scikit_learns_and_the_largest_value_of_each_is_positive():
    kernel = np.random.default_rng(0).normal(loc=1, size=(4, 5, 3, 90)) * np.linspace(0.1, 2, 60).reshape(4, 5, 3, 1)
    components, shares = principal_components(kernel, 28)
    filters = [[kernel[y, x, c, i] for y in range(4) for x in range(5) for c in range(3)] for i in range(90)]
    expected = sklearn.decomposition.PCA(28, svd_solver="full").fit(np.array(filters))
    np.testing.assert_allclose(shares, expected.explained_variance_ratio_, rtol=1e-10)
    assert components.shape == (28, 4, 5, 3)
    for component, theirs in zip(components.reshape(28, -1), expected.components_, strict=True):
        sign = np.sign(component @ theirs)
        np.testing.assert_allclose(component, sign * theirs, atol=1e-9)
        assert component[np.abs(component).argmax()] > 0


def test_filters_that_vary_in_two_directions_have_these_as_components():
    first, second, mean = np.eye(12)[0], np.eye(12)[1], np.full(12, 7.0)
    amounts = np.array([[3, 1], [3, -1], [-3, 1], [-3, -1]])
    kernel = (mean + amounts @ [first, second]).T.reshape(2, 2, 3, 4)
    components, shares = principal_components(kernel, 2)
    np.testing.assert_allclose(components.reshape(2, 12), [first, second], atol=1e-12)
    np.testing.assert_allclose(shares, [0.9, 0.1])


@pytest.mark.parametrize(("filters", "values", "count"), [(5, 12, 4), (40, 12, 12), (40, 48, 28)])
def test_there_are_no_more_components_than_dimensions(filters, values, count):
    kernel = np.random.default_rng(0).normal(size=(2, values // 6, 3, filters))
    assert len(principal_components(kernel, 28)[0]) == count


def test_equal_filters_have_none():
    with pytest.raises(UserError, match="all equal"):
        principal_components(np.ones((2, 2, 3, 4), np.float32))


def test_filters_of_a_vit_are_its_patch_embedding_whatever_the_dtype():
    weights = make_weights(dtype=ml_dtypes.bfloat16)
    filters = embedding_filters(weights)
    assert filters.dtype == np.float32
    np.testing.assert_array_equal(filters, np.float32(weights.params["embedding"]["kernel"]))


def test_filters_of_a_hybrid_are_those_of_its_first_convolution_as_they_are_used():
    weights = make_weights("R+Ti/16", size=(64, 96), num_classes=0)
    filters, kernel = embedding_filters(weights), np.float64(weights.params["conv_root"]["kernel"])
    assert filters.shape == (7, 7, 3, 64)
    for index in (0, 63):
        of_filter = kernel[..., index]
        expected = (of_filter - of_filter.mean()) / (of_filter.std() + 1e-5)
        np.testing.assert_allclose(filters[..., index], expected, atol=1e-5)


def test_a_resnet_has_no_patch_embedding():
    with pytest.raises(UserError, match=r"R50x1.* is a ResNet, which has no patch embedding"):
        embedding_filters(make_weights("R50x1", num_classes=0))


def test_drawing_shows_zero_as_grey_and_each_component_at_its_own_scale():
    components = np.zeros((9, 2, 2, 3))
    components[:, 0, 0, 0], components[:, 1, 1, 2] = np.arange(1, 10), -0.5 * np.arange(1, 10)
    figure = draw_filters(components, "title")
    shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(shown) == 9
    for picture in shown:
        np.testing.assert_allclose([picture[0, 0, 0], picture[0, 1, 0], picture[1, 1, 2]], [1, 0.5, 0.25])
