"""Results of ``svftool finetune`` as a picture and a page: curves, and regimes side by side."""

from __future__ import annotations

from svftool.report.training.files import ReportFile

__all__ = ["ReportFile"]
