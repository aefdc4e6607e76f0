"""A base + its fine-tune -> an exact delta, which makes the one from the other bit for bit."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from svftool.checkpoints import (
    Checkpoint,
    Fingerprint,
    SafetensorsWriter,
    TensorInfo,
    dtype_name,
    open_checkpoint,
    plain_name,
    replace_output,
    side_files,
    tensor_digest,
    write_errors,
)
from svftool.checkpoints.exact_file import ExactEntry, ExactFacts, in_order, words_of
from svftool.errors import CheckpointError, UsageError
from svftool.files.output import scratch_folder
from svftool.files.side_files import named
from svftool.numerics.words import Way, best_way, pack
from svftool.progress import SILENT, Progress
from svftool.stages.extract import Dropped


@dataclass(frozen=True)
class ExactTensor:
    """One tensor of the fine-tune.

    Attributes
    ----------
    name : str
    way : {"same", "xor", "difference", "whole"}
    bytes : int
        In the fine-tune.
    stored : int
        In the delta.
    """

    name: str
    way: str
    bytes: int
    stored: int


@dataclass(frozen=True)
class ExactResult:
    """What `extract_exact` did, or would do.

    Attributes
    ----------
    output : Path
    dry_run : bool
    tensors : tuple of ExactTensor
        Every tensor of the fine-tune, in its order.
    removed : tuple of str
        Tensors of the base that the fine-tune does not have.
    dropped : tuple of Dropped
        What the fine-tune holds beside its tensors and the delta does not.
    bytes : int
        Of the delta's tensors.
    tuned_bytes : int
        Of the fine-tune's tensors.
    base_fingerprint, tuned_fingerprint : str
    """

    output: Path
    dry_run: bool
    tensors: tuple[ExactTensor, ...]
    removed: tuple[str, ...]
    dropped: tuple[Dropped, ...]
    bytes: int
    tuned_bytes: int
    base_fingerprint: str
    tuned_fingerprint: str

    @property
    def ways(self) -> dict[str, int]:
        """How many tensors are stored in each way."""
        return dict(Counter(one.way for one in self.tensors))


def extract_exact(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    dry_run: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> ExactResult:
    """Write what turns a base into its fine-tune bit for bit.

    Words are stored as they are in the files, quantised codes among them: a tensor as the
    difference or the XOR to the base's of the same name, dtype and shape, whichever is smaller, and
    whole where there is none. A few tensors at a time are in memory.

    Parameters
    ----------
    base, tuned : path-like
        Checkpoints in safetensors or pickles.
    output : path-like
        The delta, a safetensors file.
    dry_run : bool
        Find the size; write nothing.
    force : bool
        Replace an existing output.
    progress : Progress

    Returns
    -------
    ExactResult

    Raises
    ------
    CheckpointError
        If a side cannot be read, is GGUF, or holds a tensor that has no words.
    UsageError
        If the output's name does not end in ``.safetensors``, or it exists.
    """
    target = Path(output)
    if target.suffix != ".safetensors":
        raise UsageError(
            f"{target}: an exact delta is a safetensors file, expected a name such as "
            f"{target.with_suffix('.safetensors')}"
        )
    with ExitStack() as stack:
        before = stack.enter_context(_opened(base))
        after = stack.enter_context(_opened(tuned))
        for side in (before, after):
            for warning in side.warnings:
                progress.warn(warning)
        work = _Work(before, after)
        work.check()
        if dry_run:
            work.run(None, progress)
            return work.result(target, dry_run=True)
        inputs = [Path(base), Path(tuned)]
        partial = stack.enter_context(replace_output(target, force=force, inputs=inputs))
        folder = stack.enter_context(scratch_folder(partial))
        spool = folder / "planes"
        work.run(spool, progress)
        work.write(partial, spool)
        if work.side_files:
            progress.warn(
                f"{tuned}: files beside the weights are not in the delta: {named(work.side_files)}"
            )
        return work.result(target, dry_run=False)


def _opened(path: str | os.PathLike[str]) -> Checkpoint:
    found = open_checkpoint(path, stored=True)
    if found.format == "gguf":
        found.close()
        raise CheckpointError(
            f"{path}: GGUF, whose blocks are read as numbers, expected safetensors or a pickle. "
            "Use --as svf or --as lora."
        )
    return found


@dataclass(frozen=True)
class _Packed:
    """One tensor on its way."""

    entry: ExactEntry
    data: bytes


@dataclass
class _Work:
    """The two sides, and what was found of them."""

    before: Checkpoint
    after: Checkpoint
    packed: list[tuple[ExactEntry, int]] = field(default_factory=list)
    base_lines: dict[str, tuple[str, tuple[int, ...], str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.origins = _origins(self.before.infos, self.after.infos)
        self.side_files = _other_side_files(self.before, self.after)

    def check(self) -> None:
        """Refuse tensors that have no words, before any work."""
        for info in self.after.infos.values():
            if info.layout != "dense":
                raise CheckpointError(
                    f"{self.after.path}: {info.name}: a {info.layout} tensor, expected a dense "
                    "one. Save it densely, or leave it out."
                )

    def run(self, spool: Path | None, progress: Progress) -> None:
        """Pack every tensor into a file, or only measure."""
        infos = self.after.infos
        total = sum(info.nbytes for info in infos.values())
        with ExitStack() as stack:
            task = stack.enter_context(progress.task("packing", total, unit="bytes"))
            file = None
            if spool is not None:
                stack.enter_context(write_errors(spool))
                file = stack.enter_context(spool.open("xb"))
            for one in in_order(infos, self._pack):
                if file is not None:
                    file.write(one.data)
                self.packed.append((one.entry, len(one.data)))
                task.advance(one.entry.nbytes, detail=one.entry.name)
        for name in self.removed:
            self._digest(name)

    def _digest(self, name: str) -> None:
        info = self.before.infos[name]
        sha = tensor_digest(self.before.read(name))
        self.base_lines[name] = (dtype_name(info.dtype), info.shape, sha)

    def _pack(self, name: str) -> _Packed:
        info, origin = self.after.infos[name], self.origins.get(name)
        new = self.after.read(name)
        sha, dtype = tensor_digest(new), dtype_name(info.dtype)
        if origin is None:
            data = pack(words_of(new), None, "whole")
            return _Packed(ExactEntry(name, dtype, info.shape, "whole", sha), data)
        old = self.before.read(origin)
        old_sha = tensor_digest(old)
        self.base_lines[origin] = (dtype, info.shape, old_sha)
        if old_sha == sha:
            return _Packed(ExactEntry(name, dtype, info.shape, "same", sha, origin, old_sha), b"")
        after, before = words_of(new), words_of(old)
        way: Way = best_way(after, before)
        entry = ExactEntry(name, dtype, info.shape, way, sha, origin, old_sha)
        return _Packed(entry, pack(after, before, way))

    @property
    def removed(self) -> tuple[str, ...]:
        """Tensors of the base that nothing is made from."""
        used = set(self.origins.values())
        return tuple(name for name in self.before.infos if name not in used)

    def facts(self) -> ExactFacts:
        """Return what the file will say of itself."""
        base, tuned = Fingerprint(), Fingerprint()
        for name, line in self.base_lines.items():
            base.add_digest(name, *line)
        for entry, _ in self.packed:
            tuned.add_digest(entry.name, entry.dtype, entry.shape, entry.sha256)
        shards = [shard for shard in self.after.shards if shard.names] or self.after.shards[:1]
        return ExactFacts(
            base_fingerprint=base.hexdigest(),
            tuned_fingerprint=tuned.hexdigest(),
            entries=tuple(entry for entry, _ in self.packed),
            removed=self.removed,
            shards=tuple((shard.file, len(shard.names)) for shard in shards),
            metadata=tuple(dict(shard.metadata) for shard in shards),
            index_file=self.after.index_file,
            side_files=self.side_files,
        )

    def write(self, partial: Path, spool: Path) -> None:
        """Assemble the file out of the packed tensors."""
        stored = [(entry, size) for entry, size in self.packed if entry.way != "same"]
        layout = {entry.name: (torch.uint8, (size,)) for entry, size in stored}
        metadata = self.facts().to_metadata()
        with (
            spool.open("rb") as file,
            SafetensorsWriter(partial, layout, metadata=metadata, keep_order=True) as writer,
        ):
            for entry, size in stored:
                data = np.fromfile(file, np.uint8, size)
                writer.write(entry.name, torch.from_numpy(data))

    def result(self, target: Path, *, dry_run: bool) -> ExactResult:
        """Return what was done."""
        facts = self.facts()
        there = set(map(plain_name, self.after.infos))
        return ExactResult(
            output=target,
            dry_run=dry_run,
            tensors=tuple(ExactTensor(e.name, e.way, e.nbytes, size) for e, size in self.packed),
            removed=tuple(name for name in facts.removed if plain_name(name) not in there),
            dropped=tuple(self._dropped()),
            bytes=sum(size for _, size in self.packed),
            tuned_bytes=facts.nbytes,
            base_fingerprint=facts.base_fingerprint,
            tuned_fingerprint=facts.tuned_fingerprint,
        )

    def _dropped(self) -> Iterator[Dropped]:
        for name, size in self.after.passed_over.items():
            pickled = self.after.format == "pickle"
            reason = "an entry of the pickle beside the tensors" if pickled else "not read"
            yield Dropped(name, reason, size)
        for name, size in self.side_files.items():
            yield Dropped(name, "a file beside the weights, not as in the base's folder", size)


def _origins(before: Mapping[str, TensorInfo], after: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Find the base's tensor for each of the fine-tune's: by name, else by name without wrappers.

    A wrong one costs size and nothing else.
    """
    plain: dict[str, list[str]] = {}
    for name in before:
        plain.setdefault(plain_name(name), []).append(name)
    found = {}
    for name, info in after.items():
        others = [name] if name in before else plain.get(plain_name(name), [])
        if len(others) == 1 and _alike(before[others[0]], info):
            found[name] = others[0]
    return found


def _alike(one: TensorInfo, other: TensorInfo) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and one.layout == other.layout == "dense"


def _other_side_files(before: Checkpoint, after: Checkpoint) -> dict[str, int]:
    """List files beside the fine-tune's weights that the base's folder does not hold alike."""
    if not after.is_folder:
        return {}
    own = {}
    if before.is_folder:
        kept = side_files(before.path, weights=before.own_files).kept
        own = {str(one.relative_to(before.path)): one for one in kept}
    others = side_files(after.path, weights=after.own_files).kept
    return {
        place: one.stat().st_size
        for one in others
        if (place := str(one.relative_to(after.path))) not in own
        or one.read_bytes() != own[place].read_bytes()
    }
