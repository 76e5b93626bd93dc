"""Files of earlier versions: changes that would lose a run, a sweep or weights."""

from tests.mutations.mutation import Mutation

TEST = "tests/test_golden_workdirs.py"

MUTATIONS = [
    Mutation(
        "vit_jax/optimizers.py",
        "return optax.chain(clip, optimizer)",
        "return optax.chain(optax.identity(), clip, optimizer)",
        f"{TEST}::test_state_has_the_arrays_that_checkpoints_have {TEST}::test_state_is_restored_bit_exactly",
        "the optimizer's state has the names it has in checkpoints",
    ),
    Mutation(
        "vit_jax/train_step.py",
        "jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)",
        "jax.tree.map(jnp.array, params)",
        f"{TEST}::test_state_has_the_arrays_that_checkpoints_have",
        "the average is in float32",
    ),
    Mutation(
        "vit_jax/train.py",
        'journal.start(step, saved.get("window"))',
        'journal.start(step, saved.get("sums"))',
        f"{TEST}::test_interrupted_run_resumes_and_ends_as_if_nothing_had_happened",
        "the metrics of steps that were not logged yet are in the checkpoint",
    ),
    Mutation(
        "vit_jax/evaluators/registry.py",
        "bias=Field(100.0, NOT_NEGATIVE)",
        "bias=Field(10.0, NOT_NEGATIVE)",
        f"{TEST}::test_interrupted_run_resumes_and_ends_as_if_nothing_had_happened",
        "a config page means the same run as before",
    ),
    Mutation(
        "vit_jax/run/facts.py",
        'FILE = "facts.json"',
        'FILE = "run_facts.json"',
        f"{TEST}::test_exported_weights_equal_the_runs {TEST}::test_run_and_exported_weights_predict_as_before",
        "the names of a run's classes are found",
    ),
    Mutation(
        "vit_jax/sweep/trials.py",
        'text = ",".join(f"{field}={value}" for field, value in overrides.items())',
        'text = ",".join(f"{field}-{value}" for field, value in overrides.items())',
        f"{TEST}::test_finished_sweep_is_collected_as_before",
        "the runs of a sweep are found in the folders they are in",
    ),
    Mutation(
        "vit_jax/report/collect.py",
        "self._evaluations += [folder] if _EVALUATION in names else []",
        'self._evaluations += [folder] if "evaluations.json" in names else []',
        f"{TEST}::test_report_has_the_rows_it_had",
        "evaluations are found",
    ),
    Mutation(
        "vit_jax/weights/model_weights.py",
        'probabilities=fields.text("probabilities", None, choices=("softmax", "sigmoid")),',
        "",
        f"{TEST}::test_exported_weights_equal_the_runs",
        "a file of weights says what makes probabilities of its logits",
    ),
]
