import jax
import numpy as np

from tests.experiment.test_build import digits_config
from tests.test_sharding_rules import slices
from vit_jax import sharding
from vit_jax.experiment import build, dry_run
from vit_jax.experiment.evaluations import open_evaluations
from vit_jax.experiment.run_records import record_result
from vit_jax.optimizers import decay_mask


def test_full_parameter_table_lists_every_parameter_and_its_decay():
    built = build.build(digits_config())
    params = built.step.abstract_state.params
    table = dry_run.parameter_table(params, decay_mask(params), full=True)
    decays = {line.split()[0]: line.split()[-1] for line in table.splitlines()}
    for path, decayed in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
        assert decays["/".join(key.key for key in path)] == ("yes" if decayed else "no")
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    head = built.model.hidden_dim * 10 + 10
    assert f"total {total:,}; head left out {total - head:,}; float32" in table


def test_parameter_table_has_equal_layers_once():
    params = build.build(digits_config(**{"model.num_layers": 12})).step.abstract_state.params
    lines = dry_run.parameter_table(params).splitlines()
    (row,) = [line.split() for line in lines if "MlpBlock_3/Dense_0/kernel" in line]
    assert row == ["MlpBlock_3/Dense_0/kernel", "12", "16x16", f"{12 * 16 * 16:,}"]
    assert "Transformer/encoderblock_*" in lines


def test_dry_run_says_what_is_measured_and_what_is_missing():
    config = digits_config(**{"data.eval_split": "test", "evals.eval_split.every_steps": 1000})
    built = build.build(config)
    text = dry_run.dry_run(built, open_evaluations(config, built.eval_source), {"real": "real is not at 'x'."})
    assert "measured  test: classification; 360 images of digits (test); every 1,000 steps\n" in text
    assert "measured  real: data not prepared yet. real is not at 'x'.\n" in text
    assert "evals     eval_split.every_steps=1000\n" in text
    assert "data.prefetch: 2" in dry_run.dry_run(built, [], {}, full=True)


def test_schedule_table_prints_learning_rate_and_its_product_with_the_decay():
    changes = {
        "steps": 110,
        "optimizer.warmup_steps": 10,
        "optimizer.learning_rate": 1e-3,
        "optimizer.weight_decay": 0.1,
    }
    config = digits_config(**changes)
    table = dry_run.schedule_table(build.build(config))
    (peak,) = [line.split() for line in table.splitlines() if line.strip().startswith("10 ")]
    assert peak[1:3] == ["1.000e-03", "1.000e-04"]


def test_paper_counts_come_with_explanations():
    assert "86M" in dry_run.paper_count("ViT-B/32")
    assert "no reading of L/16 reaches" in dry_run.paper_count("ViT-L/16")
    assert dry_run.paper_count("ViT-S/16") == ""


def test_count_parameters_counts_values():
    assert dry_run.count_parameters({"a": np.zeros((2, 3)), "b": {"c": np.zeros(4)}}) == 10


def test_summary_takes_last_and_best_values(tmp_path):
    config = digits_config(**{"data.eval_split": "test"})
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "test/accuracy": 0.9, "test/loss": 1.0, "test/examples": 360}\n'
        '{"step": 2, "train/loss": 0.5, "time/images_per_second": 10.0}\n'
        '{"step": 2, "test/accuracy": 0.8, "test/loss": 1.5, "test/examples": 360}\n'
    )
    result = record_result(build.build(config), tmp_path, 3, images=48, seconds=61.0, overlap={})
    assert result["test/accuracy"] == 0.8
    assert (result["test/best_accuracy"], result["best_step"]) == (0.9, 1)
    text = (tmp_path / "summary.md").read_text()
    assert "| test/accuracy" in text
    assert "80.00 %" in text
    assert "0:01:01" in text


def test_devices_of_several_slices_are_described():
    mesh = sharding.make_mesh(slices(4, 4), model=2)
    line = dry_run._describe_devices(mesh, "replicated", {}, "state")
    assert line.startswith("devices   8 x cpu in 1 process(es) on 2 slices, mesh data 4 x model 2; state replicated")
