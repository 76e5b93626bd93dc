"""What one run writes: its workdir, metrics, accounting, profile, curves and summary."""
