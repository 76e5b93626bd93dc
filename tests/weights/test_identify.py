import contextlib
import re

import pytest

from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.position_embeddings import KINDS, PLACES
from vit_jax.weights import ModelSpec
from vit_jax.weights.identify import check_shapes, expected_shapes, identify

TINY = {"num_layers": 2, "hidden_dim": 16, "mlp_dim": 32, "num_heads": 2}
POSITIONS = "Transformer/posembed_input/pos_embedding"


def shapes_of(name="ViT-Ti/4", num_classes=5, image_size=(16, 16), **overrides):
    return expected_shapes(ModelSpec(name, num_classes, overrides, image_size), image_size)


def tiny(**overrides):
    return shapes_of(**(TINY | overrides))


def refuses(shapes, *expected, **options):
    with pytest.raises(UserError) as caught:
        spec = identify(shapes, **options)
        check_shapes(shapes, expected_shapes(spec, spec.image_size or (224, 224)))
    for text in expected:
        assert re.search(text, str(caught.value)), f"{text!r} is not in: {caught.value}"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("ViT-Ti/16", 224),
        ("ViT-S/32", 384),
        ("ViT-b/8", 64),
        ("ViT-B/16", 384),
        ("ViT-L/32", 224),
        ("ViT-H/14", 224),
        ("R50+ViT-B/16", 384),
        ("R50+ViT-B/32", 224),
        ("R+Ti/16", 224),
        ("R26+S/32", 384),
        ("Axial-ViT-B/16", 224),
    ],
)
def test_a_model_is_identified_by_its_names_and_shapes(name, size):
    spec = identify(shapes_of(name, 10, (size, size)))
    assert (spec.name, spec.num_classes, spec.overrides, spec.image_size) == (name, 10, {}, (size, size))


@pytest.mark.parametrize("name", ["R26x1", "R50x3", "R101x1"])
def test_a_bit_resnet_is_identified_but_not_its_image_size(name):
    assert identify(shapes_of(name, 10, (224, 224))) == ModelSpec(name, 10)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("AxialResNet-50", {}), ("AxialResNet-26", {}), ("AxialResNet-50", {"stages": (1, 2), "width_factor": 2})],
)
def test_an_axial_resnet_is_identified_with_its_image_size(name, overrides):
    spec = identify(shapes_of(name, 10, (64, 96), **overrides))
    assert spec == ModelSpec(name, 10, overrides, (64, 96))


def test_an_axial_resnet_whose_root_has_another_width_is_refused():
    shapes = shapes_of("AxialResNet-26", stages=(1,))
    refuses(shapes | {"conv_root/kernel": (7, 7, 3, 65)}, "root is 65 wide; it must be a multiple of 64")


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"num_layers": 1, "patch_size": 8},
        {"pool": "gap"},
        {"pool": "map"},
        {"pre_logits": True},
        {"num_classes": 0},
        {"num_classes": 0, "pre_logits": True},
        {"name": "R50+ViT-B/16", "resnet": (1, 2), "image_size": (32, 32)},
        {"name": "R50+ViT-B/16", "resnet": (), "patch_size": 4, "image_size": (32, 32)},
    ],
)
def test_a_model_of_other_dimensions_is_identified_by_its_names_and_shapes(attributes):
    attributes = {"name": "ViT-Ti/4", "num_classes": 5, **TINY, **attributes}
    size = attributes.pop("image_size", (16, 16))
    found = identify(shapes_of(image_size=size, **attributes))
    assert found.create() == create_model(**attributes)
    assert found.image_size == size


@pytest.mark.parametrize("attributes", [{"stages": (1, 2)}, {"stages": (1,), "width_factor": 2}])
def test_a_bit_resnet_of_another_depth_is_identified_by_its_names_and_shapes(attributes):
    found = identify(shapes_of("R50x1", **attributes))
    assert found.create() == create_model("R50x1", num_classes=5, **attributes)


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_position_embeddings_are_identified_if_arrays_show_them(kind, at):
    found = identify(tiny(position_embedding=kind, position_embedding_at=at)).create()
    # Fixed ones have no arrays, and one that all layers share bears the name of the stem's.
    assert found.position_embedding == ("none" if kind == "sincos_2d" else kind)
    if kind in ("learned_1d", "learned_2d"):
        assert found.position_embedding_at == ("every_layer" if at == "every_layer" else "stem")
    elif kind == "relative":
        assert (found.position_embedding_at == "shared") == (at == "shared")


@pytest.mark.parametrize("kind", ["learned_1d", "learned_2d", "relative"])
@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_the_image_size_follows_from_the_position_embeddings(kind, pool):
    assert identify(tiny(position_embedding=kind, pool=pool, image_size=(24, 24))).image_size == (24, 24)


def test_learned_2d_positions_identify_an_image_that_is_not_square():
    assert identify(tiny(position_embedding="learned_2d", image_size=(8, 24))).image_size == (8, 24)


# --- 196 and 197 ---


def test_197_embeddings_with_a_class_token_are_a_square_grid():
    spec = identify(tiny(image_size=(56, 56)))
    assert tiny(image_size=(56, 56))[POSITIONS] == (1, 197, 16)
    assert spec.image_size == (56, 56)


def test_196_embeddings_without_a_class_token_are_the_same_grid():
    spec = identify(tiny(pool="gap", image_size=(56, 56)))
    assert tiny(pool="gap", image_size=(56, 56))[POSITIONS] == (1, 196, 16)
    assert spec.image_size == (56, 56)


@pytest.mark.parametrize(
    ("pool", "number", "hint"),
    [
        ("gap", 197, "197 position embeddings of a model without a class token .* with a class token it would be"),
        ("cls", 196, "196 position embeddings of a model with a class token .* without a class token it would be"),
        ("gap", 195, "195 position embeddings of a model without a class token leave 195 .* not a square"),
    ],
)
def test_a_number_of_embeddings_that_the_model_cannot_have_is_refused(pool, number, hint):
    refuses(tiny(pool=pool, image_size=(56, 56)) | {POSITIONS: (1, number, 16)}, hint)


def test_an_image_that_is_not_square_must_be_given_and_the_error_says_how():
    refuses(tiny(image_size=(8, 16)), "8 for the patches.*not a square", "image_size")


def test_an_image_that_is_not_square_can_be_given():
    assert identify(tiny(image_size=(8, 16)), image_size=(8, 16)).image_size == (8, 16)


def test_an_image_size_that_the_embeddings_contradict_is_refused_with_both_shapes():
    refuses(tiny(), rf"{POSITIONS}: \(1, 17, 16\).*\(1, 37, 16\)", image_size=(24, 24))


# --- What is none of ours ---


def test_shapes_of_another_kind_of_model_are_refused_with_the_first_names():
    refuses({"conv/kernel": (3, 3, 3, 8), "fc/kernel": (8, 2)}, "no model .* such arrays: conv/kernel, fc/kernel")


def test_a_layer_that_is_missing_in_the_middle_is_named():
    shapes = tiny(num_layers=4)
    whole = {name: shape for name, shape in shapes.items() if "encoderblock_1/" not in name}
    refuses(whole, "missing: Transformer/encoderblock_1/LayerNorm_0/bias")


def test_an_array_that_is_missing_in_a_layer_is_the_only_difference():
    shapes = tiny(num_layers=4)
    del shapes["Transformer/encoderblock_2/LayerNorm_0/scale"]
    refuses(shapes, "1 missing, 0 too many, 0 of another shape", "missing: .*encoderblock_2/LayerNorm_0/scale")


@pytest.mark.parametrize("part", ["head/kernel", "head/bias", "Transformer/encoder_norm/scale", "embedding/bias"])
def test_half_of_a_pair_is_named(part):
    shapes = tiny()
    del shapes[part]
    refuses(shapes, re.escape(part.rpartition("/")[0]))


def test_an_array_too_many_is_named():
    refuses(tiny() | {"head/extra": (3,)}, "0 missing, 1 too many", "not of this model: head/extra")


def test_a_transposed_array_is_named_with_both_shapes():
    name = "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"
    refuses(tiny() | {name: (32, 16)}, rf"{name}: \(32, 16\).*\(16, 32\)")


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0)])
def test_a_transposed_query_of_the_first_layer_is_named(order):
    name = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
    shapes = tiny(hidden_dim=24, num_heads=2)
    refuses(shapes | {name: tuple(shapes[name][axis] for axis in order)}, "MultiHeadDotProductAttention_1/query/kernel")


def test_only_the_first_of_many_differences_are_listed():
    shapes = tiny()
    with pytest.raises(UserError) as caught:
        check_shapes({name: (1, *shape) for name, shape in shapes.items()}, shapes)
    assert f"{len(shapes)} of another shape" in str(caught.value)
    assert f"{len(shapes) - 8} more shapes" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 10


def test_differences_have_the_files_own_names():
    with pytest.raises(UserError, match=r"missing: THEIR.b\n.*not of this model: THEIR.c\n.*THEIR.a: "):
        check_shapes({"a": (1,), "c": (1,)}, {"a": (2,), "b": (1,)}, lambda name: f"THEIR.{name}")


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"position_embedding": "learned_2d"},
        {"position_embedding": "relative"},
        {"name": "Axial-ViT-Ti/4"},
        {"name": "R26x1", "stages": (1,)},
        {"name": "AxialResNet-26", "stages": (1,)},
        {"name": "R50+ViT-B/16", "resnet": (1,), "image_size": (16, 16)},
    ],
)
def test_shapes_that_are_not_models_are_user_errors(attributes):
    shapes = shapes_of(**attributes) if "stages" in attributes else tiny(**attributes | {"num_layers": 1})
    telling = r"embedding|conv_root|conv3/kernel|query/bias|Dense_0/bias|qkv/kernel|head/kernel"
    for name in [name for name in shapes if re.search(telling, name)]:
        for shape in ((), (0,), None):
            broken = {**shapes, name: shape}
            if shape is None:
                del broken[name]
            with contextlib.suppress(UserError):  # a traceback of any other error fails the test
                spec = identify(broken)
                check_shapes(broken, expected_shapes(spec, spec.image_size or (224, 224)))


def test_a_spec_reads_like_a_sentence():
    spec = ModelSpec("ViT-B/16", 21_843, {"pre_logits": True}, (224, 384))
    assert str(spec) == "ViT-B/16, 21,843 classes, pre_logits=True, images 224x384"
    assert str(ModelSpec("R50x1", 0)) == "R50x1, no head"


def test_a_spec_makes_its_model_and_arguments_override():
    spec = ModelSpec("ViT-B/16", 10, {"pool": "gap"})
    assert spec.create() == create_model("ViT-B/16", num_classes=10, pool="gap")
    assert spec.create(num_classes=3, dtype="bfloat16").num_classes == 3
