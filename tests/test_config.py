import math

import pytest

from vit_jax import config as config_module
from vit_jax.config import (
    CHECKS,
    Number,
    Several,
    base_config,
    check_fields,
    checked_fields,
    flatten,
    parse_config_string,
    set_length,
)
from vit_jax.console import quote_argument
from vit_jax.errors import UserError
from vit_jax.train_step import RNGS


def config_with(field, value):
    """The default config with a field of any value, as a config file that ignores types could make it."""
    config = base_config()
    with config.ignore_type(), config.unlocked():
        config.update_from_flattened_dict({field: value})
    return config


def wrong_numbers(check):
    yield from (math.nan, math.inf, -math.inf, "1")
    yield from ([0.5, True] if check.whole else [])
    if check.low > -1e38:
        yield check.low if check.open_low else check.low - 3
    if check.high < 1e38:
        yield check.high if check.open_high else check.high + 1


def wrong_values(check):
    """Values that a field with such a check must refuse."""
    if isinstance(check, Number):
        return list(wrong_numbers(check))
    if isinstance(check, Several):
        empty = [()] if check.at_least else []
        return ["text", 7, *empty, *((value,) for value in wrong_values(check.each))]
    return [math.nan, "text"] if check.expected == "True or False" else [math.nan]


FIELDS = {name: check for name, _, _, check in checked_fields(base_config()) if not name.endswith(".type")}


def test_every_field_has_a_check():
    defaults = {name: value for name, value in flatten(base_config().to_dict()).items() if not name.endswith(".type")}
    assert sorted(FIELDS) == sorted(defaults)
    for name, default in defaults.items():
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        assert not is_number or isinstance(FIELDS[name], Number), f"{name} has no range"


@pytest.mark.parametrize("field", FIELDS)
def test_field_accepts_its_default_and_refuses_invalid_values(field):
    check_fields(base_config())
    wrong = wrong_values(FIELDS[field])
    assert wrong
    for value in wrong:
        with pytest.raises(UserError) as error:
            check_fields(config_with(field, value))
        assert str(error.value).startswith(f"{field} must be ")
        assert f"--config.{field}=" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "optimizer.b1",
            1.0,
            "b1 must be at least 0 and less than 1, got 1.0. .* --config.optimizer.b1=0.9",
        ),
        ("optimizer.b2", math.nan, "at least 0 and less than 1, got nan"),
        ("optimizer.eps", -1.0, "more than 0, a finite number, got -1.0"),
        ("optimizer.eps", 0.0, "more than 0"),
        ("optimizer.momentum", 1.0, "less than 1"),
        ("optimizer.b2", 0.99999999999, r"less than 1, got 0.99999999999 \(as float32 1\)"),
        ("optimizer.eps", 1e-300, r"got 1e-300 \(as float32 0\)"),
        ("model.dropout_rate", 1 - 1e-12, "less than 1"),
        ("optimizer.learning_rate", 1e300, r"a finite number, got 1e\+300"),
        ("optimizer.learning_rate", math.nan, "at least 0, a finite number, got nan"),
        ("optimizer.clip_norm", math.inf, "or None for no clipping, got inf"),
        ("evals.fewshot.l2", (), "not empty"),
        ("evals.fewshot.l2", (1.0, math.nan), "each more than 0"),
        ("evals.fewshot.l2", (1.0, 1.0), "different values"),
        ("evals.fewshot.shots", (5, 0), "each at least 1"),
        ("batch_size", 10**12, "batch_size must be at least 1 and at most 16,777,216, a whole number"),
        ("batch_size", 2**24, r"16,777,216 of images of 224 pixels is 2.5 TB. Set --config.batch_size to at most 7,30"),
        ("steps", 10**400, "steps must be at least 1 and at most 2,147,483,647"),
        ("steps", 10**18, "steps must be at least 1 and at most 2,147,483,647"),
        ("data.num_workers", 10**6, "at most 1,024"),
        ("mesh.data", 0, "mesh.data must be at least 1 .*, or -1, got 0"),
        ("seed", 2**31, "seed must be"),
        ("model.stages", (3, 0), "model.stages must be a tuple of values, not empty, each at least 1"),
    ],
)
def test_value_that_would_fail_later_is_refused_with_its_range(field, value, message):
    with pytest.raises(UserError, match=message):
        check_fields(config_with(field, value))


def test_values_at_the_ends_of_their_ranges_are_accepted():
    for field, value in (
        ("mesh.model", -1),
        ("optimizer.momentum", 0),
        ("optimizer.layer_decay", 1),
        ("seed", 2**31 - 1),
    ):
        check_fields(config_with(field, value))


def test_generators_of_the_config_match_the_steps():
    assert all(map(CHECKS["rng"].accepts, RNGS)) and all(name in CHECKS["rng"].expected for name in RNGS)


@pytest.mark.parametrize("given", config_module.LENGTHS)
def test_a_length_that_is_given_unsets_the_others(given):
    config = base_config()
    config.update({"epochs": 2.0, given: 7})
    set_length(config, {"seed", given})
    assert {name: config[name] for name in config_module.LENGTHS if config[name] is not None} == {given: 7}


def test_two_lengths_that_are_given_contradict_each_other():
    config = base_config()
    config.epochs, config.steps = 2.0, 5
    set_length(config, {"seed"})
    assert config.epochs == 2.0
    with pytest.raises(UserError, match=r"--config.epochs=2.0 and --config.steps=5 both set the length"):
        set_length(config, {"steps", "epochs"})


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


@pytest.mark.parametrize(
    "value", ["a", "cats, dogs", 'the "best", cats', "a,b'c\"d", "'quoted'", r"back\slash, comma", ","]
)
def test_commas_in_values_are_protected_by_quotes_or_backslashes(value):
    for written in (
        quote_argument(value),
        value.replace(",", "\\,") if value[0] not in "'\"" else quote_argument(value),
    ):
        read = parse_config_string(f"steps=3,dataset={written},weights=w", dataset="", steps=1, weights="")
        assert (read.dataset, read.steps, read.weights) == (value, 3, "w")


@pytest.mark.parametrize("string", ["steps=2,dataset=/a/cats, dogs", "steps=2,dataset=/a/cats, dogs=3,weights=w"])
def test_a_comma_without_protection_says_how_to_protect_it(string):
    with pytest.raises(UserError, match=r'dataset="/a/cats, dogs(=3)?" .*--config.data.dataset'):
        parse_config_string(string, dataset="", steps=1, weights="")
