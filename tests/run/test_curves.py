import json

import cv2
import numpy as np
import pytest

from vit_jax.run import curves


def write_metrics(workdir, scale=1.0):
    workdir.mkdir(parents=True)
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
    assert both.shape == (510, 1200, 3)
    curves.plot_curves([tmp_path / "a"], output)
    assert not np.array_equal(cv2.imread(str(output)), both)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("count", [1, 12, 40])
def test_legend_and_final_values_are_where_no_curve_runs(count, tmp_path):
    folders = [tmp_path / f"task{index % 2}" / f"{'$_' if index else '_'}{index // 2}" for index in range(count)]
    for folder in folders:
        write_metrics(folder, 1 + len(folder.name))
    figure = curves.draw_curves(list(map(str, folders)))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    panels = [axis.get_window_extent() for axis in figure.axes]
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(set(labels)) == 2 * count  # each run's two curves, and no name is hidden or stands for two runs
    assert not any(panel.overlaps(legend.get_window_extent()) for panel in panels)
    assert all(panel.height > 300 for panel in panels)
    assert sum("accuracy 0.8, loss 0." in label for label in labels) == count
    colors = {line.get_color() for axis in figure.axes for line in axis.lines}
    assert len(colors) == count


def test_folder_without_metrics_is_one_message(tmp_path, capsys):
    assert curves.main([str(tmp_path)]) == 1
    assert "no metrics in" in capsys.readouterr().err
