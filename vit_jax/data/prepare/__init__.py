"""Turns archives, folders and lists of images into data sets that TFDS reads without TensorFlow.

`python -m vit_jax.data.prepare --help` shows the commands; each of their modules works alone in Python too.
"""
