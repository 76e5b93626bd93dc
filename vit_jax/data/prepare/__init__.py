"""Prepares archives, folders and lists of images as data sets that TFDS reads without TensorFlow.

`python -m vit_jax.data.prepare --help` lists the commands; each has a module that also works from Python.
"""
