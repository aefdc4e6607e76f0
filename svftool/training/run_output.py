"""What a run of ``finetune`` writes: a tuned file, a dense checkpoint or a PEFT folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svftool.attaching import Regime, Trainable
from svftool.attaching.peft_warnings import peft_warnings
from svftool.checkpoints import WEIGHT_SUFFIXES, Checkpoint, write_errors
from svftool.choices.training import Settings
from svftool.errors import UsageError
from svftool.factors import FactorStore, TunedFile, write_tuned
from svftool.factors.dense import write_dense
from svftool.factors.mixture import Expert, Mixture
from svftool.factors.stated import Stated
from svftool.files.names import TUNED_SUFFIX, check_dense_name
from svftool.files.output import remove
from svftool.progress import SILENT
from svftool.tasks.base import Task
from svftool.training.plan import Run, file_stem

logger = logging.getLogger(__name__)


def is_run_itself(target: Path, regimes: Sequence[Regime], runs: int) -> bool:
    """Whether the output is the only run's own file or folder, not a folder of runs.

    Parameters
    ----------
    target : Path
        The output.
    regimes : sequence of Regime
        What is trained.
    runs : int
        Regimes times seeds.

    Raises
    ------
    UsageError
        If a file is named for what is a folder.
    """
    is_file = target.suffix in WEIGHT_SUFFIXES
    if runs > 1:
        if is_file:
            raise UsageError(f"{target}: {runs} runs are written to a folder, expected its name")
        return False
    only = regimes[0]
    if only.lora is not None and is_file:
        raise UsageError(f"{target}: regime {only.name} writes a PEFT folder, expected its name")
    if only.full:
        check_dense_name(target)
    if not only.full and is_file and target.suffix != ".safetensors":
        raise UsageError(f"{target}: expected a tuned file's name to end in {TUNED_SUFFIX}")
    return is_file or only.full or only.lora is not None


@dataclass(frozen=True)
class RunWriter:
    """Writes each run where it belongs.

    Attributes
    ----------
    target, partial : Path
        The output, and where it is written until it is complete.
    itself : bool
        See `is_run_itself`.
    store : FactorStore
        The factors.
    base : Checkpoint
        The base, whose form a dense checkpoint follows.
    settings : Settings
    """

    target: Path
    partial: Path
    itself: bool
    store: FactorStore
    base: Checkpoint
    settings: Settings

    def __call__(self, run: Run, trainable: Trainable, task: Task) -> Path:
        """Write a run, and return where it will be when the output is complete."""
        if not self.itself:
            with write_errors(self.partial):
                self.partial.mkdir(exist_ok=True)
        stem = file_stem(run.regime, run.seed, run.shots, run.facts)
        name = stem + self._suffix(trainable.regime)
        where = self.partial if self.itself else self.partial / name
        target = self.target if self.itself else self.target / name
        # An interrupted process may have written this run, or a part of it.
        remove(where)
        if trainable.regime.lora is not None:
            with write_errors(where), peft_warnings() as said:
                trainable.model.save_pretrained(where)  # type: ignore[operator]
            for message in said:
                logger.warning("%s: %s", target, message)
        elif trainable.regime.full:
            self._write_dense(run, trainable, task, where, target)
        else:
            write_tuned(
                where,
                store=self.store,
                S=trainable.singular_values(),
                parts=trainable.parts(),
                whole=trainable.whole_tensors(),
                task=task.name,
                classes=task.classes,
                training=self._facts(run, trainable),
            )
        return target

    def _suffix(self, regime: Regime) -> str:
        if regime.lora is not None or (regime.full and self.base.is_folder):
            return ""
        return ".safetensors" if regime.full else TUNED_SUFFIX

    def _write_dense(
        self, run: Run, trainable: Trainable, task: Task, where: Path, target: Path
    ) -> None:
        trained = TunedFile(
            path=target,
            S={},
            S_base={},
            whole={name: value.cpu() for name, value in trainable.whole_tensors().items()},
            base_fingerprint=self.store.base_fingerprint,
            factors_fingerprint=self.store.fingerprint,
            probes={},
            task=task.name,
            classes=task.classes,
        )
        mixture = Mixture(self.store, self.base, [Expert(trained)])
        stated = Stated(task.name, task.classes, self._facts(run, trainable))
        write_dense(mixture, where, target=target, max_bytes=None, progress=SILENT, stated=stated)

    def _facts(self, run: Run, trainable: Trainable) -> dict[str, Any]:
        """Say how a tuned file came about; without times and paths, so that bytes repeat."""
        settings = self.settings
        return {
            "regime": run.regime,
            "seed": run.seed,
            "data": dict(run.setting),
            "metrics": {"before": dict(run.before), "after": dict(run.after)},
            "trainable_parameters": run.trainable_parameters,
            "steps": run.outcome.steps,
            "kept_step": run.outcome.kept,
            "ending": run.outcome.ending,
            **({} if run.safeguard is None else {"kept_share": run.safeguard.share}),
            "batch_size": settings.batch_size,
            "optimizer": settings.optimizer,
            "learning_rates": dict(run.learning_rates),
            "decay": settings.decay,
            "head_decay": settings.decay_of("head"),
            "head_first": settings.head_first,
            "precision": settings.precision,
            "dtype": settings.dtype,
            "accumulate": settings.accumulate,
            "warmup": settings.warmup,
            "clip": settings.clip,
            "label_smoothing": settings.label_smoothing,
            "patience": settings.patience,
            **({"support": dict(run.support)} if run.support else {}),
        }
