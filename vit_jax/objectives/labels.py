"""The value that stands for a missing label, in data and losses. Needs no JAX."""

NO_LABEL = -1
