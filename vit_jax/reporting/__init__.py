"""What runs left behind, as tables and pictures beside the paper's. `vit_jax.report` is the command.

names.py     data sets and models by the paper's names
origins.py   what parameters were trained on before
records.py   finds runs, evaluations and sweeps below folders, and reads them
scores.py    runs of one setting together: mean and standard deviation
layout.py    a table, as markdown and as CSV
tables.py    the paper's tables 2, 5, 6, 8 and 9, and those of all that was found
figures.py   the paper's figures 3, 4 and 5
"""
