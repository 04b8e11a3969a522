"""What a checkpoint can still represent, hold and learn: estimators, no suite, no command.

Estimators stream where they can: they are fed batches and keep sums, so that memory does not grow with the number of
samples. Figures are made in float64. Formulas, sources and biases stand in docs/capacity-figures.md.
"""
