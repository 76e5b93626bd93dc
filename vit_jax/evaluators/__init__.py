"""Evaluators: what `config.evals` lists. `registry` has their types and fields, `evaluator_type` what a type is."""
