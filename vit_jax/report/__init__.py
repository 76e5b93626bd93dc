"""What runs left behind, as tables and pictures beside the paper's. `vit_jax.report` is the command.

names.py         data sets and models by the paper's names
settings.py      which settings can change which numbers
files.py         the files of runs, read without trust
origins.py       what parameters were trained on before
measured.py      the numbers among metrics
purposes.py      what a run is for: to choose, or to count
record.py        what was measured of parameters
records.py       finds runs, evaluations and sweeps below folders, and reads them
scores.py        runs of one setting together: mean and standard deviation; which setting stands in a table
models.py        pre-trained models with what was reached on the paper's tasks
layout.py        a table, as markdown and as CSV
paper_tables.py  the paper's tables 2, 5, 6, 7, 8 and 9, and that of released checkpoints
tables.py        all that was found, a line each
figures.py       the paper's figures 3, 4 and 5
"""
