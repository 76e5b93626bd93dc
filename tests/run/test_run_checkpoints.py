import json
import unittest.mock

import jax.numpy as jnp

from vit_jax.run.run_checkpoints import RunCheckpoints


def test_best_parameters_that_a_restart_undid_are_dropped(tmp_path):
    journal = unittest.mock.MagicMock()
    for resumed_from, accuracy in ((0, 0.9), (6, 0.2)):
        with RunCheckpoints(tmp_path, journal, keep=1, every_steps=1) as checkpoints:
            checkpoints.start(resumed_from)
            checkpoints.save_if_best(8, {"kernel": jnp.full(2, accuracy)}, accuracy)
            checkpoints.wait()
        assert json.loads((tmp_path / "best" / "8" / "extra" / "metadata").read_text())["accuracy"] == accuracy


def test_best_parameters_are_those_of_the_first_highest_accuracy(tmp_path):
    with RunCheckpoints(tmp_path, unittest.mock.MagicMock(), keep=1, every_steps=1) as checkpoints:
        checkpoints.start(0)
        for step, accuracy in enumerate((0.5, 0.8, 0.8, 0.6), start=1):
            checkpoints.save_if_best(step, {"kernel": jnp.full(2, accuracy)}, accuracy)
        checkpoints.wait()
    assert max(int(path.name) for path in (tmp_path / "best").iterdir() if path.name.isdigit()) == 2
