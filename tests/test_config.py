import pytest

from vit_jax.config import base_config, parse_config_string
from vit_jax.errors import UserError


def test_unknown_field_is_refused_with_the_nearest():
    config = base_config()
    with pytest.raises(AttributeError, match='Did you mean "optimizer"'):
        config.optimiser = "sgd"
    with pytest.raises(AttributeError, match='Did you mean "learning_rate"'):
        config.optimizer.learning_rat = 1.0


def test_wrong_type_is_refused():
    config = base_config()
    with pytest.raises(TypeError, match="batch_size"):
        config.batch_size = "many"
    with pytest.raises(TypeError, match="steps"):
        config.steps = 0.5


def test_config_string_values_take_the_types_of_their_defaults():
    parsed = parse_config_string("epochs=3,data=/a/b.zip,fast=true", epochs=90.0, data="x", fast=False, size=8)
    assert dict(parsed) == {"epochs": 3.0, "data": "/a/b.zip", "fast": True, "size": 8}
    assert dict(parse_config_string(None, size=8)) == {"size": 8}


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ("epoch=3", "Did you mean 'epochs'"),
        ("epochs=many", "takes epochs=<float>, got 'epochs=many'"),
        ("/a/b.zip", "written name=value, got '/a/b.zip'. Names: epochs, fast"),
        ("epochs", "takes epochs=<float>, got 'epochs'"),
        ("fast=maybe", "takes fast=<bool>"),
    ],
)
def test_wrong_config_string_is_refused(string, message):
    with pytest.raises(UserError, match=message):
        parse_config_string(string, epochs=90.0, fast=False)
