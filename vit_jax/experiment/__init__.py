"""Builds the parts of a run from its config. No other package reads a config."""
