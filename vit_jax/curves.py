"""Runs `vit_jax.run.curves`: the name of this command in earlier versions."""

import runpy

runpy.run_module("vit_jax.run.curves", run_name="__main__", alter_sys=True)
