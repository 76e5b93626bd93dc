"""Figure 12: the roofline by a closed form, the search for the best batch, a measurement, the page and the picture."""

import json
import re

import pytest

from benchmarks import figure_12_page as page
from benchmarks import figure_12_speed as speed
from tests.conftest import ROOT

DOCS = ROOT / "docs"
BATCHES, SPEEDS = page.read_cells(DOCS / page.BATCHES_JSON), page.read_cells(DOCS / page.SPEEDS_JSON)


def measured(model, size, images_per_second, device="a device"):
    return {
        "device": device, "dtype": "float32", "model": model, "size": size, "image_size": page.image_size(model, size),
        "batch": 4, "images_per_second": images_per_second, "flops": size * size,
    }  # fmt: skip


@pytest.mark.parametrize(("model", "layers", "width", "mlp", "patch"), [
    ("ViT-B/32", 12, 768, 3072, 32), ("ViT-L/16", 24, 1024, 4096, 16), ("ViT-H/14", 32, 1280, 5120, 14)
])  # fmt: skip
def test_roofline_of_a_vit_is_its_products_at_the_peak_of_a_core(model, layers, width, mlp, patch):
    for size in (64, 512):
        pixels = page.image_size(model, size)
        patches = (pixels // patch) ** 2
        tokens = patches + 1
        layer = tokens * (4 * width**2 + 2 * width * mlp) + 2 * tokens**2 * width
        products = layers * layer + patches * 3 * patch**2 * width + width * 1000
        (cell,) = [each for each in SPEEDS if each["device"] == page.ROOFLINE and each["model"] == model
                   and each["size"] == size]  # fmt: skip
        assert (cell["limit"], cell["image_size"]) == ("compute", pixels)
        assert cell["images_per_second"] == pytest.approx(123e12 / 2 / (2 * products), rel=1e-6)


def test_roofline_is_the_memory_where_that_takes_longer():
    cell = speed.roofline_cell("ViT-B/32", 64, 1, 2**34)
    arguments, outputs = 4 * 87_469_288 + 3 * 64**2, 4 * 1000
    # ViT-B/32 has 49 position embeddings at 224 pixels and 4 at 64.
    assert cell["limit"] == "memory"
    moved = 2 * 2**34 - arguments - outputs
    assert 1 / cell["images_per_second"] == pytest.approx(moved * 2 / 900e9, rel=1e-3)


@pytest.mark.parametrize(("seconds", "first", "limit", "tried"), [
    (lambda batch: 1.0, 4, 100.0, [4, 8, 16, 32, 64, 128, 256]),
    (lambda batch: 1.0 if batch < 16 else batch / 8, 4, 100.0, [4, 8, 16]),  # 16 are no faster than 8
    (lambda batch: 0.9 * batch**0.5, 4, 4.0, [4, 8]),  # 16 are expected to take longer than the limit
])  # fmt: skip
def test_batch_is_doubled_while_it_pays(seconds, first, limit, tried):
    at_most = lambda batch: 99.0 if batch == 256 else seconds(batch)  # noqa: E731
    assert list(speed.best_batch(at_most, first, limit)[0]) == tried


def out_of_memory_from(too_many):
    def seconds(batch):
        if batch >= too_many:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return 1.0

    return seconds


def test_batch_that_runs_out_of_memory_is_halved_or_ends_the_search():
    assert speed.best_batch(out_of_memory_from(16), 4, 9.0) == ({4: 4.0, 8: 8.0}, "batch 16 runs out of memory")
    assert speed.best_batch(out_of_memory_from(4), 4, 9.0) == ({2: 2.0}, "batch 4 runs out of memory")
    assert speed.best_batch(out_of_memory_from(1), 4, 9.0) == ({}, "batch 1 runs out of memory")


def test_another_error_of_a_measurement_is_not_hidden():
    def seconds(batch):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        speed.best_batch(seconds, 4, 9.0)


def test_forward_pass_of_a_batch_is_timed():
    assert 0 < speed.time_forward("ViT-Ti/32", 32, 2, "float32", limit=1e-9) < 60


@pytest.fixture
def docs(tmp_path, monkeypatch):
    """A folder with the page and largest batches, where a forward pass takes a second for each 100,000 pixels."""
    (tmp_path / "images").mkdir()
    (tmp_path / "figure_12.md").write_text((DOCS / "figure_12.md").read_text())
    (tmp_path / page.BATCHES_JSON).write_text((DOCS / page.BATCHES_JSON).read_text())
    calls = []

    def time_forward(model, pixels, batch, dtype, limit):
        calls.append((model, pixels, batch))
        return batch * pixels**2 / 1e5

    monkeypatch.setattr(speed, "time_forward", time_forward)
    monkeypatch.setattr(speed, "forward_flops", lambda model, pixels: pixels**2)
    return tmp_path, calls


def test_measuring_resumes_and_leaves_out_what_would_take_too_long(docs, capsys):
    folder, calls = docs
    command = ["measure", f"--docs={folder}", "--models", "ViT-B/32", "--limit=1.5"]
    assert speed.main(command) == 0
    assert list(dict.fromkeys(pixels for _, pixels, _ in calls)) == [64, 128, 224, 384]
    assert "ViT-B/32 at 512: an image takes about 3 s" in capsys.readouterr().out
    before = (folder / page.SPEEDS_JSON).read_text()
    cells = json.loads(before)
    assert [cell["images_per_second"] for cell in cells[:4]] == pytest.approx(
        [1e5 / size**2 for size in (64, 128, 224, 384)]
    )
    assert cells[4]["images_per_second"] is None
    calls.clear()
    assert speed.main(command) == 0
    assert not calls and (folder / page.SPEEDS_JSON).read_text() == before
    assert speed.main([*command[:3], "R50x1", "--limit=1.5"]) == 0
    assert json.loads((folder / page.SPEEDS_JSON).read_text())[:5] == cells


def test_report_writes_tables_and_picture_of_both_halves(docs):
    folder, _ = docs
    (folder / page.SPEEDS_JSON).write_text(json.dumps([*SPEEDS, measured("R50x1", 64, 0.123456, "a slow device")]))
    assert speed.main(["report", f"--docs={folder}"]) == 0
    text = re.sub(" +", " ", (folder / "figure_12.md").read_text())
    assert "a slow device, float32:\n\n| model | 64 px |" in text and "| R50x1 | 0.123 | not yet |" in text
    assert "| ViT-L/16 | 5,957 | 1,546 | 500 | 161 | 84.9 |" in text
    assert (folder / "images" / "figure_12.png").read_bytes().startswith(b"\x89PNG")


def test_picture_has_speeds_on_the_left_and_batches_on_the_right():
    figure = page.draw(BATCHES, [measured("R50x1", 224, 5.0), measured("R50x1", 64, 7.0), *SPEEDS])
    roofline, forward, here, train = figure.axes
    assert [axis.get_title() for axis in (roofline, here)] == [
        "images a second: TPU v3 core, roofline", "images a second: a device, float32"
    ]  # fmt: skip
    assert [axis.get_title().rpartition(": ")[2] for axis in (forward, train)] == ["forward pass", "training step"]
    (curve,) = here.get_lines()
    assert curve.get_xydata().tolist() == [[64, 7], [224, 5]]
    curves = {line.get_label(): line for line in forward.get_lines()}
    assert list(curves) == list(page.MODELS)
    assert curves["R50x1"].get_color() == curve.get_color() and curves["R50x1"].get_linestyle() == "--"
    batches = {cell["image_size"]: cell["batch"] for cell in BATCHES
               if (cell["model"], cell["task"]) == ("ViT-H/14", "inference")}  # fmt: skip
    assert dict(curves["ViT-H/14"].get_xydata()) == batches


def test_page_has_the_results_that_are_stored():
    text = (DOCS / "figure_12.md").read_text()
    for name, table in page.tables_of(BATCHES, SPEEDS).items():
        assert f"<!-- {name} -->\n\n{table}\n\n<!-- end of {name} -->" in text


@pytest.mark.parametrize(("arguments", "message"), [
    (["measure", "--models", "ViT-B32"], "Did you mean 'ViT-B/32'?"),
    (["measure", "--limit=0"], "--limit=0 must be a number of seconds above 0."),
    (["report", "--docs=/nowhere"], "there is no such folder"),
])  # fmt: skip
def test_bad_argument_is_one_message(arguments, message, capsys):
    assert speed.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_roofline_without_largest_batches_says_what_to_run(tmp_path, capsys):
    assert speed.main(["roofline", f"--docs={tmp_path}"]) == 1
    assert "run benchmarks/figure_12.py first" in capsys.readouterr().err
