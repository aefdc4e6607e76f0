"""Results of ``svftool info`` as a document and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from svftool.errors import counted
from svftool.files.names import EXACT_KEY, TUNED_KEY
from svftool.report import json
from svftool.report.names import Names
from svftool.report.table import NameTable
from svftool.report.text import safe, shape, size
from svftool.stages.info import Info

MOST_ROWS = 40
_TRAINING = ("regime", "seed", "metrics", "learning_rates", "steps", "trainable_parameters")
"""What a person wants to know first of a fine-tune."""
_LONGEST = 160
_CONFIG = (
    "model_type", "architecture", "architectures", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "vocab_size", "num_classes", "num_labels",
)  # fmt: skip


def document(found: Info) -> dict[str, Any]:
    """Return the result for scripts."""
    contents = found.contents
    return json.document(
        "info",
        path=found.path,
        kind=found.kind,
        format=contents.format,
        storage=found.storage,
        files=[
            {"name": name, "bytes": count, "sha256": found.digests.get(name)}
            for name, count in contents.files.items()
        ],
        tensors=[
            {
                "name": one.name,
                "dtype": one.dtype,
                "shape": list(one.shape),
                "bytes": one.nbytes,
                "file": one.file,
            }
            for one in contents.tensors
        ],
        parameters=found.parameters,
        bytes=sum(one.nbytes for one in contents.tensors),
        tied=[{"name": name, "stored_as": same} for name, same in found.tied],
        metadata=contents.metadata,
        config=contents.config,
        facts=found.facts,
        notes=contents.notes,
        problems=contents.problems,
    )


def view(found: Info, *, all_rows: bool = False) -> RenderableType:
    """Return the result for people: what it is, then its tensors."""
    tensors = found.contents.tensors
    few = tensors[: MOST_ROWS // 2] if found.kind == "checkpoint" else []
    shown = tensors if all_rows or (few and len(tensors) <= MOST_ROWS) else few
    parts: list[RenderableType] = [_headline(found), _facts(found)]
    if shown:
        parts += ["", _table(shown)]
    if len(shown) < len(tensors):
        more = f"and {len(tensors) - len(shown)} more tensors; " if shown else ""
        parts += ["", Text(f"{more}--all shows every tensor", "dim")]
    for problem in found.contents.problems:
        parts += ["", Text.assemble(("does not hold together: ", "bold red"), safe(problem))]
    return Group(*parts)


def _headline(found: Info) -> Text:
    contents = found.contents
    total = sum(one.nbytes for one in contents.tensors)
    files = counted(len(contents.files), "files")
    text = Text.assemble((safe(found.path), "bold"), ": ", (found.kind, "bold"))
    text.append(f" ({contents.format}, {files}), {counted(len(contents.tensors), 'tensors')}, ")
    text.append(f"{found.parameters:,} parameters, {size(total)}")
    return text


def _facts(found: Info) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _lines(found):
        table.add_row(key, Text(safe(value)))
    return table


def _lines(found: Info) -> Iterator[tuple[str, str]]:
    contents = found.contents
    kinds = Counter(one.dtype for one in contents.tensors)
    yield "stored as", ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
    if found.storage:
        yield "quantised", found.storage
    if found.tied:
        yield "tied", ", ".join(f"{name} = {same}" for name, same in found.tied)
    for key, value in found.facts.items():
        yield from _fact(key, value)
    if contents.config:
        known = {key: contents.config[key] for key in _CONFIG if key in contents.config}
        yield "config", _brief(known) if known else counted(len(contents.config), "settings")
    stated = {
        key: value for key, value in contents.metadata.items() if key not in (TUNED_KEY, EXACT_KEY)
    }
    if stated:
        yield "metadata", _brief(stated)
    for name, digest in found.digests.items():
        yield "sha256", f"{digest}  {name}"
    for note in contents.notes:
        yield "note", note


def _fact(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Write one fact; a training summary has a line for each of its parts."""
    if value in (None, [], {}, ""):
        return
    if key == "training" and isinstance(value, Mapping):
        for name in (*_TRAINING, *(one for one in value if one not in _TRAINING)):
            yield from _fact(str(name), value.get(name))
    elif key == "metrics" and isinstance(value, Mapping):
        yield "scores", _scores(value)
    elif key == "support" and isinstance(value, Mapping):
        yield "trained on", f"{_brief(value.get('examples'))} examples"
    elif key.endswith("fingerprint"):
        yield key.replace("_", " "), str(value)[:12]
    else:
        yield key.replace("_", " "), _brief(value)


def _scores(metrics: Mapping[str, Any]) -> str:
    """Write each metric before and after training."""
    before, after = (
        part if isinstance(part, Mapping) else {}
        for part in (metrics.get("before"), metrics.get("after"))
    )
    return ", ".join(f"{k} {_brief(before.get(k, '?'))} → {_brief(after[k])}" for k in after)


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {_brief(one)}" for key, one in value.items() if one is not None)
    elif isinstance(value, list | tuple):
        text = ", ".join(map(_brief, value))
    elif isinstance(value, float):
        text = f"{value:.4g}"
    else:
        text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _table(tensors: list[Any]) -> NameTable:
    table = NameTable(Names(one.name for one in tensors), title="tensor")
    table.column("dtype")
    for title in ("shape", "bytes"):
        table.column(title, right=True)
    for one in tensors:
        table.row(one.name, (one.dtype, shape(one.shape), size(one.nbytes)))
    return table
