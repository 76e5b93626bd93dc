import fnmatch

import jax
import jax.numpy as jnp
import pytest

from tests.models.tiny import param_shapes
from vit_jax.errors import UserError
from vit_jax.models import create_model, list_models
from vit_jax.models.axial import AxialVisionTransformer
from vit_jax.models.axial_resnet import AxialResNet
from vit_jax.models.resnet import BitResNet
from vit_jax.models.vit import VisionTransformer

SIZES = ("Ti", "S", "b", "B", "L", "H")
HYBRIDS = ("R50+ViT-B/16", "R50+ViT-B/32", "R50+ViT-L/16", "R50+ViT-L/32", "R+Ti/16", "R26+S/32", "R50+L/32")
NAMES = [
    *(f"ViT-{size}/{patch_size}" for size in SIZES for patch_size in (8, 14, 16, 32)),
    *HYBRIDS,
    *(f"R{depth}x{width}" for depth in (26, 50, 101, 152, 200) for width in (1, 2, 3, 4)),
    *("Axial-ViT-B/16", "Axial-ViT-B/32", "AxialResNet-50"),
]


def make(name, **overrides):
    return create_model(name, num_classes=5, **overrides)


def shape_of(model):
    """Layers, width, width of the MLP, heads."""
    return model.num_layers, model.hidden_dim, model.mlp_dim, model.num_heads


def test_list_has_every_model_once():
    assert sorted(list_models()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_listed_name_makes_a_model_with_so_many_classes(name):
    model = create_model(name, num_classes=7, head_bias=-10.0)
    assert model.num_classes == 7
    assert model.head_bias == -10.0


@pytest.mark.parametrize("pattern", ["ViT-L/*", "*+*", "R50*", "*x4", "Axial*", "ViT-[bB]/16", "ViT-B/16"])
def test_list_matches_patterns(pattern):
    found = list_models(pattern)
    assert found
    assert sorted(found) == sorted(name for name in NAMES if fnmatch.fnmatchcase(name, pattern))


def test_list_of_a_pattern_that_nothing_matches_is_empty():
    assert list_models("vit-*") == []


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("Ti", (12, 192, 768, 3)),
        ("S", (12, 384, 1536, 6)),
        ("B", (12, 768, 3072, 12)),
        ("L", (24, 1024, 4096, 16)),
        ("H", (32, 1280, 5120, 16)),
    ],
)
def test_sizes_match_table_1_and_augreg(size, expected):
    assert shape_of(make(f"ViT-{size}/16")) == expected
    if size == "B":
        assert shape_of(make("Axial-ViT-B/16")) == expected


def test_vit_b_in_lower_case_is_b_with_hidden_dimensions_halved():
    half, whole = make("ViT-b/32"), make("ViT-B/32")
    assert (2 * half.hidden_dim, 2 * half.mlp_dim, half.num_layers) == (
        whole.hidden_dim,
        whole.mlp_dim,
        whole.num_layers,
    )


@pytest.mark.parametrize(
    ("name", "patch_size"), [("ViT-B/16", 16), ("ViT-Ti/8", 8), ("ViT-S/4", 4), ("ViT-H/14", 14), ("ViT-L/100", 100)]
)
def test_number_in_the_name_of_a_vit_is_its_patch_size(name, patch_size):
    model = make(name)
    assert isinstance(model, VisionTransformer)
    assert model.resnet is None
    assert model.patch_size == model.pixels_per_token == patch_size


@pytest.mark.parametrize(
    ("name", "size", "stages", "side"),
    [
        ("R50+ViT-B/16", "B", (3, 4, 9), 14),
        ("R50+ViT-B/32", "B", (3, 4, 6, 3), 7),
        ("R50+ViT-L/16", "L", (3, 4, 9), 14),
        ("R50+ViT-L/32", "L", (3, 4, 6, 3), 7),
        ("R50+L/32", "L", (3, 4, 6, 3), 7),
        ("R26+S/32", "S", (2, 2, 2, 2), 7),
        ("R+Ti/16", "Ti", (), 7),
    ],
)
def test_hybrids_are_resnets_under_a_vit(name, size, stages, side):
    model = make(name)
    assert shape_of(model) == shape_of(make(f"ViT-{size}/16"))
    assert model.grid(224, 224) == (side, side)

    model = model.clone(num_layers=1)
    images = jnp.zeros((1, 224, 224, 3))
    (_, out), variables = jax.eval_shape(lambda key: model.init_with_output(key, images), jax.random.key(0))
    assert out["patch_embeddings"].shape == (1, side, side, model.hidden_dim)
    assert out["encoded"].shape == (1, 1 + side * side, model.hidden_dim)
    blocks = {name: len(units) for name, units in variables["params"].items() if name.startswith("block")}
    assert blocks == {f"block{number}": units for number, units in enumerate(stages, start=1)}


def test_hybrids_cut_single_positions_but_for_r_ti_which_has_no_stages():
    kernels = {name: param_shapes(make(name, num_layers=1), 224, 224)["embedding"]["kernel"].shape for name in HYBRIDS}
    assert kernels == {
        "R50+ViT-B/16": (1, 1, 1024, 768),
        "R50+ViT-B/32": (1, 1, 2048, 768),
        "R50+ViT-L/16": (1, 1, 1024, 1024),
        "R50+ViT-L/32": (1, 1, 2048, 1024),
        "R50+L/32": (1, 1, 2048, 1024),
        "R26+S/32": (1, 1, 2048, 384),
        "R+Ti/16": (8, 8, 64, 192),
    }


@pytest.mark.parametrize(
    ("depth", "stages"),
    [(26, (2, 2, 2, 2)), (50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)), (152, (3, 8, 36, 3)), (200, (3, 24, 36, 3))],
)
def test_depth_in_the_name_of_a_resnet_counts_its_convolutions_and_head(depth, stages):
    model = make(f"R{depth}x2")
    assert isinstance(model, BitResNet)
    assert (model.stages, model.width_factor) == (stages, 2)
    assert depth == 3 * sum(stages) + 2


def test_resnets_take_any_width_factor():
    assert make("R50x5").width_factor == 5
    assert make("R152x12").width_factor == 12


def test_axial_models_match_their_names():
    assert isinstance(make("Axial-ViT-B/32"), AxialVisionTransformer)
    assert make("Axial-ViT-B/32").patch_size == 32
    assert make("Axial-ViT-S/8").hidden_dim == 384
    resnet = make("AxialResNet-50")
    assert isinstance(resnet, AxialResNet)
    assert (resnet.stages, resnet.width_factor) == ((3, 4, 6, 3), 1)


def test_attributes_override_those_of_the_name():
    model = make("ViT-B/16", num_layers=3, patch_size=7, pool="gap")
    assert (model.num_layers, model.patch_size, model.pool, model.hidden_dim) == (3, 7, "gap", 768)
    assert make("R50x1", stages=(1, 2)).stages == (1, 2)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ViT-B16", "ViT-B/16"),
        ("ViT-B_16", "ViT-B/16"),
        ("vit-l/16", "ViT-L/16"),
        ("vit-b/16", "ViT-b/16"),
        ("VIT-B/16", "ViT-B/16"),
        ("ViT-TI/16", "ViT-Ti/16"),
        ("r50x1", "R50x1"),
        ("R51x1", "R50x1"),
        ("R50+ViT-B16", "R50+ViT-B/16"),
        ("R50+ViT-B/36", "R50+ViT-B/32"),
        ("r26+s/32", "R26+S/32"),
        ("axial-vit-b/16", "Axial-ViT-B/16"),
        ("AxialResNet50", "AxialResNet-50"),
        ("AxialResNet-51", "AxialResNet-50"),
    ],
)
def test_unknown_model_is_refused_with_the_nearest_name(name, nearest):
    with pytest.raises(UserError, match="unknown model") as error:
        make(name)
    assert f"Did you mean '{nearest}'?" in str(error.value)


@pytest.mark.parametrize(
    "name", ["", "ViT-X/16", "ViT-B/0", "ViT-B/16 ", "ViT-B/-16", "B/16", "R77+ViT-B/16", "Axial-ViT-X/16", "R050x1"]
)
def test_names_that_only_resemble_others_are_not_models(name):
    with pytest.raises(UserError, match="unknown model"):
        make(name)


def test_error_of_an_unknown_model_shows_some_names_and_not_all():
    with pytest.raises(UserError) as error:
        make("ViT-B16")
    assert f"and {len(NAMES) - 10} more" in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("ViT-B/16", {"droput_rate": 0.1}, "unknown attribute of model 'ViT-B/16': 'droput_rate'. .* 'dropout_rate'"),
        ("ViT-B/16", {"posembed": "none"}, "Did you mean 'position_embedding'"),
        ("R50+ViT-B/16", {"resnets": (3,)}, "Did you mean 'resnet'"),
        ("R50x1", {"width": 2}, "Did you mean 'width_factor'"),
        ("AxialResNet-50", {"headbias": 2}, "Did you mean 'head_bias'"),
        ("Axial-ViT-B/16", {"Patch_Size": 2}, "Did you mean 'patch_size'"),
        ("ViT-B/16", {"parent": None}, "unknown attribute"),
    ],
)
def test_unknown_attribute_is_refused_with_the_nearest(name, overrides, message):
    with pytest.raises(UserError, match=message):
        make(name, **overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pool": "cls_token"}, "unknown pool 'cls_token'. Did you mean 'cls'"),
        ({"position_embedding": "sincos"}, "Did you mean 'sincos_2d'"),
        ({"position_embedding_at": "share"}, "Did you mean 'shared'"),
        ({"gelu": "exakt"}, "unknown gelu 'exakt'. Did you mean 'exact'"),
        ({"attention": "cuddn"}, "unknown attention 'cuddn'. Did you mean 'cudnn'"),
        ({"remat": "ful"}, "unknown remat 'ful'. Did you mean 'full'"),
        ({"num_heads": 7}, "hidden_dim 768 is not divisible by num_heads 7"),
    ],
)
def test_invalid_attribute_values_are_refused_with_the_nearest(overrides, message):
    with pytest.raises(UserError, match=message):
        make("ViT-B/16", **overrides)
