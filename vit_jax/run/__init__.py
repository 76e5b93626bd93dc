"""The files of one run: its workdir, metrics, accounting, profile, curves and summary."""
