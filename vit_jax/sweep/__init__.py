"""Runs of one config with several values: choosing on a validation part, then final runs over seeds.

`python -m vit_jax.sweep` is the command. `Sweep` is what a config file describes.
"""

from vit_jax.sweep.spec import Sweep as Sweep
