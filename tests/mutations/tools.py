"""Plans, FLOPs, sweeps, reports, configs, command line, launchers."""

from tests.mutations.mutation import Mutation

ROOFLINE, TEST_ROOFLINE = "vit_jax/plan/roofline.py", "tests/plan/test_roofline.py"
HLO, TEST_HLO = "vit_jax/plan/hlo.py", "tests/plan/test_hlo.py"
ROW, TEST_ROW = "vit_jax/plan/plan_row.py", "tests/plan/test_plan_row.py"
SEARCH, TEST_SEARCH = "vit_jax/plan/search.py", "tests/plan/test_search.py"
TOPOLOGIES, TEST_TOPOLOGIES = "vit_jax/plan/topologies.py", "tests/plan/test_topologies.py"
PRODUCTS, TEST_FLOPS = "vit_jax/costs/products.py", "tests/costs/test_flops.py"
SWEEP_RESULTS, TEST_SWEEP = "vit_jax/sweep/results.py", "tests/sweep/test_sweep.py"
TRIALS, TEST_SWEEP_RESULTS = "vit_jax/sweep/trials.py", "tests/sweep/test_results.py"
RECIPES = "vit_jax/report/recipes.py"
SEEDS, TEST_REPORT = "vit_jax/report/seeds.py", "tests/report/test_report.py"
MEASURED, TEST_MEASURED = "vit_jax/report/measured.py", "tests/report/test_measured.py"
CONFIG, TEST_CONFIG = "vit_jax/config.py", "tests/test_config.py"

MUTATIONS = [
    Mutation(
        ROOFLINE,
        '{"all-reduce": 2.0}.get(collective.kind, 1.0)',
        '{"all-reduce": 1.0}.get(collective.kind, 1.0)',
        TEST_ROOFLINE,
        "an all-reduce sends everything twice",
    ),
    Mutation(
        ROOFLINE,
        "return max(self.compute, self.memory, self.interconnect)",
        "return max(self.compute, self.memory)",
        f"{TEST_ROOFLINE} {TEST_ROW}",
        "the network may be the limit",
    ),
    Mutation(
        ROOFLINE,
        "if seconds and seconds > 0 and not num_unknown_operations and not num_loops else None",
        "if seconds and seconds > 0 else None",
        TEST_ROOFLINE,
        "the compiler's own time is shown only where it knows all operations",
    ),
    Mutation(
        HLO,
        'totals["cycles"] += times * computation.cycles',
        'totals["cycles"] += computation.cycles',
        TEST_HLO,
        "cycles of a loop count for each turn",
    ),
    Mutation(
        HLO,
        'times = (group_size or 1) if kind == "reduce-scatter" else 1',
        "times = 1",
        TEST_HLO,
        "a reduce-scatter sums the whole array",
    ),
    Mutation(
        ROW,
        'outputs = answer["outputs"] - answer["aliased"]',
        'outputs = answer["outputs"]',
        f"{TEST_ROW}::test_memory_counts_what_is_written_over_an_argument_once",
        "donated memory counts once",
    ),
    Mutation(
        ROW,
        "return max(seconds, self.roofline.seconds) if self.roofline else seconds",
        "return seconds",
        f"{TEST_ROW}::test_no_time_is_less_than_the_roofline "
        f"{TEST_ROW}::test_an_exchange_that_overlaps_but_takes_longest_is_the_roofline_too",
        "no step is faster than its roofline",
    ),
    Mutation(
        ROW,
        "core_days=days * row.num_cores",
        "core_days=days * row.num_devices",
        f"{TEST_ROW}::test_a_v4_device_counts_as_two_cores_of_its_own_and_more_of_v3",
        "core-days count cores, not devices",
    ),
    Mutation(
        SEARCH,
        "elif high - low <= max(1, low // RESOLUTION):",
        "elif high - low <= max(1, low // 2):",
        f"{TEST_SEARCH}::test_the_largest_batch_of_a_linear_need_is_exact_and_takes_four_compilations "
        f"{TEST_SEARCH}::test_the_largest_batch_is_found_where_the_compiler_saves_memory_by_itself",
        "the largest batch is found to one part in 32",
    ),
    Mutation(
        SEARCH,
        '_REMAT_WORK = {"none": 1.0, "dots": 1.1, "full": 4 / 3}',
        '_REMAT_WORK = {"none": 1.0, "dots": 1.1, "full": 1.0}',
        f"{TEST_SEARCH}::test_options_are_ordered_by_expected_time "
        f"{TEST_SEARCH}::test_remat_is_tried_from_the_fastest_on_and_ends_with_what_fits",
        "the cheapest rematerialisation is tried first",
    ),
    Mutation(
        TOPOLOGIES,
        "torus = tuple(size == facts.pod_axis for size in shape)",
        "torus = (True,) * len(shape)",
        TEST_TOPOLOGIES,
        "an axis shorter than the pod is no ring",
    ),
    Mutation(
        PRODUCTS,
        "flops = 2 * positions * inputs * outputs",
        "flops = positions * inputs * outputs",
        f"{TEST_FLOPS}::test_parameters_and_flops_are_those_of_the_traced_forward_pass",
        "a multiply-add is two FLOPs",
    ),
    Mutation(
        PRODUCTS,
        "self.add(part, flops=flops, parameters=parameters, times_backward=flows + kernel)",
        "self.add(part, flops=flops, parameters=parameters, times_backward=2)",
        f"{TEST_FLOPS}::test_with_frozen_parameters_only_what_is_computed_counts",
        "frozen parameters need no gradient",
    ),
    Mutation(
        "vit_jax/costs/hardware.py",
        "bf16_flops=123e12",
        "bf16_flops=126e12",
        "tests/costs/test_hardware.py",
        "a TPUv3 chip has 123 TFLOP/s",
    ),
    Mutation(
        TOPOLOGIES,
        '"v5litepod": "v5e"',
        '"v5litepod": "v5p"',
        TEST_TOPOLOGIES,
        "Cloud TPU's accelerator types name topologies",
    ),
    Mutation(
        SWEEP_RESULTS,
        'better = min if task.sweep.metric.endswith("loss") else max',
        "better = max",
        f"{TEST_SWEEP}::test_of_a_loss_the_smallest_is_chosen",
        "of a loss the smallest is chosen",
    ),
    Mutation(
        SWEEP_RESULTS,
        'if all(result.status == "finished" for _, result in own):',
        'if any(result.status == "finished" for _, result in own):',
        f"{TEST_SWEEP}::test_value_with_a_seed_that_diverged_is_not_chosen",
        "a value with a seed that diverged is not chosen",
    ),
    Mutation(
        SWEEP_RESULTS,
        "elif all(result.is_over for _, result in trials):",
        "else:",
        f"{TEST_SWEEP}::test_nothing_is_chosen_while_trials_are_missing",
        "nothing is chosen while trials are missing",
    ),
    Mutation(
        SWEEP_RESULTS,
        "return statistics.stdev(values) if len(values) > 1 else None",
        "return statistics.pstdev(values) if len(values) > 1 else None",
        f"{TEST_SWEEP}::test_mean_and_sample_standard_deviation_are_numpys",
        "± is the sample standard deviation",
    ),
    Mutation(
        SWEEP_RESULTS,
        "by_seed = [statistics.fmean(seed) for seed in zip(*values, strict=True)]",
        "by_seed = [statistics.fmean(task) for task in values]",
        f"{TEST_SWEEP}::test_means_over_tasks_and_groups_and_their_deviation_over_seeds",
        "means over tasks vary over seeds",
    ),
    Mutation(
        TRIALS,
        "self.base.seed + number) for number in range",
        "self.base.seed) for number in range",
        f"{TEST_SWEEP}::test_seeds_of_final_runs_begin_with_the_configs",
        "final runs have seeds of their own",
    ),
    Mutation(
        "vit_jax/sweep/split_checks.py",
        "splits.check(measured, REPORTED, trained_on, TRAINED_ON)",
        "pass",
        f"{TEST_SWEEP_RESULTS}::test_training_choosing_and_reporting_take_different_examples",
        "nothing is chosen or reported on what is trained on",
    ),
    Mutation(
        "vit_jax/sweep/split_checks.py",
        "splits.check(measured, REPORTED, examples, CHOSEN_BY)",
        "pass",
        f"{TEST_SWEEP_RESULTS}::test_training_choosing_and_reporting_take_different_examples",
        "nothing is reported on what is chosen by",
    ),
    Mutation(
        "vit_jax/experiment/leakage.py",
        'weights = recorded.get("weights")',
        "weights = None",
        "tests/experiment/test_leakage.py::test_data_of_all_runs_behind_weights_count",
        "the data of all runs behind weights count as trained on",
    ),
    Mutation(
        SEEDS,
        "return statistics.stdev(values) if len(values) > 1 else None",
        "return statistics.pstdev(values) if len(values) > 1 else None",
        f"{TEST_REPORT}::test_cell_has_mean_standard_deviation_and_difference",
        "± in a report is the sample standard deviation",
    ),
    Mutation(
        RECIPES,
        "key=lambda each: (len(recipe.differences(each.first)), -len(each.models), str(each.first.path))",
        "key=lambda each: -each.first.values[ACCURACY].value",
        f"{TEST_REPORT}::test_accuracy_does_not_choose_between_settings",
        "accuracy does not choose between settings",
    ),
    Mutation(
        RECIPES,
        "rule = max(held_out, key=lambda rule: held_out[rule][1])",
        "rule = min(held_out, key=lambda rule: held_out[rule][1])",
        "tests/report/test_recipes.py::test_better_of_two_rules_on_held_out_images_counts_whatever_the_test_images_say",
        "the better rule on held-out images counts",
    ),
    Mutation(
        MEASURED,
        'top_1, top_5 = REAL, f"{REAL} {TOP_5}"',
        "pass",
        "tests/report/test_collect.py::test_real_labels_in_place_of_the_usual_ones_are_no_imagenet_accuracy",
        "accuracy by ReaL labels is no ImageNet accuracy",
    ),
    Mutation(
        MEASURED,
        "elif examples is not None and whole and examples not in whole:",
        "elif False:",
        f"{TEST_MEASURED}::test_accuracy_on_part_of_imagenet_is_no_result",
        "accuracy on part of a test set is no result",
    ),
    Mutation(
        MEASURED,
        'flaw = f"measured on images of which {overlap[prefix]} were trained on"',
        'flaw = ""',
        f"{TEST_MEASURED}::test_number_on_images_that_were_trained_on_is_no_result",
        "accuracy on training images is no result",
    ),
    Mutation(
        "vit_jax/run/workdir.py",
        '"sharding": "the same sums in another order",',
        "",
        "tests/run/test_workdir.py::test_a_run_goes_on_split_otherwise_over_other_devices",
        "a run resumes on other devices",
    ),
    Mutation(
        "vit_jax/paper/tables.py",
        '"ImageNet": Score(85.30, 0.02)',
        '"ImageNet": Score(85.03, 0.02)',
        "tests/test_configs.py::test_page_of_a_run_of_table_2_has_its_numbers",
        "published numbers are the paper's",
    ),
    Mutation(
        "configs/vit_l16_i21k.py",
        "config.optimizer.weight_decay = 0.03",
        "config.optimizer.weight_decay = 0.3",
        "tests/test_configs.py",
        "a config is its row of table 3",
    ),
    Mutation(
        CONFIG,
        '"model.dropout_rate": SHARE,',
        '"model.dropout_rate": NOT_NEGATIVE,',
        TEST_CONFIG,
        "a dropout rate is below 1",
    ),
    Mutation(
        "vit_jax/field_checks.py",
        "return self.contains(value) and (self.whole or self.contains(as_float32(float(value))))",
        "return self.contains(value)",
        TEST_CONFIG,
        "numbers are checked as float32",
    ),
    Mutation(
        CONFIG,
        "if name not in given:\n            with config.ignore_type():",
        "if False:\n            with config.ignore_type():",
        f"{TEST_CONFIG}::test_a_length_that_is_given_unsets_the_others",
        "--config.steps replaces the config's epochs",
    ),
    Mutation(
        "vit_jax/flags.py",
        "for field in cleared:",
        "for field in ():",
        "tests/test_main.py::test_dry_run_with_a_length_a_field_without_value_and_evaluation_on_what_is_trained_on",
        "--config.<field>=None clears a field",
    ),
    Mutation(
        "vit_jax/flags.py",
        'print(f"error: {message}", file=sys.stderr, flush=True)\n    return 1',
        'print(f"error: {message}", file=sys.stderr, flush=True)\n    return 0',
        "tests/test_main.py::test_mistake_is_one_message_and_status_not_zero",
        "a mistake ends with status 1",
    ),
    Mutation(
        "vit_jax/predict.py",
        "if spec.image_size is not None and size != spec.image_size:",
        "if False:",
        "tests/test_predict.py::test_another_image_size_interpolates_the_position_embeddings",
        "predictions at another size interpolate the position embeddings",
    ),
    Mutation(
        "vit_jax/predict.py",
        'labels = np.argsort(-probabilities, kind="stable")[:k]',
        'labels = np.argsort(probabilities, kind="stable")[:k]',
        "tests/test_predict.py::test_json_has_each_image_with_the_models_probabilities_the_likeliest_first",
        "the likeliest class comes first",
    ),
    Mutation(
        "vit_jax/predict.py",
        'self.probabilities = probabilities or weights.probabilities or "softmax"',
        'self.probabilities = probabilities or "softmax"',
        "tests/test_predict.py tests/run/test_facts.py::test_a_run_with_the_sigmoid_loss_predicts_with_the_sigmoid",
        "a head trained with the sigmoid loss predicts with the sigmoid",
    ),
    Mutation(
        "vit_jax/experiment/dry_run.py",
        '"yes" if decay_by_path[path] else "no"',
        '"yes"',
        "tests/experiment/test_dry_run.py::test_parameter_table_lists_every_parameter_and_says_which_decay",
        "--dry_run says which parameters decay",
    ),
    Mutation(
        "vit_jax/run/summary.py",
        'for row in rows if row["step"] >= since and names[0] in row',
        "for row in rows if names[0] in row",
        "tests/run/test_facts.py::test_a_run_does_not_go_on_with_other_examples_to_evaluate_on",
        "the best accuracy is on today's examples",
    ),
    Mutation(
        "vit_jax/analysis/mistakes.py",
        'np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")',
        'np.argsort(probabilities[wrong, predicted[wrong]], kind="stable")',
        "tests/analysis/test_mistakes.py",
        "the worst mistakes come first",
    ),
    Mutation(
        "launch/until_done.sh",
        'if [ "$status" -le 1 ]',
        'if [ "$status" -le 0 ]',
        "tests/test_launch.py::test_until_done_starts_again_until_done_or_in_error",
        "an error that the same command would meet again ends the restarts",
    ),
]
