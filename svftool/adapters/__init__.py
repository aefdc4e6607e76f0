"""Low-rank files of other tools, read as changes of a checkpoint's tensors."""
