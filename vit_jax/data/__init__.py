"""Data: sources of labelled images, transforms of each image, and the pipeline that makes batches."""
