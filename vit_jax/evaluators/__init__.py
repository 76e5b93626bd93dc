"""Evaluators: what `config.evals` lists. `registry` has their types and fields, `base` what a type is."""
