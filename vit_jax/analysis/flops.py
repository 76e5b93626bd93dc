"""Runs `vit_jax.costs.flops`: the name of this command in earlier versions."""

import runpy

runpy.run_module("vit_jax.costs.flops", run_name="__main__", alter_sys=True)
