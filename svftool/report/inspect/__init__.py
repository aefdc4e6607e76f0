"""Results of ``svftool inspect``: document, table, spreadsheet, page and figure."""

from __future__ import annotations

from svftool.report.inspect.document import csv_text, document
from svftool.report.inspect.terminal import Shown, view

__all__ = ["Shown", "csv_text", "document", "view"]
