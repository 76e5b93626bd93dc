"""Tables and figures of runs beside the paper's. `python -m vit_jax.report` is the command.

`collect` reads folders into a `measured.MeasuredModel` for each set of parameters. `seeds` groups those that differ
only in the seed, `pretrained` groups these by what was pre-trained. `paper_tables`, `figures` and `listings` show them.
"""
