"""Kinds of data behind one small protocol: what is trained on, its loss and its metrics.

The protocol is `svftool.tasks.base`; the options of every task are in `svftool.tasks.options`.
"""
