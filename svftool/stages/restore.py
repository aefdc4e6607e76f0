"""A base + an exact delta -> the fine-tune, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from svftool.checkpoints import (
    PICKLE_SUFFIXES,
    Checkpoint,
    CheckpointWriter,
    Fingerprint,
    SafetensorsWriter,
    TensorInfo,
    dtype_name,
    dtype_named,
    open_checkpoint,
    parse_size,
    plan_shards,
    replace_output,
    save_pickled,
    side_files,
)
from svftool.checkpoints.exact_file import ExactEntry, ExactFile, in_order
from svftool.checkpoints.pickle_writer import rivals
from svftool.errors import CheckpointError, NumericalError, ResourceError, UsageError, shortlist
from svftool.files.folder import STEMS
from svftool.files.names import WEIGHT_SUFFIXES, check_dense_name
from svftool.files.side_files import named
from svftool.machine import available_memory
from svftool.progress import SILENT, Progress


@dataclass(frozen=True)
class RestoreResult:
    """What `restore` did.

    Attributes
    ----------
    output : Path
    dry_run : bool
    ways : mapping of str to tuple of str
        Names of the tensors restored in each way, see `ExactEntry`.
    added, removed : tuple of str
        Tensors that the base does not have; tensors of the base that the result does not have.
    bytes : int
        Of the tensors restored.
    fingerprint : str
        Of the result, as the delta states it and as it was found.
    verified : bool or None
        True where the output was read again and has this fingerprint; None if not asked for.
    dropped : mapping of str to int
        What the base or the fine-tune holds and the output does not, with bytes.
    """

    output: Path
    dry_run: bool
    ways: Mapping[str, tuple[str, ...]]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    bytes: int
    fingerprint: str
    verified: bool | None
    dropped: Mapping[str, int] = field(default_factory=dict)


def restore(
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    max_shard_size: str | None = None,
    verify: bool = False,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> RestoreResult:
    """Turn a base into its fine-tune by an exact delta.

    Every tensor is held against its SHA-256, and both sides against their fingerprints.

    Parameters
    ----------
    base : path-like
        The checkpoint that the delta was made from, whatever its format.
    delta : path-like
        A file of `extract_exact`.
    output : path-like
        As of `merge`: one safetensors file, a pickle nested as the base, or a folder.
    max_shard_size : str, optional
        Reshard, such as ``"5GB"``; shards as the fine-tune's if left out.
    verify : bool
        Read the output again.
    dry_run : bool
        Restore and check everything; write nothing.
    force : bool
        Replace an existing output.
    progress : Progress

    Returns
    -------
    RestoreResult

    Raises
    ------
    CheckpointError
        If the delta is broken, or the base is another one.
    ResourceError
        If the disk, or for a pickle the memory, cannot hold the result.
    UsageError
        If the output exists, or its name does not fit.
    """
    target = Path(output)
    check_dense_name(target)
    if max_shard_size is not None and target.suffix in WEIGHT_SUFFIXES:
        raise UsageError(
            f"--max-shard-size: {target} is one file, which has no shards, expected a folder. "
            f"Write to {target.with_suffix('')}, or leave the option out."
        )
    shard_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    with ExitStack() as stack:
        exact = stack.enter_context(ExactFile(Path(delta)))
        before = stack.enter_context(open_checkpoint(base, stored=True))
        work = _Work(before, exact, target, progress)
        work.check_base()
        dropped = work.tell_dropped()
        if dry_run:
            for _ in work.tensors():
                pass
            return work.result(dropped, dry_run=True, verified=None)
        inputs = [Path(base), Path(delta)]
        partial = stack.enter_context(replace_output(target, force=force, inputs=inputs))
        work.write(partial, shard_bytes)
        if verify:
            work.verify(partial)
        return work.result(dropped, dry_run=False, verified=True if verify else None)


@dataclass
class _Work:
    """One restoration."""

    before: Checkpoint
    exact: ExactFile
    target: Path
    progress: Progress

    def __post_init__(self) -> None:
        self.facts = self.exact.facts
        files = [name for name, count in self.facts.shards for _ in range(count)]
        self.infos = {
            entry.name: TensorInfo(entry.name, dtype_named(entry.dtype), entry.shape, file)
            for entry, file in zip(self.facts.entries, files, strict=True)
        }

    def check_base(self) -> None:
        """Refuse a base of other tensors, before any is read."""
        infos = self.before.infos
        for entry in self.facts.entries:
            if entry.origin is None:
                continue
            info = infos.get(entry.origin)
            if info is None:
                raise self._another(f"has no tensor {entry.origin!r}")
            if (dtype_name(info.dtype), info.shape) != (entry.dtype, entry.shape):
                found = f"{dtype_name(info.dtype)} {list(info.shape)}"
                raise self._another(
                    f"{entry.origin!r} is {found}, not {entry.dtype} {list(entry.shape)}"
                )
        used = {entry.origin for entry in self.facts.entries} | set(self.facts.removed)
        extra = [name for name in infos if name not in used]
        lacking = [name for name in self.facts.removed if name not in infos]
        if extra or lacking:
            how = "has no" if lacking else "also has"
            raise self._another(f"{how} {shortlist(map(repr, lacking or extra), 3)}")

    def _another(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.before.path}: {found}, expected the base with the fingerprint "
            f"{self.facts.base_fingerprint[:12]}, which {self.exact.path} was made from. "
            "Name that base."
        )

    def tell_dropped(self) -> dict[str, int]:
        """Warn of what the output will not hold; return it with its bytes."""
        left: dict[str, int] = {}
        for warning in self.before.warnings:
            self.progress.warn(warning)
        if self.target.suffix in PICKLE_SUFFIXES:
            left = rivals(self.before) if len(self.before.files) == 1 else {}
            if left:
                self.progress.warn(f"{self.target}: left out: {named(left)}")
            return left
        left = dict(self.before.passed_over)
        if self.target.suffix != ".safetensors" and self.facts.side_files:
            self.progress.warn(
                "files beside the fine-tune's weights that the delta does not hold: "
                f"{named(self.facts.side_files)}; copy them from the fine-tune"
            )
            left |= self.facts.side_files
        return left

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the result in order, checked; then check the fingerprints."""
        base, tuned = Fingerprint(), Fingerprint()
        seen: set[str] = set()
        with self.progress.task("restoring", self.facts.nbytes, unit="bytes") as task:
            for entry, value in in_order(self.facts.entries, self._make):
                tuned.add_digest(entry.name, entry.dtype, entry.shape, entry.sha256)
                if entry.origin is not None and entry.origin not in seen:
                    assert entry.origin_sha256 is not None
                    base.add_digest(entry.origin, entry.dtype, entry.shape, entry.origin_sha256)
                    seen.add(entry.origin)
                yield entry.name, value
                task.advance(entry.nbytes, detail=entry.name)
        for name in self.facts.removed:
            base.add(name, self.before.read(name))
        if base.hexdigest() != self.facts.base_fingerprint:
            raise self._another(f"has the fingerprint {base.hexdigest()[:12]}")
        self._check_fingerprint(tuned.hexdigest(), str(self.exact.path))

    def _make(self, entry: ExactEntry) -> tuple[ExactEntry, Tensor]:
        before = None if entry.origin is None else self.before.read(entry.origin)
        made = self.exact.restore(entry, before)
        if made is None:
            raise self._another(f"{entry.origin!r} has other bytes")
        return entry, made

    def _check_fingerprint(self, found: str, where: str) -> None:
        if found != self.facts.tuned_fingerprint:
            raise CheckpointError(
                f"{where}: the tensors have the fingerprint {found[:12]}, expected "
                f"{self.facts.tuned_fingerprint[:12]}. Copy or make the delta again."
            )

    def write(self, partial: Path, shard_bytes: int | None) -> None:
        """Write the result at `partial`."""
        if self.target.suffix in PICKLE_SUFFIXES:
            self._check_memory()
            gone = [name for name in self.before.infos if name not in self.infos]
            save_pickled(partial, self.before, dict(self.tensors()), removed=gone)
            return
        with self._writer(partial, shard_bytes) as writer:
            for name, tensor in self.tensors():
                writer.write(name, tensor)
        if self.target.suffix != ".safetensors" and self.before.is_folder:
            side_files(self.before.path, weights=self.before.own_files).copy(partial)

    def _check_memory(self) -> None:
        """Refuse a pickle, which is written out of memory, that does not fit there."""
        free = available_memory()
        if free is not None and self.facts.nbytes > free:
            raise ResourceError(
                f"{self.target}: {free} bytes of memory free, expected {self.facts.nbytes} to "
                "write a pickle. Write to a folder or .safetensors."
            )

    def _writer(
        self, partial: Path, shard_bytes: int | None
    ) -> SafetensorsWriter | CheckpointWriter:
        infos, files = self.infos, [name for name, _ in self.facts.shards]
        # Files of safetensors come back in their own order, under their own names.
        own = all(name.endswith(".safetensors") for name in files)
        metadata = self.facts.metadata if own else [{"format": "pt"}] * len(files)
        if self.target.suffix == ".safetensors":
            layout = {info.name: (info.dtype, info.shape) for info in infos.values()}
            return SafetensorsWriter(partial, layout, metadata=metadata[0], keep_order=own)
        partial.mkdir()
        if shard_bytes is not None:
            planned = plan_shards(infos.values(), shard_bytes)
            shards = [[infos[name] for name in names] for names in planned]
            return CheckpointWriter(partial, shards=shards)
        own = own and (len(files) > 1 or Path(files[0]).stem in STEMS)
        return CheckpointWriter(
            partial,
            shards=[[info for info in infos.values() if info.file == name] for name in files],
            metadata=metadata,
            files=files if own else None,
            index_file=self.facts.index_file if own else None,
            keep_order=own,
        )

    def verify(self, partial: Path) -> None:
        """Read the output again."""
        found = Fingerprint()
        with open_checkpoint(partial, stored=True) as written:
            total = sum(info.nbytes for info in written.infos.values())
            with self.progress.task("verifying", total, unit="bytes") as task:
                for name, info in written.infos.items():
                    found.add(name, written.read(name))
                    task.advance(info.nbytes, detail=name)
        if found.hexdigest() != self.facts.tuned_fingerprint:
            raise NumericalError(
                f"{self.target}: what was read back has the fingerprint "
                f"{found.hexdigest()[:12]}, expected {self.facts.tuned_fingerprint[:12]}. "
                "Check the disk and the memory."
            )

    def result(
        self, dropped: Mapping[str, int], *, dry_run: bool, verified: bool | None
    ) -> RestoreResult:
        """Return what was done."""
        ways: dict[str, list[str]] = {}
        for entry in self.facts.entries:
            ways.setdefault(entry.way, []).append(entry.name)
        names = [entry.name for entry in self.facts.entries]
        return RestoreResult(
            output=self.target,
            dry_run=dry_run,
            ways={way: tuple(listed) for way, listed in ways.items()},
            added=tuple(name for name in names if name not in self.before.infos),
            removed=tuple(name for name in self.before.infos if name not in self.infos),
            bytes=self.facts.nbytes,
            fingerprint=self.facts.tuned_fingerprint,
            verified=verified,
            dropped=dropped,
        )
