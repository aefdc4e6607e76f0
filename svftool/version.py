"""The version of svftool."""

__version__ = "0.1.0"
