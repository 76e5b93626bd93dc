"""The label of images without a label, for data and losses. Needs no JAX."""

NO_LABEL = -1
