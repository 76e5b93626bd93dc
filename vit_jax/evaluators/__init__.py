"""Evaluators: `run(state)` yields `(metric name, value)`. The training loop knows nothing else of them."""
