"""Runs `vit_jax.analysis.show_data` as `python -m vit_jax.data.show`."""

import runpy

runpy.run_module("vit_jax.analysis.show_data", run_name="__main__", alter_sys=True)
