"""Runs `vit_jax.data.vtab`: the name of this command in earlier versions."""

import runpy

runpy.run_module("vit_jax.data.vtab", run_name="__main__", alter_sys=True)
