import json
import os
import subprocess
import sys

import pytest

from benchmarks import candidates, matmul, train_step_flags
from benchmarks import train_step as benchmark
from benchmarks.train_step_rows import Row, compare_with_timm
from tests import XLA_FLAGS
from tests.conftest import ROOT
from vit_jax.errors import UserError

TINY = "--set num_layers=2 hidden_dim=32 mlp_dim=64 num_heads=2 --image_size=32 --matmul_sizes 64 128 --timm=never"
SETTINGS = candidates.Settings(224, "float32", None)

# Runs the script and writes the names of the modules that it imported.
PROBE = """
import json, runpy, sys
path, modules, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = path
try:
    runpy.run_path(path, run_name="__main__")
finally:
    with open(modules, "w") as file:
        json.dump(sorted(sys.modules), file)
"""


def run(folder, *arguments):
    """Returns the finished process, the result and the names of the imported modules."""
    modules, result = folder / "modules.json", folder / "result.json"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "PYTHONPATH"))}
    process = subprocess.run(
        [sys.executable, "-c", PROBE, ROOT / "benchmarks" / "train_step.py", modules, *arguments, f"--json={result}"],
        cwd=folder,
        env={**clean, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return process, json.loads(result.read_text()), json.loads(modules.read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    flags = [*TINY.split(), "--rounds=2", "--steps=2"]
    variant = "--variant=scan:scan_layers=true,remat=dots"
    return run(tmp_path_factory.mktemp("run"), "--models", "ViT-Ti/16@4", "ViT-Z/16@4", variant, *flags)


def test_rows_are_consistent(measured):
    process, result, _ = measured
    assert process.returncode == 0, process.stderr
    rows = [row for row in result["rows"] if row["model"] == "ViT-Ti/16"]
    assert [(row["variant"], row["what"]) for row in rows] == [
        (variant, what) for what in ("forward", "train") for variant in ("vit_jax", "vit_jax scan")
    ]
    for row in rows:
        assert row["error"] is None
        assert (row["batch"], row["steps"], len(row["round_seconds"])) == (4, 2, 2)
        assert row["images_per_second"] * row["ms_per_step"] / 1e3 == pytest.approx(row["batch"])
        assert row["images_per_second_min"] <= row["images_per_second"] <= row["images_per_second_max"]
        assert row["flops_per_second"] == pytest.approx(row["flops_per_image"] * row["images_per_second"])
        assert row["utilisation"] == pytest.approx(row["flops_per_second"] / result["matmul"]["reference"])
        assert row["compile_seconds"] > 0
        assert row["memory_bytes"] > 4 * row["parameters"]
        assert (row["loss"] is None) == (row["what"] == "forward")
    forward, train = rows[0], rows[2]
    assert train["flops_per_image"] == 3 * forward["flops_per_image"]
    # Patches, two layers of projections and MLP, head; attention and all else is little beside them.
    products = 4 * 768 * 32 + 2 * 5 * (4 * 32 * 32 + 2 * 32 * 64) + 1000 * 32
    assert forward["flops_per_image"] == pytest.approx(2 * products, rel=0.1)
    # Train holds Adam's two moments, too.
    assert train["memory_bytes"] > forward["memory_bytes"] + 8 * train["parameters"]


def test_reference_is_the_fastest_matrix_product(measured):
    _, result, _ = measured
    rates = result["matmul"]["jax"]
    assert [entry["size"] for entry in rates] == [64, 128]
    assert result["matmul"]["reference"] == max(entry["flops_per_second"] for entry in rates)


def test_tables_show_the_rows(measured):
    process, result, _ = measured
    for row in result["rows"]:
        line = next(
            line
            for line in process.stdout.splitlines()
            if line.startswith(f"| {row['model']}") and f" {row['variant']} " in line and f" {row['what']} " in line
        )
        assert ("failed" in line) == (row["error"] is not None)
        if not row["error"]:
            assert f"{row['ms_per_step']:.2f}" in line
    assert "## Summary" in process.stdout


def test_unknown_model_becomes_a_row_with_the_nearest_name(measured):
    process, result, _ = measured
    row = next(row for row in result["rows"] if row["model"] == "ViT-Z/16")
    assert row["images_per_second"] is None
    assert "unknown model 'ViT-Z/16'. Did you mean 'ViT-" in row["error"]
    assert row["error"] in process.stdout


def test_needs_only_jax_flax_and_optax(measured):
    _, _, modules = measured
    others = {"torch", "timm", "torchvision", "tensorflow", "ml_collections", "clu", "orbax", "grain", "cv2", "sklearn"}
    assert not others & {name.partition(".")[0] for name in modules}
    # Those of ours that need more.
    assert not {"vit_jax.main", "vit_jax.config", "vit_jax.train", "vit_jax.checkpoints"} & set(modules)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--set scan_layers", "expected key=value, got 'scan_layers'"),
        ("--set dtype=bfloat16", "--dtype=bfloat16"),
        ("--variant scan_layers=true", "expected NAME:key=value"),
        ("--variant a:b=1 --variant a:b=2", "given twice"),
        ("--batch many", "expected a positive number or 'auto', got 'many'"),
        ("--models ViT-S/16@0", "expected a positive number or 'auto', got '0'"),
        ("--what trian", "Did you mean 'train'?"),
        ("--rounds 0", "--rounds must be at least 1"),
    ],
)
def test_mistakes_are_reported(arguments, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        train_step_flags.check_arguments(train_step_flags.make_parser("").parse_args(arguments.split()))


def test_flags_have_their_documented_effect():
    flags = "--batch 8 --set a=1 b=0.5 --set c=true d=dots --what train --models ViT-S/16@64 R50x1@auto ViT-B/16"
    arguments = train_step_flags.make_parser("").parse_args(flags.split())
    train_step_flags.check_arguments(arguments)
    assert [(model.name, model.batch) for model in arguments.models] == [
        ("ViT-S/16", 64),
        ("R50x1", None),
        ("ViT-B/16", 8),
    ]
    assert arguments.overrides == {"a": 1, "b": 0.5, "c": True, "d": "dots"}
    assert arguments.what == ["train"]


class FakeCandidate:
    """Takes a millisecond a step and a tenth of that an image; cannot do more than `limit` images."""

    def __init__(self, limit):
        self.limit = limit

    def prepare(self, what, batch):
        if batch > self.limit:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte.")
        self.batch = batch

    def seconds(self, steps):
        return 1e-3 + 1e-4 * self.batch


def test_batches_double_while_it_pays():
    tried = list(benchmark.try_batches(FakeCandidate(limit=10**6), "train", 8, SETTINGS))
    assert [batch for batch, _ in tried] == [8, 16, 32, 64, 128, 256, 512]
    assert tried[-1][1] < 1.03 * tried[-2][1]
    assert tried[-2][1] > 1.03 * tried[-3][1]


def test_batches_double_until_memory_fails():
    tried = []
    with pytest.raises(RuntimeError) as error:
        tried.extend(benchmark.try_batches(FakeCandidate(limit=32), "train", 8, SETTINGS))
    assert candidates.is_out_of_memory(error.value)


def test_auto_takes_the_fastest_batch_of_a_process(monkeypatch):
    lines = [
        {"batch": 8, "images_per_second": 3.0},
        {"batch": 16, "images_per_second": 5.0},
        {"error": "out of memory"},
    ]
    printed = f"print({chr(10).join(map(json.dumps, lines))!r})"
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--batch=auto"])
    run = subprocess.run
    commands = []

    def run_fake(command, **options):
        commands.append(command)
        return run([sys.executable, "-c", printed], **options)

    monkeypatch.setattr(subprocess, "run", run_fake)
    assert benchmark.tune("ViT-Ti/16", "vit_jax") == 16
    assert commands[0][2:] == ["--batch=auto", '--tune=["ViT-Ti/16", "vit_jax"]']


def test_the_process_of_auto_writes_what_it_tries(capfd, monkeypatch):
    monkeypatch.setattr(benchmark, "candidates_of", lambda *_: {"vit_jax": lambda: FakeCandidate(limit=16)})
    monkeypatch.setattr(benchmark, "prepare_frameworks", lambda *_, **__: None)
    arguments = train_step_flags.make_parser("").parse_args(['--tune=["ViT-Ti/16", "vit_jax"]'])
    train_step_flags.check_arguments(arguments)
    benchmark.tune_here(arguments)
    *tried, last = map(json.loads, capfd.readouterr().out.splitlines())
    assert [line["batch"] for line in tried] == [8, 16]
    assert "out of memory" in last["error"]


def test_matrix_products_stop_where_they_take_too_long_or_too_much():
    def product(size):
        if size == 400:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return lambda repeats: repeats * size**3 * 1e-8

    rates = matmul.matmul_rates(product, [100, 200, 400, 800])
    assert [entry["size"] for entry in rates] == [100, 200]
    assert rates[0]["flops_per_second"] == pytest.approx(2e8)
    assert len(matmul.matmul_rates(product, [100, 1000])) == 1


def test_models_have_their_names_in_timm():
    known = ["vit_small_patch32_224", "vit_base_patch16_224", "resnetv2_50x1_bit"]

    def name_and_arguments(name, **overrides):
        return candidates.timm_model(name, overrides, 224, known)

    assert name_and_arguments("ViT-S/32")[0] == "vit_small_patch32_224"
    name, arguments = name_and_arguments("ViT-H/16")
    assert (name, arguments["patch_size"]) == ("vit_huge_patch14_224", 16)
    assert name_and_arguments("R50+ViT-B/16")[0] == "vit_base_r50_s16_224"
    assert name_and_arguments("R26+S/32")[0] == "vit_small_r26_s32_224"
    assert name_and_arguments("R50x1") == ("resnetv2_50x1_bit", {"num_classes": 1000})
    assert name_and_arguments("R50x2")[1]["width_factor"] == 2
    _, arguments = name_and_arguments("ViT-B/16", num_layers=2, hidden_dim=32, mlp_dim=128, pool="gap", remat="dots")
    assert arguments == {
        "num_classes": 1000,
        "img_size": 224,
        "act_layer": "gelu_tanh",
        "depth": 2,
        "embed_dim": 32,
        "mlp_ratio": 4.0,
        "global_pool": "avg",
        "class_token": False,
        "fc_norm": False,
    }
    for name, overrides in [("Axial-ViT-B/16", {}), ("ViT-B/16", {"pre_logits": True}), ("R50x1", {"width": 2})]:
        with pytest.raises(UserError, match="timm"):
            name_and_arguments(name, **overrides)


def test_ratios_are_to_the_faster_timm():
    speeds = {"vit_jax": 300.0, "timm": 100.0, "timm compiled": 200.0}
    rows = [
        Row("ViT-S/16", variant, "train", "float32", images_per_second=speed, parameters=10)
        for variant, speed in speeds.items()
    ]
    rows[0].parameters = 11
    compare_with_timm(rows)
    assert [row.ratio_to_timm for row in rows] == [1.5, 0.5, 1.0]
    assert "not the same model" in rows[0].note
    assert rows[1].note is None
