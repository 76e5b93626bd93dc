"""A model's mistakes, its input images, and the paper's pictures of it (`python -m vit_jax.analysis`)."""
