"""`python -m vit_jax.analysis`: each subcommand from weights to the PNG, and what users get wrong."""

import json
import shutil

import cv2
import numpy as np
import PIL.Image
import pytest

from tests.analysis.tiny_weights import make_pixels, make_weights
from vit_jax.analysis import attention_distance, position_similarity, rollout
from vit_jax.analysis.__main__ import PICTURES, Picture, main
from vit_jax.weights import save

KINDS = {
    "vit": {},
    "headless": {"num_classes": 0},
    "axial": {"name": "Axial-ViT-Ti/4"},
    "resnet": {"name": "R50x1", "num_classes": 0},
    "none": {"position_embedding": "none"},
    "relative": {"position_embedding": "relative"},
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for kind, attributes in KINDS.items():
        save(make_weights(**attributes), folder / f"{kind}.npz")
    return folder


@pytest.fixture
def places(originals, tmp_path, monkeypatch):
    """A working folder with weights and a folder of images."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    (tmp_path / "images").mkdir()
    for index, (height, width) in enumerate([(10, 20), (30, 12), (8, 8)]):
        assert cv2.imwrite(f"images/{index}.png", make_pixels(height, width))
    return tmp_path


def size_of(path):
    with PIL.Image.open(path) as image:
        image.load()
        return image.size


def test_filters_and_positions_need_no_images(places, capsys):
    assert main(["filters", "--weights=headless.npz", "--components=9"]) == 0
    assert main(["positions", "--weights=headless.npz", "--output=p.png"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("filters.png\nThe 9 components have")
    assert output.endswith("p.png\n")
    assert min(*size_of("filters.png"), *size_of("p.png")) > 100


def test_positions_of_several_weights_are_in_one_picture(places, monkeypatch):
    drawn = []
    monkeypatch.setattr(position_similarity, "draw_similarities", drawn.extend)
    monkeypatch.setattr(position_similarity, "write_picture", lambda *_: None)
    main(["positions", "--weights=vit.npz", "--weights=relative.npz"])
    relative = "ViT-Ti/4, relative.npz\nlayer "
    assert drawn == ["ViT-Ti/4, vit.npz", f"{relative}0", f"{relative}1"]


def test_distance_averages_over_all_images_that_can_be_read(places, capsys, monkeypatch):
    drawn, made = [], []
    draw, make = attention_distance.draw_distances, attention_distance.distance_model
    monkeypatch.setattr(attention_distance, "draw_distances", lambda found: drawn.append(found) or draw(found))
    monkeypatch.setattr(
        attention_distance, "distance_model", lambda *args, **options: made.append(make(*args, **options)) or made[0]
    )
    (places / "images" / "1.png").write_bytes((places / "images" / "1.png").read_bytes()[:60])
    assert main(["distance", "--weights=vit.npz", "--batch_size=2", "images"]) == 1
    output = capsys.readouterr()
    assert output.out == "distance.png\nAveraged over 2 images.\n"
    assert output.err.count("cannot read images/1.png") == 1
    assert "1 of 3 images could not be read" in output.err
    ((title, found),) = drawn[0].items()
    assert title == "ViT-Ti/4, vit.npz\nimages 8x12"
    (model,) = made
    pixels = [model.preprocessing(cv2.imread(f"images/{index}.png")[..., ::-1]) for index in (0, 2)]
    np.testing.assert_allclose(found, model(np.stack(pixels)).mean(axis=0), rtol=1e-5)
    assert size_of("distance.png")[0] > 100


def test_rollout_writes_as_many_pictures_as_the_images_need(places, capsys, monkeypatch):
    drawn = []
    draw = rollout.draw_rollouts
    monkeypatch.setattr(rollout, "draw_rollouts", lambda *parts: drawn.append(parts) or draw(*parts))
    assert main(["rollout", "--weights=headless.npz", "images", "--per_picture=2", "--output=new/r.png"]) == 0
    assert capsys.readouterr().out == "new/r.png\nnew/r_2.png\n"
    assert [names for *_, names in drawn] == [["0.png", "1.png"], ["2.png"]]
    assert size_of("new/r.png")[0] > size_of("new/r_2.png")[0]
    (first, second), _, _ = drawn[0]
    assert first.shape == (112, 224, 3)
    assert second.shape == (224, 90, 3)


def test_some_of_many_images_are_spread_evenly(places, monkeypatch):
    drawn = []
    monkeypatch.setattr(rollout, "write_picture", lambda *_: None)
    monkeypatch.setattr(rollout, "rollout_model", lambda weights, **_: Masks())
    draw = rollout.draw_rollouts
    monkeypatch.setattr(rollout, "draw_rollouts", lambda *parts: drawn.extend(parts[2]) or draw(*parts))
    for index in range(10):
        cv2.imwrite(f"images/{index}.png", make_pixels(8, 8))
    assert main(["rollout", "--weights=vit.npz", "images", "--max_images=3"]) == 0
    assert drawn == ["0.png", "3.png", "6.png"]


def test_an_image_that_vanishes_meanwhile_is_an_error(places, monkeypatch, capsys):
    class Vanishing(Masks):
        def __call__(self, images):
            (places / "images" / "0.png").unlink(missing_ok=True)
            return super().__call__(images)

    monkeypatch.setattr(rollout, "rollout_model", lambda weights, **_: Vanishing())
    assert main(["rollout", "--weights=vit.npz", "images"]) == 1
    assert "cannot read images/0.png any more" in capsys.readouterr().err
    assert not (places / "rollout.png").exists()


class Masks:
    """Stands for a compiled model."""

    preprocessing, batch_size = make_weights().preprocessing, 2

    def __call__(self, images):
        return np.ones((len(images), 2, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("filters --weights=resnet.npz", "is a ResNet, which has no patch embedding"),
        ("positions --weights=resnet.npz", "is a ResNet, which has no position embeddings"),
        ("distance --weights=resnet.npz images", "is a ResNet, which has no attention weights"),
        ("rollout --weights=resnet.npz images", "is a ResNet, which has no attention weights"),
        ("rollout --weights=axial.npz images", "attends within rows and columns"),
        ("positions --weights=none.npz", "has no position embeddings"),
        ("positions --weights=vit.npz --weights=vit_b61_i21k", "Did you mean"),
        ("rollout --weights=vit.npz images/7.png", "no file or folder matches 'images/7.png'"),
        ("rollout --weights=vit.npz images/broken.png", "none of the images can be read"),
        ("rollout --weights=vit.npz images --image_size=9", "9x9 is not divisible by the patch size 4"),
        ("rollout --weights=vit.npz images --image_size=8x", "or HEIGHTxWIDTH such as 224x336, got '8x'"),
        ("rollout --weights=vit.npz images --image_size=99999", "at least 1 and at most 16,384"),
        ("rollout --weights=vit.npz images --image_size=1024x2048", "Use a smaller image size"),
        ("rollout --weights=relative.npz images --image_size=16", "relative embeddings of offsets in raster order"),
        ("rollout --weights=vit.npz images --batch_size=0", "--batch_size must be at least 1, got 0"),
        ("rollout --weights=vit.npz images --per_picture=0", "--per_picture must be at least 1, got 0"),
        ("distance --weights=vit.npz images --max_images=-1", "--max_images must be at least 1, got -1"),
        ("filters --weights=vit.npz --components=0", "--components must be at least 1, got 0"),
        ("filters --weights=vit.npz --model=ViT-B/16", "not ViT-B/16"),
        ("filters --weights=vit.npz --output=picture.jpg", "must be the path of a PNG file"),
        ("filters --weights=vit.npz --output=folder.png", "must be the path of a PNG file"),
        ("filters --weights=vit.npz --components=1 --output=vit.npz/f.png", "vit.npz"),
    ],
)
def test_each_mistake_is_one_message_and_writes_nothing(places, capsys, monkeypatch, arguments, message):
    (places / "folder.png").mkdir()
    (places / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    if "broken" in arguments:
        monkeypatch.setattr(rollout, "rollout_model", lambda weights, **_: Masks())
    before = sorted(places.rglob("*"))
    assert main(arguments.split()) == 1
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("error: ") == 1
    assert not output.out
    assert sorted(places.rglob("*")) == before


def test_another_subcommand_is_one_entry(places, monkeypatch, capsys):
    def run(args):
        print(json.dumps(vars(args)))
        return 3

    picture = Picture("another picture", lambda parser: parser.add_argument("--color"), run)
    monkeypatch.setitem(PICTURES, "another", picture)
    assert main(["another", "--color=red"]) == 3
    assert json.loads(capsys.readouterr().out) == {"picture": "another", "color": "red", "output": "another.png"}
