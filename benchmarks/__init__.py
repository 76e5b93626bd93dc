"""Programs that measure speed, exactness and memory."""
