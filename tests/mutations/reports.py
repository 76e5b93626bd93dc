"""The report's studies and figures."""

from tests.mutations.mutation import Mutation

SUBJECTS, STUDIES = "vit_jax/report/subjects.py", "vit_jax/report/studies.py"
TEST, TEST_FIGURES = "tests/report/test_studies.py", "tests/report/test_figures.py"

MUTATIONS = [
    Mutation(
        SUBJECTS,
        "left = {name: value for name, value in self.training.items() if not is_among(name, varied)}",
        "left = {}",
        f"{TEST}::test_networks_that_differ_in_something_else_are_not_compared",
        "a study compares networks that differ only in what it varies",
    ),
    Mutation(
        SUBJECTS,
        "return FIVE_SHOT in self.measures and is_papers_data(self)",
        "return FIVE_SHOT in self.measures",
        f"{TEST}::test_part_of_imagenet_or_another_subset_of_jft_is_not_the_papers",
        "other data are not in the tables of the paper's",
    ),
    Mutation(
        "vit_jax/report/collect.py",
        "counts = run.steps if purpose.step is None else purpose.step",
        "counts = run.steps",
        f"{TEST}::test_early_stopping_shows_the_numbers_of_the_step_that_counts",
        "with early stopping, the step that counts is not the last",
    ),
    Mutation(
        STUDIES,
        'each.model.study in ("", study.name)',
        "True",
        f"{TEST}::test_a_run_of_a_study_page_belongs_to_that_study_alone",
        "the runs of a study are not in other studies",
    ),
    Mutation(
        STUDIES,
        "return -alike, subject.exaflops or math.inf",
        "return alike, subject.exaflops or math.inf",
        f"{TEST}::test_figure_8_has_compute_relative_to_the_model_that_all_axes_share",
        "compute is relative to the model that all axes share",
    ),
    Mutation(
        "vit_jax/report/hardware_figures.py",
        "if is_number and number > 0:",
        "if is_number:",
        f"{TEST_FIGURES}::test_failed_cells_of_figure_12_are_left_out",
        "a batch that does not fit is not a batch of 0",
    ),
    Mutation(
        "vit_jax/report/figure_tables.py",
        "table.publish({(_row_of(group), column): mean for group, mean in means.items()}, digits=1)",
        "table.publish({(_row_of(group), column): mean + 1 for group, mean in means.items()}, digits=1)",
        f"{TEST_FIGURES}::test_figure_2_has_groups_that_are_published_and_says_which_are_not",
        "published means of groups are those of table 9",
    ),
]
