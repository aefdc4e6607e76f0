"""Factor checkpoint + data -> tuned files, with the metric before and after each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svftool.attaching import Parametrisation, Regime, parse_regime
from svftool.attaching.lifecycle import choose_layers, matrices_of
from svftool.checkpoints import Checkpoint
from svftool.choices.acting import acting, check_acting
from svftool.choices.regimes import check_sizes
from svftool.choices.singular_values import check_band
from svftool.choices.training import check_comparison, check_safeguard, spelt_among
from svftool.errors import UsageError
from svftool.factors import FactorStore, open_factors
from svftool.files.names import TUNED_SUFFIX
from svftool.files.output import overlap
from svftool.files.side_files import named
from svftool.models import build_model, keep_vectors
from svftool.progress import SILENT, Progress
from svftool.stages.catalogue import ModelFacts, make_tasks
from svftool.stages.configuration import Configuration, check_beside, write_beside, write_into
from svftool.training import (
    Group,
    Settings,
    Trackers,
    TrainingPlan,
    compare,
    joined_group,
    summarise,
)
from svftool.training.memory import SAID_FROM, MemoryNeed, available, gigabytes, memory_need
from svftool.training.results import RESULTS_FILE, FinetuneResult, common_setting, write_results
from svftool.training.run_output import RunWriter, is_run_itself
from svftool.training.threads import threads_are_chosen
from svftool.training.workspace import Workspace, describe_files, open_workspace


@dataclass(frozen=True)
class RunOptions:
    """What `finetune` takes beside the options of the task.

    Attributes
    ----------
    include, exclude : sequence of str
        Globs of tensor names that limit spectral regimes and ``lora`` to some layers.
    parametrisation, train_rank, nonnegative
        How ``svf`` trains singular values; see `svftool.attach`.
    log_with : sequence of str
        Trackers that follow loss, learning rates and metrics of every run, by accelerate's names:
        ``tensorboard``, ``wandb`` ...
    log_dir : path-like, optional
        Where trackers that write files put them, by default ``OUTPUT-logs``; TensorBoard's, where
        no tracker is named.
    save_every : int, optional
        Steps between two writings of a run's state; by default it is written every 30 seconds, and
        less often where that would take more than a twentieth of the time.
    against : str, optional
        The regime that all others are held against, seed by seed.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    parametrisation: Parametrisation = "scale"
    train_rank: str | int | None = None
    nonnegative: bool = False
    log_with: Sequence[str] = ()
    log_dir: str | os.PathLike[str] | None = None
    save_every: int | None = None
    against: str | None = None

    @property
    def attaching(self) -> dict[str, Any]:
        """What says how singular values are trained, as `svftool.attach` takes it."""
        return {
            "parametrisation": self.parametrisation,
            "train_rank": self.train_rank,
            "nonnegative": self.nonnegative,
        }

    @property
    def limits(self) -> dict[str, Any]:
        """What acts on some regimes alone, by the names that `check_acting` knows."""
        return {"include": self.include, "exclude": self.exclude, **self.attaching}

    @classmethod
    def take(cls, options: dict[str, Any]) -> RunOptions:
        """Take its fields out of `options`; those of the task stay."""
        names = [one.name for one in fields(cls) if one.name in options]
        return cls(**{name: options.pop(name) for name in names})


def finetune(
    factors: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    task: str = "classification",
    model: str = "auto",
    base: str | os.PathLike[str] | None = None,
    regimes: Sequence[str] = ("svf",),
    seeds: int | Sequence[int] = 1,
    settings: Settings | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
    resume: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> FinetuneResult:
    """Train singular values, or another regime to compare with, on a few examples.

    Every regime starts from the same base, sees the same examples in the same order for the same
    number of steps, and is measured on the same query set, which selects nothing.

    Parameters
    ----------
    factors : path-like
        Factor checkpoint.
    data : path-like
        What to train on; see the task.
    output : path-like
        One run writes a tuned file (``NAME.svf.safetensors``); ``full`` writes a dense checkpoint
        and ``lora:r`` a PEFT folder. Several runs, or a name without a suffix, write a folder of
        these with a ``results.json``.
    task : str
        One of `svftool.tasks.options.TASKS`: ``classification``, ``language`` ...
    model : str
        See `svftool.models.build_model`.
    base : path-like, optional
        Where the base is, if not at its recorded place.
    regimes : sequence of str
        Any that `svftool.attaching.parse_regime` reads: ``head``, ``svf``, ``svf+scale``,
        ``entries:SIZE``, ``core:SIZE``, ``salt:SIZE``, ``rows``, ``bias``, ``norm``, ``svf+bias``,
        ``lora:SIZE``, ``full`` ...
    seeds : int or sequence of int
        How many seeds, from 0, or which.
    settings : Settings, optional
        Budget, optimiser, schedule and precision.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:INDEX``.
    trust_remote_code : bool
        Whether code that lies beside the checkpoint may run.
    force : bool
        Replace an existing output once the new one is complete.
    resume : bool
        Go on where an interrupted call with the same arguments stopped; the result is that of an
        uninterrupted one, bit for bit.
    progress : Progress
        Told how far the work is, and of runs that end worse than the base.
    options
        Fields of `RunOptions`, and those of the task's dataclass in `svftool.tasks.options`, such
        as ``shots`` and ``evaluation``.

    Returns
    -------
    FinetuneResult

    Raises
    ------
    UsageError
        If options contradict each other or the output exists.
    DataError
        If the data cannot be read or does not hold what was asked for.
    ModelError
        If the model cannot be built or does not take the weights.
    FactorsError, CheckpointError
        If factors or base are broken or do not belong together.
    ResourceError
        If memory or disk space runs out.
    """
    settings = Settings() if settings is None else settings
    check_safeguard(settings.safeguard, task)
    of_run = RunOptions.take(options)
    chosen = _parse_regimes(regimes, of_run)
    check_comparison(settings, regimes, against=of_run.against, task=task, options=options)
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    target = Path(output)
    with ExitStack() as stack:
        group, place = stack.enter_context(joined_group(device))
        group.together(lambda: check_beside(target))
        trackers = group.together(lambda: _trackers(of_run.log_with, of_run.log_dir, target))
        store = group.together(lambda: stack.enter_context(open_factors(factors)))
        group.together(lambda: _check_sizes(chosen, store, of_run))
        checkpoint = group.together(
            lambda: stack.enter_context(store.open_base(base, progress=progress))
        )
        request = _request(
            store, group, place, of_run, settings, [one.name for one in chosen], numbers,
            task=task, model=model, data=Path(data), options=options,
        )  # fmt: skip
        work = _claim(
            stack,
            group,
            target,
            request,
            force=force,
            resume=resume,
            inputs=[store.path, checkpoint.path, Path(data)],
            every=of_run.save_every,
        )
        need = group.together(
            lambda: memory_need(
                [one.name for one in chosen],
                checkpoint,
                store,
                settings,
                include=of_run.include,
                exclude=of_run.exclude,
            )
        )
        if group.first:
            _say_memory(need, place, settings, progress)
        dtype = getattr(torch, settings.dtype)
        models = group.together(
            lambda: _Models(model, checkpoint, dtype, trust_remote_code=trust_remote_code)
        )
        facts = ModelFacts.of(checkpoint, models.first, trust_remote_code=trust_remote_code)
        tasks = group.together(
            lambda: make_tasks(task, Path(data), facts, options, progress=progress)
        )
        itself = is_run_itself(target, chosen, len(chosen) * len(numbers) * len(tasks))
        plan = TrainingPlan(
            build=models.build,
            store=store,
            tasks=tasks,
            regimes=[regime.name for regime in chosen],
            seeds=numbers,
            settings=settings,
            device=place,
            include=of_run.include,
            exclude=of_run.exclude,
            attaching=of_run.attaching,
            trackers=trackers,
        )
        group.once(lambda: work.begin(request, resume=resume))
        dropped = checkpoint.dropped() if any(one.full for one in chosen) else {}
        if dropped and group.first:
            progress.warn(f"{checkpoint.path}: not in dense results: {named(dropped)}")
        configuration = Configuration(
            places={"factors": factors, "data": data, "base": base, "log_dir": of_run.log_dir},
            named={
                "regime": plan.regimes,
                "train_layers": list(of_run.include),
                "exclude": list(of_run.exclude),
                **plan.attaching,
                "log_with": list(of_run.log_with),
                "save_every": of_run.save_every,
                "against": of_run.against,
                "device": device,
                "trust_remote_code": trust_remote_code,
            },
            task=task,
            model=model,
            seeds=numbers,
            settings=settings,
            options=options,
        )
        writer = RunWriter(target, work.outputs, itself, store, checkpoint, settings)
        runs, signum = compare(plan, writer, journal=work.journal, group=group, progress=progress)
        result = FinetuneResult(
            output=target,
            task=task,
            metric=tasks[0].primary.name,
            runs=tuple(runs),
            summary=tuple(summarise(runs, tasks[0].primary)),
            interrupted=signum,
            setting=common_setting([run.setting for run in runs]),
            dropped=dropped,
            against=None if of_run.against is None else spelt_among(of_run.against, chosen),
        )
        work.finished = signum is None
        if group.first and work.outputs.is_dir():
            write_results(result, work.outputs / RESULTS_FILE)
            write_into(work.outputs, configuration.text(target))
    if group.first and not target.is_dir():
        write_beside(target, configuration.text(target.parent))
    return result


def _say_memory(
    need: MemoryNeed, device: torch.device, settings: Settings, progress: Progress
) -> None:
    """Say what training will need before anything is loaded; warn where there is not as much."""
    free = available(device)
    if free is not None and need.total > free:
        smaller = "" if settings.dtype == "bfloat16" else "use --dtype bfloat16, "
        named = acting(parse_regime(need.regime), {"include": ()})
        fewer = "train fewer layers (--train-layers)" if named else "train another regime"
        progress.warn(
            f"{need.sentence()}; {gigabytes(free)} are free on {device}: {smaller}{fewer}, or "
            "choose another --device"
        )
    elif need.total >= SAID_FROM or settings.dtype == "bfloat16":
        progress.note(need.sentence())


def _check_sizes(regimes: Sequence[Regime], store: FactorStore, options: RunOptions) -> None:
    """Refuse regimes that are larger than the layers before anything is read or trained."""
    if any(one.spectral is not None or one.lora is not None for one in regimes):
        matrices = matrices_of(store, choose_layers(store, options.include, options.exclude))
        check_band(options.train_rank, [k for *_, k in matrices])
        for regime in regimes:
            check_sizes(regime, matrices)


def _trackers(
    names: Sequence[str], folder: str | os.PathLike[str] | None, output: Path
) -> Trackers:
    """Find the trackers that were asked for, and their folder."""
    if folder is None:
        stem = output.name.removesuffix(TUNED_SUFFIX).removesuffix(".safetensors")
        place = output.with_name(f"{stem}-logs")
    else:
        place = Path(folder)
        relation = overlap(place, output)
        if relation in {"the same as", "inside"}:
            raise UsageError(
                f"{place}: the curves' folder is {relation} {output}, expected a place apart. "
                "Choose another with --log-dir"
            )
    chosen = names or ([] if folder is None else ["tensorboard"])
    trackers = Trackers(tuple(dict.fromkeys(chosen)), place)
    trackers.check()
    return trackers


def _claim(
    stack: ExitStack,
    group: Group,
    target: Path,
    request: Mapping[str, Any],
    *,
    resume: bool,
    **options: Any,
) -> Workspace:
    """Claim the output in the first process; the others know where it is, and leave it alone.

    What cannot be gone on with is refused here, before anything is loaded.
    """

    def claim() -> None:
        work = stack.enter_context(open_workspace(target, resume=resume, **options))
        claimed.append(work)
        if resume:
            work.check(request)

    claimed: list[Workspace] = []
    group.once(claim)
    return claimed[0] if claimed else Workspace(target)


def _request(
    store: FactorStore,
    group: Group,
    device: torch.device,
    run: RunOptions,
    settings: Settings,
    regimes: Sequence[str],
    seeds: Sequence[int],
    *,
    task: str,
    model: str,
    data: Path,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Say what is asked for, as far as the bits of the result depend on it."""
    code = Path(model.rpartition(":")[0])
    return {
        "base": store.base_fingerprint,
        "factors": store.fingerprint,
        "model": [model, describe_files(code)] if code.suffix == ".py" else model,
        "task": task,
        "data": describe_files(data),
        "options": {name: _plain_option(value) for name, value in options.items()},
        "regimes": list(regimes),
        "seeds": list(seeds),
        "include": list(run.include),
        "exclude": list(run.exclude),
        **run.attaching,
        **settings.for_bits(),
        "device": device.type,
        "processes": group.count,
        # Sums over threads are rounded in another order where there are more or fewer of them.
        "threads": _threads() if device.type == "cpu" else None,
    }


def _threads() -> int | str:
    number = torch.get_num_threads()
    if number == 1 or threads_are_chosen():
        return number
    return f"{number}, of a small network 1"


def _plain_option(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return describe_files(Path(value))
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return value


class _Models:
    """Fresh models with the base's weights; the first one is built at once, to be looked at."""

    def __init__(
        self, spec: str, checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool
    ) -> None:
        self._spec, self._dtype = spec, dtype
        self._checkpoint = checkpoint
        self._trust = trust_remote_code
        self._unused: nn.Module | None = self._build()

    @property
    def first(self) -> nn.Module | None:
        """The first model, as long as nobody has taken it."""
        return self._unused

    def build(self) -> nn.Module:
        """Return a model that nobody else has."""
        model, self._unused = self._unused, None
        return self._build() if model is None else model

    def _build(self) -> nn.Module:
        model = build_model(
            self._spec,
            checkpoint=self._checkpoint,
            dtype=self._dtype,
            trust_remote_code=self._trust,
        )
        return keep_vectors(model, self._checkpoint)


def _parse_regimes(names: Sequence[str], options: RunOptions) -> list[Regime]:
    """Read the regimes, each once, among them some that every option acts on."""
    regimes = [parse_regime(name) for name in names]
    # Two spellings of one regime, such as svf+bias and bias+svf, differ by the name alone.
    twice = sorted({one.name for one in regimes if sum(map(one.same, regimes)) > 1})
    if twice or not regimes:
        raise UsageError(f"regime {', '.join(twice) or 'missing'}: expected each once")
    check_acting(regimes, options.limits)
    return regimes
