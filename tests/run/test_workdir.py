import json
import os

import pytest

from vit_jax.config import base_config
from vit_jax.errors import UserError
from vit_jax.run import workdir


def test_config_is_recorded_and_the_same_config_is_welcome_again(tmp_path):
    config = base_config()
    for _ in range(2):
        workdir.check_config(tmp_path, config)
        workdir.record_start(tmp_path, config, step=0, devices={})
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["model"]["name"] == "ViT-B/16"
    assert recorded == json.loads(config.to_json())


def test_other_config_is_refused_with_the_fields_that_differ_and_the_flag(tmp_path):
    workdir.record_start(tmp_path, base_config(), step=0, devices={})
    config = base_config()
    config.optimizer.learning_rate = 0.5
    config.model.name = "ViT-S/16"
    with pytest.raises(UserError) as error:
        workdir.check_config(tmp_path, config)
    assert "model.name: 'ViT-B/16' -> 'ViT-S/16'" in str(error.value)
    assert "optimizer.learning_rate: 0.001 -> 0.5" in str(error.value)
    assert "--allow_config_change" in str(error.value)
    workdir.check_config(tmp_path, config, allow_config_change=True)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["name"] == "ViT-B/16"


def test_fields_without_effect_may_change_and_younger_fields_had_their_defaults(tmp_path):
    config = base_config()
    workdir.record_start(tmp_path, config, step=0, devices={})
    recorded = json.loads((tmp_path / "config.json").read_text())
    del recorded["label_smoothing"]
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    config.data.num_threads = 3
    workdir.check_config(tmp_path, config)
    config.label_smoothing = 0.1
    with pytest.raises(UserError, match=r"label_smoothing: 0\.0 -> 0\.1"):
        workdir.check_config(tmp_path, config)


def test_a_run_resumes_with_another_split_over_other_devices(tmp_path):
    config = base_config()
    workdir.record_start(tmp_path, config, step=0, devices={})
    config.mesh.data, config.mesh.model = 2, 4
    config.sharding = "fsdp+tensor"
    config.sharding_rules = (("head/kernel", ("data", None)),)
    config.model.remat = "full"
    config.eval_batch_size = 64
    workdir.check_config(tmp_path, config)


def test_second_process_is_kept_out_of_a_workdir_until_the_first_is_done(tmp_path):
    with workdir.locked(tmp_path / "run"), pytest.raises(UserError, match="another process is training"):
        workdir.locked(tmp_path / "run").__enter__()
    with workdir.locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("damaged", [b'{"seed": ', b"[1]", b"null", b'"x"', b"\xff\xfe\x00", b"[" * 10**5])
def test_a_damaged_config_record_is_replaced_by_that_of_the_last_start(tmp_path, damaged):
    config = base_config()
    workdir.record_start(tmp_path, config, step=0, devices={})
    (tmp_path / "config.json").write_bytes(damaged)
    workdir.check_config(tmp_path, config)
    config.seed = 7
    with pytest.raises(UserError, match="seed: 0 -> 7"):
        workdir.check_config(tmp_path, config)
    (tmp_path / "starts.jsonl").write_bytes(damaged)
    with pytest.raises(UserError, match=r"config\.json.*--allow_config_change"):
        workdir.check_config(tmp_path, config)
    workdir.check_config(tmp_path, config, allow_config_change=True)


def test_temporary_files_that_a_kill_left_are_deleted_and_others_kept(tmp_path):
    left_over = [".config.json.0123abcd.tmp", ".seen-" + "0" * 32]
    others = ["notes.tmp", ".mine.tmp", "metrics.jsonl"]
    for name in (*left_over, *others, ".young.json.0123abcd.tmp"):
        (tmp_path / name).touch()
        if "young" not in name:
            os.utime(tmp_path / name, (0, 0))
    with workdir.locked(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {*others, ".young.json.0123abcd.tmp", ".lock"}


def test_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*run: Not a directory"):
        workdir.locked(tmp_path / "file" / "run").__enter__()


def test_start_is_recorded_with_versions_and_commit(tmp_path):
    workdir.record_start(tmp_path, base_config(), step=0, devices={"platform": "cpu"})
    workdir.record_start(tmp_path, base_config(), step=7, devices={"platform": "cpu"})
    first, second = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert (first["step"], second["step"]) == (0, 7)
    assert first["packages"]["jax"]
    assert first["packages"]["vit_jax"]
    assert first["git_commit"] is None or len(first["git_commit"].removesuffix("-dirty")) == 40
    assert first["command"]
    assert first["config"]["batch_size"] == 4096
