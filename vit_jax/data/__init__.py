"""Data: sources of labelled images, what is done to each image, and the pipeline that makes batches of them."""
