"""The commands' work, one file each; stages meet only in files, never in memory."""
