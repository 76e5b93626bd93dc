"""The evaluators that `config.evals` lists. `registry` has their types and fields, `evaluator_type` the interface."""
