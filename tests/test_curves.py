import json

import cv2
import numpy as np

from vit_jax import curves


def write_metrics(workdir, scale=1.0):
    workdir.mkdir()
    rows = [{"step": step, "train/loss": scale / step, "train/accuracy": 0.5} for step in range(1, 50)]
    rows += [{"step": step, "test/loss": scale / step, "test/accuracy": step / 50} for step in (20, 40)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_curves_of_several_runs_come_into_one_picture(tmp_path, capsys):
    for name in ("a", "b"):
        write_metrics(tmp_path / name)
    output = tmp_path / "curves.png"
    assert curves.main([str(tmp_path / "a"), str(tmp_path / "b"), f"--output={output}"]) == 0
    assert str(output) in capsys.readouterr().out
    both = cv2.imread(str(output))
    assert both.shape == (480, 1200, 3)
    curves.plot_curves([tmp_path / "a"], output)
    assert not np.array_equal(cv2.imread(str(output)), both)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_folder_without_metrics_is_one_message(tmp_path, capsys):
    assert curves.main([str(tmp_path)]) == 1
    assert "no metrics in" in capsys.readouterr().err
