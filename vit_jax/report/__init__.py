"""Tables and figures of runs beside the paper's. `python -m vit_jax.report` is the command.

names.py         data sets and models by the paper's names
settings.py      which settings can change which numbers
lineage.py       all the training behind parameters
purposes.py      whether a run's numbers are results, or only choose
measured.py      models with their measured numbers
collect.py       finds runs, evaluations and sweeps below folders, and reads them
seeds.py         mean and standard deviation of models with one setting
recipes.py       how the paper fine-tuned; which of several settings a table shows
pretrained.py    pre-trained models with their results on the paper's tasks
markdown.py      tables as markdown and CSV
paper_tables.py  the paper's tables 2, 5, 6, 7, 8 and 9, and that of released checkpoints
listings.py      lists of all settings and of all runs
figures.py       the paper's figures 3, 4 and 5
"""
