"""What data and losses agree on about labels. Needs nothing."""

NO_LABEL = -1
"""Stands where an image has no label; such images are left out of losses and accuracies."""
