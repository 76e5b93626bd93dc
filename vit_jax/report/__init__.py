"""What runs left behind, as tables and pictures beside the paper's. `python -m vit_jax.report` is the command.

names.py         data sets and models by the paper's names
settings.py      which settings can change which numbers
lineage.py       what parameters were trained on before
purposes.py      whether a run's numbers are results, or only choose
measured.py      models with what was measured of them
collect.py       finds runs, evaluations and sweeps below folders, and reads them
seeds.py         models of one setting together: mean and standard deviation
recipes.py       how the paper fine-tuned; which of several settings stands in a table
pretrained.py    pre-trained models with what was reached on the paper's tasks
markdown.py      a table, as markdown and as CSV
paper_tables.py  the paper's tables 2, 5, 6, 7, 8 and 9, and that of released checkpoints
listings.py      all that was found, a line each
figures.py       the paper's figures 3, 4 and 5
"""
