"""A model's mistakes, and its input images."""
