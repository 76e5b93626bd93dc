import functools

import pytest

from benchmarks import tpu_step

TRIALS = [(study, trial) for study, (_, _, trials) in tpu_step.STUDIES.items() for trial in trials]


@pytest.mark.parametrize(("study", "trial"), TRIALS)
def test_a_trial_is_the_config_of_the_run_with_its_fields_changed(study, trial):
    config = tpu_step.make_config(study, trial)
    assert config.batch_size == 4096
    for field, value in tpu_step.STUDIES[study][2][trial].items():
        assert functools.reduce(lambda group, name: group[name], field.split("."), config) == value
