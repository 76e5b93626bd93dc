"""`python -m vit_jax.weights`, as users run it."""

import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT, main_environment
from tests.weights.test_formats import assert_same, make_weights
from vit_jax.weights import list_checkpoints, load, save
from vit_jax.weights.__main__ import main


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path):
    return save(make_weights(pre_logits=True), tmp_path / "source.npz")


def error_of(capsys, *arguments):
    """The one message of a command that fails."""
    assert run(*arguments) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert "Traceback" not in output.err
    return output.err


def test_list_shows_every_released_checkpoint(capsys):
    assert run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list_checkpoints()


def test_list_shows_model_size_classes_accuracy_and_address(capsys):
    assert run("list", "augreg_b16_i21k_in1k_384") == 0
    _, line = capsys.readouterr().out.splitlines()
    name, model, size, classes, accuracy, address = line.split()
    assert (name, model, size, classes, accuracy) == ("augreg_b16_i21k_in1k_384", "ViT-B/16", "384", "1,000", "85.49")
    assert address.startswith("gs://vit_models/augreg/B_16-")


def test_list_takes_a_pattern(capsys):
    assert run("list", "vit_l16*") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(list_checkpoints("vit_l16*")) == 4


def test_a_pattern_that_nothing_matches_is_an_error(capsys):
    assert "no released checkpoint matches 'bit_x*'" in error_of(capsys, "list", "bit_x*")


def test_inspect_shows_names_shapes_and_norms(capsys, source):
    assert run("inspect", source) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    weights = make_weights(pre_logits=True)
    for name, array in weights.arrays.items():
        assert lines[name][1:3] == ["x".join(map(str, array.shape)), "float32"]
        np.testing.assert_allclose(float(lines[name][3]), np.linalg.norm(array), rtol=1e-3)
        np.testing.assert_allclose(float(lines[name][4]), array.mean(), rtol=1e-2, atol=1e-6)


def test_inspect_shows_the_identified_model(capsys, source):
    assert run("inspect", source, "--short") == 0
    output = capsys.readouterr().out
    size = sum(array.size for array in make_weights(pre_logits=True).arrays.values())
    assert "ViT-Ti/4, 5 classes" in output
    assert "pre_logits=True" in output
    assert "images 16x16" in output
    assert f"{size:,}; {size - 16 * 5 - 5:,} without the head" in output
    assert "encoderblock" not in output


def test_inspect_warns_of_values_that_are_not_finite(capsys, tmp_path):
    weights = make_weights()
    weights.arrays["head/bias"][1] = np.nan
    assert run("inspect", save(weights, tmp_path / "a.npz"), "--short") == 0
    assert "not finite: head/bias" in capsys.readouterr().out


def test_inspect_reports_a_head_of_zeros(capsys, tmp_path):
    weights = make_weights()
    weights.arrays["head/kernel"][:] = 0
    assert run("inspect", save(weights, tmp_path / "a.npz"), "--short") == 0
    assert "every image gets the same logits" in capsys.readouterr().out


def test_inspect_reports_assumptions(capsys, tmp_path):
    np.savez(tmp_path / "a.npz", **make_weights(num_classes=1000).arrays)
    assert run("inspect", tmp_path / "a.npz", "--short") == 0
    output = capsys.readouterr().out
    assert "'tench, Tinca tinca'" in output
    assert "assumed to be those of imagenet2012" in output


@pytest.mark.parametrize(
    ("to", "destination", "file"),
    [
        (None, "out.npz", "out.npz"),
        ("vit", "out.npz", "out.npz"),
        ("big_vision", "out.npz", "out.npz"),
        ("timm", "out.safetensors", "out.safetensors"),
        ("timm", "out", "out/model.safetensors"),
        ("huggingface", "out", "out/model.safetensors"),
    ],
)
def test_convert_writes_the_requested_format(capsys, tmp_path, to, destination, file):
    weights = make_weights()
    weights.arrays["Transformer/posembed_input/pos_embedding"][:, 0] = 0
    source = save(weights, tmp_path / "source.npz")
    assert run("convert", source, tmp_path / destination, *([f"--to={to}"] if to else [])) == 0
    assert f"{len(weights.arrays)} arrays from {source} (vit) to {tmp_path / file}" in capsys.readouterr().out
    found = load(tmp_path / destination)
    assert found.format == (to or "vit")
    assert_same(found.arrays, weights.arrays)


def test_convert_leaves_out_what_is_to_be_dropped(capsys, source, tmp_path):
    assert run("convert", source, tmp_path / "out", "--to=timm", "--drop=pre_logits,head") == 0
    found = load(tmp_path / "out")
    assert found.spec.num_classes == 0
    assert found.arrays.keys() == make_weights(num_classes=0).arrays.keys()


def test_convert_into_its_own_source_replaces_it_whole(capsys, source):
    assert run("convert", source, source, "--drop=head") == 0
    assert load(source).spec.num_classes == 0


def test_the_image_size_can_be_given(capsys, tmp_path):
    np.savez(tmp_path / "a.npz", **make_weights(image_size=(8, 24)).arrays)
    assert run("convert", tmp_path / "a.npz", tmp_path / "b.npz", "--image_size=8x24") == 0
    assert load(tmp_path / "b.npz").spec.image_size == (8, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "{tmp}/sorce.npz"), "Did you mean '{tmp}/source.npz'"),
        (("inspect", "augreg_b16_i21k_in1k_348"), "Did you mean 'augreg_b16_i21k_in1k_384'"),
        (("inspect", "{source}", "--model=ViT-B/16"), "not ViT-B/16"),
        (("inspect", "{source}", "--model=ViT-B16"), "Did you mean 'ViT-B/16'"),
        (("convert", "{source}", "{tmp}/out", "--to=timm"), "--drop=pre_logits,head"),
        (("convert", "{source}", "{tmp}/out", "--to=huggingface"), "--drop=head"),
        (
            ("convert", "{source}", "{tmp}/out.npz", "--to=huggingface", "--drop=head"),
            "name a folder instead of out.npz",
        ),
        (("convert", "{source}", "{tmp}/out.pth"), "is a .npz file"),
        (("convert", "{source}", "{tmp}/out.npz", "--drop=haed"), "no 'haed' to leave out"),
        (("convert", "{source}", "{tmp}/out.npz", "--to=bit"), "Known: big_vision"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_end_with_status_1_and_one_message(capsys, source, tmp_path, arguments, message):
    values = {"source": source, "tmp": tmp_path}
    assert message.format(**values) in error_of(capsys, *(each.format(**values) for each in arguments))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.npz", "source.npz.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "list | inspect | convert"),
        (("convert", "a"), "DST"),
        (("convert", "a", "b", "--to=pytorch"), "'huggingface'"),
        (("inspect", "a", "--image_size=large"), "write 384 or 224x384"),
        (("inspcet", "a"), "inspect"),
    ],
)
def test_an_invalid_command_line_prints_the_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--help",), ("python -m vit_jax.weights convert", "--to=huggingface", "list", "inspect")),
        (
            ("convert", "--help"),
            ("released checkpoint", "gs://", ".safetensors", "--workdir", "--drop", "head,pre_logits"),
        ),
        (("inspect", "--help"), ("--image_size", "HEIGHTxWIDTH", "--model")),
    ],
)
def test_help_explains_the_command(capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    for word in words:
        assert word in output


def test_the_command_runs_in_its_own_process(source, tmp_path, compilation_cache):
    command = [sys.executable, "-m", "vit_jax.weights", "convert", source, tmp_path / "out.npz", "--drop=haed"]
    process = subprocess.run(
        command, cwd=ROOT, env=main_environment(compilation_cache), capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert process.stdout == ""
    assert process.stderr.splitlines()[-1].startswith("error: there is no 'haed' to leave out")
    assert "Traceback" not in process.stderr
