"""Mutations of the benchmarks."""

from tests.mutations.mutation import Mutation

TEST_STEP, TEST_INPUT = "tests/benchmarks/test_train_step.py", "tests/benchmarks/test_input_pipeline.py"

MUTATIONS = [
    Mutation(
        "benchmarks/train_step.py",
        'flops and flops * (3 if what == "train" else 1)',
        "flops",
        f"{TEST_STEP}::test_rows_are_consistent",
        "a train step is three forward passes",
    ),
    Mutation(
        "benchmarks/train_step.py",
        "if speed < GAIN * best:",
        "if speed < best:",
        f"{TEST_STEP}::test_batches_double_while_it_pays",
        "batches double only while the speed grows",
    ),
    Mutation(
        "benchmarks/train_step_rows.py",
        "timm = max(theirs,",
        "timm = min(theirs,",
        f"{TEST_STEP}::test_ratios_are_to_the_faster_timm",
        "ratios are to timm's faster candidate",
    ),
    Mutation(
        "benchmarks/candidates.py",
        '"act_layer": "gelu_tanh"}',
        '"act_layer": "gelu"}',
        f"{TEST_STEP}::test_models_have_their_names_in_timm",
        "timm's model is the same as ours",
    ),
    Mutation(
        "benchmarks/input_pipeline.py",
        "turn = round_number % len(every)",
        "turn = 0",
        f"{TEST_INPUT}::test_ratios_are_of_medians_and_to_the_faster_tf_data",
        "each round begins with another pipeline",
    ),
    Mutation(
        "benchmarks/restore.py",
        '{**state, "images": first}',
        '{**state, "images": first + batch_size}',
        f"{TEST_INPUT}::test_restore_is_exact_and_its_state_small",
        "the restored batch is checked against its positions",
    ),
]
