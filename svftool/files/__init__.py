"""What files say of themselves, and where output goes: names and headers, never values.

Nothing here imports torch, so that a command can answer at once.
"""
