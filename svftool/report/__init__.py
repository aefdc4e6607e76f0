"""Result dataclasses to tables, JSON, CSV, HTML and plots; the only place that formats."""
