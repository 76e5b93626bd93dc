"""Published numbers as data, each with its source, so that a run can be set beside them."""
