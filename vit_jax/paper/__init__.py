"""Published numbers as data, each with its source, for comparison with runs."""
