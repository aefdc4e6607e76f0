"""What the texts of options mean: ranks, regimes, metrics, models, sizes.

Nothing here imports torch, so that a wrong text is refused at once.
"""
