"""Runs `vit_jax.analysis.mistakes`: the name of this command in earlier versions."""

import runpy

runpy.run_module("vit_jax.analysis.mistakes", run_name="__main__", alter_sys=True)
