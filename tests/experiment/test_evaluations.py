"""`config.evals`: named entries, registered types, cadence, and the metric that selects the best parameters."""

import json
import types

import optax
import pytest

from tests.experiment.test_build import digits_config
from tests.test_train import quick_runs
from vit_jax import flags as our_flags
from vit_jax.checkpoints import Checkpoints
from vit_jax.config import base_config, check_fields, flatten, with_present_names
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.evaluators import registry
from vit_jax.evaluators.evaluator_type import EvaluatorType
from vit_jax.evaluators.registry import Field, entry, register
from vit_jax.experiment import build
from vit_jax.experiment.evaluations import make_evaluations, make_setup, open_evaluations
from vit_jax.field_checks import Number
from vit_jax.train import train


class ParameterNorm(EvaluatorType):
    """Norm of the parameters, over a scale."""

    def __init__(self, entry, data, setup):
        self._scale = entry.scale

    def run(self, state):
        yield "norm", float(optax.tree.norm(state.evaluated)) / self._scale


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(registry, "TYPES", dict(registry.TYPES))
    register("parameter_norm", ParameterNorm, scale=Field(1.0, Number(0, open_low=True)))


def names(config):
    return [each.name for each in open_evaluations(config, build.build(config).eval_source)]


def test_registered_evaluator_runs_in_the_loop_when_it_is_due_and_decides_what_is_best(
    toy, tmp_path, compilation_cache
):
    config = digits_config(**{"data.eval_split": "test", "steps": 4, "optimizer.learning_rate": 0.1})
    config.evals.norm = entry("parameter_norm", scale=2.0, every_steps=3)
    config.checkpoint.best_metric = "norm/norm"
    with quick_runs(compilation_cache):
        train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["norm/norm"] for row in rows if "norm/norm" in row}
    assert list(found) == [3, 4]
    assert [row["step"] for row in rows if "test/accuracy" in row] == [4]
    with Checkpoints(tmp_path / "best", keep=2) as best:
        step, extra = best.latest_extra()
    assert (step, extra["accuracy"]) == (max(found, key=found.get), max(found.values()))
    config.weights = str(tmp_path)
    with quick_runs(compilation_cache):
        assert evaluate(config)["metrics"]["norm/norm"] == pytest.approx(found[4])


def test_entries_without_data_are_switched_off_and_one_of_a_split_is_named_after_its_entry():
    assert names(digits_config()) == []
    config = digits_config(**{"data.eval_split": "test"})
    config.evals.held_out = {"type": "classification", "split": "train[:20]"}  # the other fields have their defaults
    config.evals.pictures = entry("fewshot", datasets=("digits",))
    assert names(config) == ["test", "held_out", "pictures/digits"]
    (held_out,) = [each for each in open_evaluations(config, None) if each.name == "held_out"]
    assert (len(held_out.data.test), held_out.every_steps) == (20, None)


def test_two_entries_do_not_share_the_names_of_metrics():
    config = digits_config(**{"evals.fewshot.datasets": ("digits", "digits")})
    with pytest.raises(UserError, match="two evaluations would be called fewshot/digits in metrics"):
        open_evaluations(config, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "few_shot"}, "unknown type of evaluator in evals.mine: 'few_shot'. Did you mean 'fewshot'"),
        (
            {"type": "fewshot", "shot": 5},
            "unknown field of evals.mine, of type 'fewshot': 'shot'. Did you mean 'shots'",
        ),
        ({"type": "fewshot", "seeds": 0}, "evals.mine.seeds must be at least 1"),
        ({"type": "imagenet_variant", "variant": "imagenet_x", "dataset": "/x"}, "evals.mine.variant must be 'real'"),
        ({"datasets": ("digits",)}, "evals.mine must be an entry with a type"),
    ],
)
def test_wrong_entry_is_refused_with_the_nearest_name(given, message):
    config = base_config()
    config.evals.mine = given
    with pytest.raises(UserError, match=message):
        check_fields(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evals.fewshot.representations": ("pre_logit",)}, "evals.fewshot.representations: 'pre_logit'. Did you mean"),
        ({"evals.fewshot.crop_from": 7}, "crop_from 7 must be at least the image size, 8"),
        ({"checkpoint.best_metric": "tset/accuracy"}, "Did you mean 'test/<metric>'"),
    ],
)
def test_entry_that_does_not_fit_the_model_is_refused_before_anything_is_computed(changes, message):
    config = digits_config(**{"data.eval_split": "test", "evals.fewshot.datasets": ("digits",)})
    config.update_from_flattened_dict(changes)
    built = build.build(config)
    with pytest.raises(UserError, match=message):
        make_evaluations(config, make_setup(config, built.model, built.step.objective, built.mesh), built.eval_source)


def test_metric_that_an_evaluation_does_not_have_cannot_decide_what_is_best():
    config = digits_config(**{"data.eval_split": "test", "checkpoint.best_metric": "test/acuracy"})
    built = build.build(config)
    (evaluation,) = make_evaluations(
        config, make_setup(config, built.model, built.step.objective, built.mesh), built.eval_source
    )
    with pytest.raises(
        UserError, match=r"metric of test in checkpoint\.best_metric: 'acuracy'. Did you mean 'accuracy'"
    ):
        evaluation.run(types.SimpleNamespace(evaluated=built.init_state().params))


def test_fields_of_earlier_versions_are_read_by_their_present_names():
    recorded = {
        "eval_every_steps": 7,
        "variants": {"real": "r", "every_steps": 9},
        "fewshot": {"shots": [5]},
        "seed": 1,
    }
    fields = with_present_names(flatten(recorded))
    expected = {"evals.eval_split.every_steps": 7, "evals.real.dataset": "r", "evals.fewshot.shots": [5], "seed": 1}
    assert expected.items() <= fields.items()
    assert fields["evals.real.every_steps"] == fields["evals.objectnet.every_steps"] == 9
    assert fields.keys() <= flatten(base_config().to_dict()).keys()


def test_entry_is_removed_and_renamed_fields_are_named_on_the_command_line(capsys):
    config = base_config()
    our_flags.clear_field(config, "evals.fewshot")
    assert "fewshot" not in config.evals
    check_fields(config)
    our_flags.report(AttributeError("'eval_every_steps'"))
    assert (
        "config.eval_every_steps is now part of config.evals, as docs/evaluation.md describes"
        in capsys.readouterr().err
    )
