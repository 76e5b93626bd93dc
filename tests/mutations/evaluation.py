"""Evaluators, few-shot accuracy, the experiment, the config, predictions, transfer tasks."""

from tests.mutations.mutation import Mutation

CLASSIFICATION = "vit_jax/evaluators/accuracy.py"
TEST_CLASSIFICATION = "tests/evaluators/test_accuracy.py"
FEWSHOT, TEST_FEWSHOT = "vit_jax/evaluators/fewshot.py", "tests/evaluators/test_fewshot.py"
FEATURES = "vit_jax/evaluators/features.py"
RIDGE, TEST_RIDGE = "vit_jax/evaluators/ridge.py", "tests/evaluators/test_ridge.py"
EXPERIMENT, TEST_EXPERIMENT = "vit_jax/experiment/build.py", "tests/experiment/test_build.py"
TASKS, TEST_TASKS = "vit_jax/data/transfer_tasks.py", "tests/data/test_transfer_tasks.py"
EVALUATIONS, TEST_EVALUATIONS = "vit_jax/experiment/evaluations.py", "tests/experiment/test_evaluations.py"
EVALUATE, TEST_EVALUATE = "vit_jax/evaluate.py", "tests/test_evaluate.py"

MUTATIONS = [
    Mutation(
        CLASSIFICATION,
        'mask = batch["mask"] * is_labelled(batch["label"])',
        'mask = is_labelled(batch["label"])',
        f"{TEST_CLASSIFICATION}::test_accuracy_and_loss_count_every_example_once "
        f"{TEST_CLASSIFICATION}::test_masked_examples_do_not_count_for_any_label",
        "padding does not count",
    ),
    Mutation(
        CLASSIFICATION,
        'mask = batch["mask"] * is_labelled(batch["label"])',
        'mask = batch["mask"]',
        f"{TEST_CLASSIFICATION}::test_several_labels_count_once_and_images_without_labels_not_at_all",
        "images without labels do not count",
    ),
    Mutation(
        CLASSIFICATION,
        "logits = jnp.where(competes, logits, _NEVER)",
        "pass",
        f"{TEST_CLASSIFICATION}::test_top_5_and_classes_to_choose_among",
        "only the variant's classes compete",
    ),
    Mutation(
        CLASSIFICATION,
        'yield "accuracy", math.nan if not_finite else totals["correct"] / examples',
        'yield "accuracy", totals["correct"] / examples',
        f"{TEST_CLASSIFICATION}::test_logits_that_are_not_finite_make_accuracy_nan_unless_their_image_does_not_count",
        "there is no accuracy of logits that are not finite",
    ),
    Mutation(
        CLASSIFICATION,
        '{"correct": 1, "top5_correct": 5}',
        '{"correct": 1, "top5_correct": 4}',
        f"{TEST_CLASSIFICATION}::test_top_5_and_classes_to_choose_among",
        "top-5 accuracy is of five classes",
    ),
    Mutation(
        CLASSIFICATION,
        "totals[name] += float(value)",
        "totals[name] = float(value)",
        f"{TEST_CLASSIFICATION}::test_accuracy_and_loss_count_every_example_once",
        "all batches of an evaluation count",
    ),
    Mutation(
        FEWSHOT,
        "data.validation if len(self._l2) > 1 else None",
        "data.validation",
        f"{TEST_FEWSHOT}::test_splits_that_share_examples_are_refused",
        "a validation split is not used if no l2 is chosen",
    ),
    Mutation(
        FEWSHOT,
        "generator.permutation(indices)[:shots]",
        "indices[:shots]",
        f"{TEST_FEWSHOT}::test_draws_match_the_released_evaluator_and_fewer_shots_are_a_subset",
        "draws of images are the released evaluator's",
    ),
    Mutation(
        FEWSHOT,
        'best = int(np.mean(accuracies["validation"], axis=0).argmax())',
        'best = int(np.mean(accuracies["test"], axis=0).argmax())',
        f"{TEST_FEWSHOT}::test_l2_is_chosen_on_the_validation_split",
        "l2 is not chosen on the test split",
    ),
    Mutation(
        FEWSHOT,
        "check_disjoint(source, role, other, other_role, advice)",
        "pass",
        f"{TEST_FEWSHOT}::test_splits_that_share_examples_are_refused",
        "few-shot splits that share examples are refused",
    ),
    Mutation(
        FEATURES,
        "out[name].astype(jnp.float32).mean(axis=tuple(range(1, out[name].ndim - 1)))",
        "out[name].astype(jnp.float32).max(axis=tuple(range(1, out[name].ndim - 1)))",
        f"{TEST_FEWSHOT}::test_feature_maps_are_averaged_over_positions_in_float32",
        "feature maps are averaged over positions",
    ),
    Mutation(
        RIDGE,
        "return (2 * sums - rows.sum(axis=0)).T",
        "return (2 * sums).T",
        TEST_RIDGE,
        "targets of the ridge regression are -1 and 1",
    ),
    Mutation(
        RIDGE,
        "(features == features[0]).all(axis=0), 0, 1 / (std",
        "(features == features[0]).all(axis=0), 1, 1 / (std",
        TEST_RIDGE,
        "features that are constant in training do not count",
    ),
    Mutation(
        RIDGE,
        "correct += [np.sum((rows @ each).argmax(axis=1) == expected) for each in weights]",
        "correct = [np.sum((rows @ each).argmax(axis=1) == expected) for each in weights]",
        TEST_RIDGE,
        "test examples of all blocks count",
    ),
    Mutation(
        "vit_jax/experiment/optimizer.py",
        "num_steps = round(images / config.batch_size)",
        "num_steps = int(images / config.batch_size) + 1",
        TEST_EXPERIMENT,
        "epochs become steps",
    ),
    Mutation(
        "vit_jax/experiment/data.py",
        "if trained and evaluated and list(trained) != list(evaluated):",
        "if False:",
        f"{TEST_EXPERIMENT}::test_evaluation_data_of_other_classes_are_refused",
        "splits with different classes are refused",
    ),
    Mutation(
        "vit_jax/experiment/data.py",
        "if expected and abs(len(train_source) - expected) > data.expected_within * expected:",
        "if False:",
        TEST_EXPERIMENT,
        "an incomplete data set is refused",
    ),
    Mutation(
        "vit_jax/experiment/step.py",
        "accumulation_steps=config.accumulation_steps,",
        "",
        f"{TEST_EXPERIMENT}::test_step_is_made_as_the_config_says",
        "config.accumulation_steps is heeded",
    ),
    Mutation(
        "vit_jax/experiment/model.py",
        'fields.pop("pre_logits", None)',
        "pass",
        "tests/test_fine_tuning.py::test_fine_tuning_starts_with_a_head_of_zeros_and_interpolated_position_embeddings",
        "fine-tuning has no hidden layer in its head",
    ),
    Mutation(
        "vit_jax/data/bit_hyper_rule.py",
        "return 500 if num_images < 20_000 else 10_000 if num_images < 500_000 else 20_000",
        "return 500 if num_images < 20_000 else 10_000 if num_images < 600_000 else 20_000",
        f"{TEST_TASKS}::test_hyper_rule_matches_bit",
        "BiT-HyperRule's lengths are BiT's",
    ),
    Mutation(
        TASKS,
        'choose, final = (f"{train}[:80%]", f"{train}[80%:90%]"), (f"{train}[:90%]", f"{train}[90%:]")',
        'choose, final = (f"{train}[:80%]", f"{train}[80%:]"), (f"{train}[:90%]", f"{train}[90%:]")',
        f"{TEST_TASKS}::test_a_folder_of_classes_is_split_into_what_has_nothing_in_common",
        "nothing is chosen on images to test on",
    ),
    Mutation(
        TASKS,
        "FIGURE_9['gap'] / FIGURE_9['cls']",
        "FIGURE_9['cls'] / FIGURE_9['gap']",
        "tests/experiment/test_fine_tuning.py::test_pages_offer_gap_with_its_rate",
        "global average pooling has a lower learning rate (figure 9)",
    ),
    Mutation(
        EVALUATE,
        "if weights is not None and weights != began_with",
        "if False and weights != began_with",
        f"{TEST_EVALUATE}::test_other_weights_are_not_mistaken_for_a_workdirs_run",
        "other weights are not evaluated as those of a run",
    ),
    Mutation(
        EVALUATIONS,
        'best_metric=best.removeprefix(f"{each.name}/") if best.startswith(f"{each.name}/") else None,',
        "best_metric=None,",
        f"{TEST_EVALUATIONS}::test_registered_evaluator_runs_in_the_loop_when_it_is_due_and_decides_what_is_best",
        "checkpoint.best_metric decides which parameters are the best",
    ),
    Mutation(
        EVALUATIONS,
        "type_.check(name, entry, setup)",
        "pass",
        f"{TEST_EVALUATIONS}::test_entry_that_does_not_fit_the_model_is_refused_before_anything_is_computed",
        "an entry that does not go with the model is refused",
    ),
    Mutation(
        "vit_jax/evaluators/registry.py",
        "if field not in fields:",
        "if False:",
        f"{TEST_EVALUATIONS}::test_wrong_entry_is_refused_with_the_nearest_name",
        "unknown fields of an entry are refused",
    ),
    Mutation(
        "vit_jax/config.py",
        "for name in _RENAMED.get(recorded, (recorded,))",
        "for name in (recorded,)",
        f"{TEST_EVALUATIONS}::test_fields_of_earlier_versions_are_read_by_their_present_names",
        "configs that earlier versions recorded are read",
    ),
    Mutation(
        "vit_jax/experiment/dry_run.py",
        r'name = name_of(path) if full else _LAYER.sub(r"\1*", name_of(path))',
        "name = name_of(path)",
        "tests/experiment/test_dry_run.py::test_parameter_table_has_equal_layers_once",
        "--dry_run prints equal layers once",
    ),
]
