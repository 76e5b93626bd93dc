"""The paper's pictures of a model."""

from tests.mutations.mutation import Mutation

MODEL, ROLLOUT = "vit_jax/analysis/attention_model.py", "vit_jax/analysis/rollout.py"
DISTANCE, SIMILARITY = "vit_jax/analysis/attention_distance.py", "vit_jax/analysis/position_similarity.py"
FILTERS, FLAGS = "vit_jax/analysis/filters.py", "vit_jax/analysis/picture_flags.py"
TEST_ROLLOUT, TEST_PICTURES = "tests/analysis/test_rollout.py", "tests/analysis/test_pictures.py"
TEST_DISTANCE, TEST_SIMILARITY = (
    "tests/analysis/test_attention_distance.py",
    "tests/analysis/test_position_similarity.py",
)
TEST_FILTERS = "tests/analysis/test_filters.py"

MUTATIONS = [
    Mutation(
        ROLLOUT,
        "jnp.matmul(weights, product,",
        "jnp.matmul(product, weights,",
        f"{TEST_ROLLOUT}::test_agrees_with_a_loop_in_numpy",
        "later layers multiply from the left",
    ),
    Mutation(
        ROLLOUT,
        " + jnp.eye(of_layer.shape[-1])",
        "",
        f"{TEST_ROLLOUT}::test_agrees_with_a_loop_in_numpy",
        "the identity stands for the residual connection",
    ),
    Mutation(
        ROLLOUT,
        "shares[:, model.num_prefix_tokens :]",
        "shares[:, : model.grid[0] * model.grid[1]]",
        f"{TEST_ROLLOUT}::test_mask_of_each_kind_of_representation",
        "the mask leaves out the class token, which is first",
    ),
    Mutation(
        ROLLOUT,
        "sigmaX=width / columns, sigmaY=height / rows",
        "sigmaX=width, sigmaY=height",
        f"{TEST_ROLLOUT}::test_overlay_darkens_where_the_mask_is_small",
        "the mask is blurred by a patch",
    ),
    Mutation(
        MODEL,
        "jnp.full((batch, num_tokens), 1 / num_tokens)",
        "jnp.zeros((batch, num_tokens)).at[:, 0].set(1.0)",
        f"{TEST_ROLLOUT}::test_mask_of_each_kind_of_representation",
        "without class token all tokens count",
    ),
    Mutation(
        MODEL,
        ")[: len(batch)])",
        "))",
        f"{TEST_ROLLOUT}::test_mask_of_each_kind_of_representation",
        "padding of a batch is no image",
    ),
    Mutation(
        DISTANCE,
        "attention[..., num_prefix_tokens:, num_prefix_tokens:]",
        "attention[..., num_prefix_tokens:, : attention.shape[-1] - num_prefix_tokens]",
        f"{TEST_DISTANCE}::test_agrees_with_brute_force",
        "the class token is left out as a key",
    ),
    Mutation(
        DISTANCE,
        "(model.grid, model.pixels_per_token,",
        "(model.grid, model.weights.spec.create().patch_size,",
        f"{TEST_DISTANCE}::test_a_hybrids_tokens_are_as_wide_as_the_resnet_makes_them",
        "distances of hybrids are in pixels",
    ),
    Mutation(
        SIMILARITY,
        "[zero - offsets]",
        "[zero + offsets]",
        f"{TEST_SIMILARITY}::test_relative_embeddings_are_compared_with_that_of_offset_0",
        "tables of offsets begin with the largest",
    ),
    Mutation(
        SIMILARITY,
        "similarity.transpose(0, 2, 1, 3)",
        "similarity.transpose(2, 0, 3, 1)",
        f"{TEST_SIMILARITY}::test_the_tile_of_a_patch_is_at_its_row_and_column",
        "the tile of a patch is at its place",
    ),
    Mutation(
        SIMILARITY,
        "key=lambda title: int(title[6:] or 0)",
        "key=str",
        f"{TEST_SIMILARITY}::test_each_layers_own_embeddings_in_the_order_of_the_layers",
        "layer 10 comes after layer 2",
    ),
    Mutation(
        FILTERS,
        "samples = samples - samples.mean(axis=0)",
        "samples = samples - samples.mean()",
        f"{TEST_FILTERS}::test_components_are_scikit_learns_and_the_largest_value_of_each_is_positive",
        "principal components are about the mean filter",
    ),
    Mutation(
        FLAGS,
        "return 1 if count else 0",
        "return 0",
        f"{TEST_PICTURES}::test_distance_averages_over_all_images_that_can_be_read",
        "an image that cannot be read shows in the exit status",
    ),
    Mutation(
        FLAGS,
        "if not num_read:",
        "if num_read is None:",
        f"{TEST_PICTURES}::test_each_mistake_is_one_message_and_writes_nothing",
        "without images there is no picture",
    ),
]
