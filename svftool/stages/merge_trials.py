"""A live model that takes the merged weights of one trial after another, and its losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svftool.attaching import map_names
from svftool.attaching.names import Placement
from svftool.checkpoints import Checkpoint
from svftool.errors import DataError, ModelError, SvftoolError, counted, shortlist
from svftool.factors.dense import computed, write_dense
from svftool.factors.stated import Support
from svftool.files.output import remove
from svftool.machine import explain_out_of_memory, pick_device
from svftool.models import build_model
from svftool.progress import SILENT, Progress
from svftool.stages.catalogue import ModelFacts, make_tasks
from svftool.stages.combine_options import WeightsFrom
from svftool.stages.loading import fit
from svftool.stages.measured import Source, check_stated, facts_of, filled_options, open_source
from svftool.stages.merge_checkpoint import MergedCheckpoint, MergeWork
from svftool.stages.merge_layers import plan_tensors
from svftool.tasks.base import Counts, Draw, HasContents, Task, to_device
from svftool.tasks.option import options_in
from svftool.tasks.options import TASKS
from svftool.training.batches import generator_for
from svftool.training.threads import suited_threads

MOST_PARTS = 64
"""Parts that the data is measured in, at most; of fewer examples each is a part."""
_AT_ONCE = 16
_HEAD_NAMES = ("id2label", "label2id", "label_names", "label_descriptions")


def check_examples(work: MergeWork, how: WeightsFrom, progress: Progress) -> None:
    """Refuse data that cannot choose weights before anything is merged.

    Parameters
    ----------
    work : MergeWork
    how : WeightsFrom
    progress : Progress

    Raises
    ------
    DataError
        If it cannot be read, has classes that the head does not have, or a single example.
    UsageError
        If an option contradicts it.
    """
    checkpoint = work.merge.base.checkpoint
    source = Source(checkpoint, model=how.model, said=work.stated)
    facts = ModelFacts.of(
        checkpoint, None, trust_remote_code=how.trust_remote_code, whole_head=True
    )
    if work.heads.tensors:  # the names of the base's head are not those of the result's
        config = {key: one for key, one in facts.config.items() if key not in _HEAD_NAMES}
        facts = replace(facts, config=config)
    facts = replace(facts, trained=source.said_for(how.task).data)
    _examples(_task(source, how, facts, progress))


def _task(source: Source, how: WeightsFrom, facts: ModelFacts, progress: Progress) -> Task:
    """Make the task of which all examples are both trained on and measured with."""
    data = Path(how.data)
    options = filled_options(how.task, data, source, how.options)
    if "augment" in dict(options_in(TASKS[how.task])):
        options["augment"] = "none"  # a loss that is compared is of the same pictures
    task, *_ = make_tasks(how.task, data, facts, options, progress=progress)
    return task


def _examples(task: Task) -> tuple[Draw, Support]:
    draw = task.draw(0)
    assert isinstance(draw, HasContents)
    support = Support.of(draw.contents("support"))
    if support.examples < 2 or draw.size < 2:
        raise DataError(
            f"--weights-from: {support.examples} example, expected 2 or more: weights are chosen "
            "on some and held against others. Add examples."
        )
    return draw, support


@dataclass(frozen=True)
class TrialModel:
    """The model of a merge, whose weights are replaced in place.

    Attributes
    ----------
    work : MergeWork
        With the weights of the start.
    model : nn.Module
    task : Task
    draw : Draw
    support : Support
        Its examples.
    parts : tuple of Tensor
        Positions of the examples of each part, in random order.
    places : mapping of str to Placement
        Where tensors that a trial changes are in the model.
    """

    work: MergeWork
    model: nn.Module
    task: Task
    draw: Draw
    support: Support
    parts: tuple[Tensor, ...]
    places: Mapping[str, Placement]

    def load(self, weights: Sequence[float]) -> None:
        """Give the model the merged weights of a trial, rounded as they would be written.

        Raises
        ------
        FactorsError, NumericalError
            If the inputs cannot be merged with these weights; the model must be loaded again.
        """
        merged = MergedCheckpoint(self.work.weighted(weights))
        state = self.model.state_dict()
        with SILENT.task("") as task, torch.no_grad():
            for name, value in computed(merged, list(self.places), [], task):
                place = self.places[name]
                place.region.of(state[place.live]).copy_(value)

    @torch.inference_mode()
    def losses(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean loss of each part, and what each counts: examples, tokens or pixels."""
        found, sizes = [], []
        device = next(self.model.parameters()).device
        self.model.eval()
        for part in self.parts:
            total, count = 0.0, 0.0
            for positions in torch.split(part, _AT_ONCE):
                batch = self.draw.batch(positions, generator_for("weights"))
                terms = self.draw.terms(batch) if isinstance(self.draw, Counts) else len(positions)
                total += terms * float(self.draw.loss(self.model, to_device(batch, device)))
                count += terms
            found.append(total / count if count else 0.0)
            sizes.append(float(count))
        return tuple(found), tuple(sizes)

    def metric(self) -> float:
        """Return the task's primary metric on all of the data."""
        return self.draw.evaluate(self.model)[self.task.primary.name]


@contextmanager
def opened_trials(
    work: MergeWork, how: WeightsFrom, folder: Path, progress: Progress
) -> Iterator[TrialModel]:
    """Build the model of a merge; it has the weights of the start.

    The start is written once, so that the model is built as the result's will be. Every trial after
    it replaces the tensors that the inputs change.

    Parameters
    ----------
    work : MergeWork
    how : WeightsFrom
    folder : Path
        Where the start is written for the while.
    progress : Progress

    Raises
    ------
    DataError
        If the data's classes are not those of the head.
    ModelError
        If the model cannot be built, or does not hold the tensors as the file does.
    """
    place, start = pick_device(how.device), folder / "start"
    remove(start)
    try:
        merged = MergedCheckpoint(work)
        write_dense(
            merged, start, target=start, max_bytes=None, progress=SILENT, stated=work.stated
        )
        with ExitStack() as stack:
            with _named(start, work.target):
                source = open_source(stack, start, None, None, SILENT, model=how.model)
                model = build_model(
                    how.model,
                    checkpoint=source.checkpoint,
                    trust_remote_code=how.trust_remote_code,
                    strict=False,
                )
                facts = facts_of(source, how.task, model, trust_remote_code=how.trust_remote_code)
                task = _task(source, how, facts, progress)
                check_stated(task, source, progress)
                draw, support = _examples(task)
                _warn_of_seen(work, how, draw, support, progress)
                with explain_out_of_memory(None):
                    live = fit(source, task.classes, draw, model.to(place), progress)
                places = _places(live, source.checkpoint, _touched(work))
            parts = _parts(draw.size)
            with explain_out_of_memory(None), suited_threads(live, draw):
                yield TrialModel(work, live, task, draw, support, parts, places)
    finally:
        remove(start)


@contextmanager
def _named(start: Path, target: Path) -> Iterator[None]:
    """Call the start in errors what it stands for: the result."""
    try:
        yield
    except SvftoolError as error:
        error.args = tuple(
            one.replace(str(start), str(target)) if isinstance(one, str) else one
            for one in error.args
        )
        raise


def _warn_of_seen(
    work: MergeWork, how: WeightsFrom, draw: Draw, support: Support, progress: Progress
) -> None:
    """Say where inputs were trained on the examples: they look better there than they are."""
    assert isinstance(draw, HasContents)
    known = work.stated.support
    seen = 0 if known is None else known.count(draw.contents("support"))
    if seen:
        progress.warn(
            f"{how.data}: {seen} of {support.examples} examples were trained on by inputs, byte "
            "for byte: the weights favour these inputs. Give other examples with --weights-from"
        )


def _parts(size: int) -> tuple[Tensor, ...]:
    """Deal the examples to parts at random, always alike."""
    order = torch.randperm(size, generator=generator_for("weights", size))
    count = min(size, MOST_PARTS)
    return tuple(order[index::count] for index in range(count))


def _touched(work: MergeWork) -> list[str]:
    """List what depends on the weights, in the order of the result."""
    merge, heads = work.merge, work.heads
    inputs = [replace(one, weight=1.0) for one in merge.inputs]
    plans = plan_tensors(merge.base, inputs, merge.spec, heads.names)
    changed = {name for name, plan in plans.items() if plan.way != "keep"}
    means = {name for name, one in heads.tensors.items() if one.how == "mean"}
    return [name for name in MergedCheckpoint(work).infos if name in changed | means]


def _places(model: nn.Module, checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, Placement]:
    """Find tensors in the model, and hold what is there against the file.

    Raises
    ------
    ModelError
        If one has no place, or is held otherwise: a trial would not be what it says.
    """
    state: dict[str, Any] = model.state_dict()
    known = map_names(model, checkpoint.infos).placements
    found: dict[str, Placement] = {}
    for name in names:
        place = known.get(name) or Placement(checkpoint.live_name(name, state))
        if place.live in state and _holds(place, state[place.live], checkpoint.read(name)):
            found[name] = place
    lost = [name for name in names if name not in found]
    if lost:
        raise ModelError(
            f"{checkpoint.path}: {counted(len(lost), 'tensors', 'are')} not in the model as they "
            f"are in the file: {shortlist(lost, 3)}, expected to replace them there for every "
            "trial. Give weights as FILE@0.5, and measure each with svftool evaluate."
        )
    return found


def _holds(place: Placement, live: Tensor, value: Tensor) -> bool:
    if not (place.region.whole or live.is_contiguous()):
        return False  # a part of it could be read and not written
    held = place.region.of(live)
    same = held.shape == value.shape
    return same and torch.equal(held.cpu(), value.to(held.dtype))
