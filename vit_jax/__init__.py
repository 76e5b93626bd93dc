"""vit_jax: "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021) in JAX and Flax."""

__version__ = "0.1.0"
