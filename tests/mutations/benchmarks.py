"""Mutations of the benchmarks."""

from tests.mutations.mutation import Mutation

TEST_STEP, TEST_INPUT = "tests/benchmarks/test_train_step.py", "tests/benchmarks/test_input_pipeline.py"
TEST_FIGURE_12, TEST_INDEX = "tests/benchmarks/test_figure_12.py", "tests/paper/test_index.py"

MUTATIONS = [
    Mutation(
        "benchmarks/figure_12_speed.py",
        "arguments + outputs + 2 * (",
        "arguments + outputs + (",
        f"{TEST_FIGURE_12}::test_roofline_is_the_memory_where_that_takes_longer",
        "a step writes and reads its temporaries",
    ),
    Mutation(
        "benchmarks/figure_12_speed.py",
        "gain < GAIN or",
        "gain < 0 or",
        f"{TEST_FIGURE_12}::test_batch_is_doubled_while_it_pays",
        "the batch is doubled only while the speed grows",
    ),
    Mutation(
        "benchmarks/figure_12_speed.py",
        "if expected > limit:",
        "if expected > 100 * limit:",
        f"{TEST_FIGURE_12}::test_measuring_resumes_and_leaves_out_what_would_take_too_long",
        "an image that would take too long is not measured",
    ),
    Mutation(
        "docs/paper.md",
        "configs/vit_i1k.py:model=ViT-B/16,epochs=300 --workdir",
        "configs/vit_i1k.py:model=ViT-B/16,epoch=300 --workdir",
        f"{TEST_INDEX}::test_command_parses",
        "each command of the paper's index parses",
    ),
    Mutation(
        "benchmarks/paper_costs.py",
        "configs += [task.base] * (len(tried) if len(tried) > 1 else 0)",
        "configs += [task.base]",
        f"{TEST_INDEX}::test_stored_cost_is_of_the_config_as_it_is",
        "the cost of a study includes the runs that only choose",
    ),
    Mutation(
        "configs/masked_patches.py",
        "config.steps = 1_000_000",
        "config.steps = 100_000",
        f"{TEST_INDEX}::test_stored_cost_is_of_the_config_as_it_is",
        "a stored cost is that of the config as it is",
    ),
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
