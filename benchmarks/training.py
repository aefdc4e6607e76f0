"""Cost of one optimiser step: singular values beside head, bias, LoRA and full fine-tuning.

All regimes of a model run in one process and take turns, so that what else the machine does
falls on all of them alike; the medians are compared. Each side runs with the settings that a user
gets by default and, in rows marked ``channels_last``, with the best that either can be set to.
Memory is measured in a process of its own for each regime: the highest resident size during two
steps, above what is resident once the model's file is read.

Operations are counted as they are dispatched (products and convolutions alone). Their number, at
the rate of one large matrix product timed in the same turns, is the floor of a step: what it would
take if every kernel were that good and nothing else cost time.

    python benchmarks/training.py                     all models
    python benchmarks/training.py resnet50 --memory
    python benchmarks/training.py --ways              does the cost model choose well?
    python benchmarks/training.py --quick             small models: does it run
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from names import chosen
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import svftool
from svftool.attaching import AttachedLayer, AttachedWeight, apply_regime
from svftool.attaching.lifecycle import install
from svftool.attaching.names import WHOLE
from svftool.attaching.weight import choose_way, count_operations
from svftool.factors import LayerFactors, open_factors
from svftool.models import find_head

Batch = dict[str, Tensor]
REGIMES = ("head", "svf", "bias", "lora:8", "full")


@dataclass(frozen=True)
class Case:
    """A model, a batch, and what the loss is."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    images: bool

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run the model on a batch."""
        if self.images:
            return nn.functional.cross_entropy(model(batch["x"]), batch["y"])
        return model(input_ids=batch["x"], labels=batch["x"]).loss


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=100)

    return build


def _gpt2(layers: int, width: int, heads: int, vocabulary: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, n_positions=256,
            bos_token_id=1, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return GPT2LMHeadModel(config)

    return build


def _images(count: int, side: int) -> Callable[[], Batch]:
    return lambda: {"x": torch.randn(count, 3, side, side), "y": torch.randint(0, 100, (count,))}


def _tokens(count: int, length: int, vocabulary: int) -> Callable[[], Batch]:
    return lambda: {"x": torch.randint(0, vocabulary, (count, length))}


CASES = {
    "resnet50": Case(_timm("resnet50"), _images(8, 224), True),
    "vit_b_16": Case(_timm("vit_base_patch16_224"), _images(8, 224), True),
    "gpt2": Case(_gpt2(12, 768, 12, 50257), _tokens(2, 256, 50257), False),
}
QUICK = {
    "resnet18": Case(_timm("resnet18"), _images(4, 96), True),
    "vit_tiny": Case(_timm("vit_tiny_patch16_224"), _images(2, 224), True),
    "gpt2_small": Case(_gpt2(2, 128, 4, 500), _tokens(2, 64, 500), False),
}


class Runner:
    """One regime of one model, ready to step."""

    def __init__(
        self, case: Case, folder: Path, regime: str, layout: str, device: str = "cpu"
    ) -> None:
        torch.manual_seed(0)
        self.case, self.regime, self.layout = case, regime, layout
        model = case.build()
        model.load_state_dict(torch.load(folder / "state.pt", weights_only=True))  # noqa: TID251
        model.eval().to(device)
        self.batch = {name: one.to(device) for name, one in case.batch().items()}
        if layout == "channels_last":
            model.to(memory_format=torch.channels_last)
            self.batch["x"] = self.batch["x"].to(memory_format=torch.channels_last)
        head = find_head(model) if case.images else None
        with open_factors(folder / "factors") as store:
            trainable = apply_regime(model, regime, store, head=head)
        self.model = trainable.model
        self.trainable_parameters = trainable.trainable_parameters
        parameters = [p for group in trainable.groups.values() for p in group]
        self.optimiser = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step(self) -> float:
        """Do one step and give its seconds."""
        begun = time.perf_counter()
        self.case.loss(self.model, self.batch).backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return time.perf_counter() - begun

    def count_operations(self) -> int:
        """Count the floating-point operations of one step's products and convolutions."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops()


def prepare(name: str, case: Case, cache: Path) -> Path:
    """Write weights and factors of a model once."""
    folder = cache / name
    if not (folder / "factors").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        state = case.build().state_dict()
        torch.save(state, folder / "state.pt")
        alone = {key: value.clone().contiguous() for key, value in state.items()}
        save_file(alone, folder / "base.safetensors", {"format": "pt"})
        svftool.decompose(folder / "base.safetensors", folder / "factors")
    return folder


def variants(case: Case, regimes: list[str]) -> list[tuple[str, str]]:
    layouts = ("default", "channels_last") if case.images else ("default",)
    chosen = [(r, layout) for layout in layouts for r in regimes]
    return [pair for pair in chosen if case.images or pair[0] != "head"]


def time_steps(case: Case, folder: Path, regimes: list[str], rounds: int) -> list[dict[str, Any]]:
    """Let all regimes take turns and give the median step of each."""
    runners = [Runner(case, folder, *variant) for variant in variants(case, regimes)]
    times: dict[Runner, list[float]] = {runner: [] for runner in runners}
    rates = []
    for turn in range(rounds + 2):
        rates.append(product_rate())
        for runner in runners:
            seconds = runner.step()
            if turn >= 2:
                times[runner].append(seconds)
    return [
        {
            "regime": runner.regime,
            "layout": runner.layout,
            "trainable_parameters": runner.trainable_parameters,
            "seconds": statistics.median(seconds),
            "operations": (operations := runner.count_operations()),
            "floor": operations / statistics.median(rates),
            "spread": (max(seconds) - min(seconds)) / statistics.median(seconds),
        }
        for runner, seconds in times.items()
    ]


def product_rate(size: int = 2048) -> float:
    """Return the operations a second of a large matrix product."""
    a = torch.randn(size, size)
    begun = time.perf_counter()
    a @ a
    return 2 * size**3 / (time.perf_counter() - begun)


def resident(field: str) -> int:
    """Read this process's memory, in bytes, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_memory(case: Case, folder: Path, regime: str, layout: str) -> int:
    """Return the highest resident size of two steps above that of the libraries."""
    import peft
    import timm
    import transformers

    del peft, timm, transformers
    before = resident("VmRSS")
    runner = Runner(case, folder, regime, layout)
    runner.step()
    runner.step()
    return resident("VmHWM") - before


def memory_of(name: str, arguments: argparse.Namespace, regime: str, layout: str) -> int:
    command = [sys.executable, __file__, name, "--cache", str(arguments.cache)]
    command += ["--one", regime, "--layout", layout, "--threads", str(arguments.threads)]
    command += ["--quick"] if arguments.quick else []
    # Large blocks go back to the kernel at once: the high-water mark is that of live memory.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv 64->64, 3x3, 56 px": (lambda: nn.Conv2d(64, 64, 3, padding=1), (8, 64, 56, 56)),
    "conv 64->64, 1x1, 56 px": (lambda: nn.Conv2d(64, 64, 1), (8, 64, 56, 56)),
    "conv 64->256, 1x1, 56 px": (lambda: nn.Conv2d(64, 256, 1), (8, 64, 56, 56)),
    "conv 256->64, 1x1, 56 px": (lambda: nn.Conv2d(256, 64, 1), (8, 256, 56, 56)),
    "conv 128->128, 3x3, 28 px": (lambda: nn.Conv2d(128, 128, 3, padding=1), (8, 128, 28, 28)),
    "conv 1024->256, 1x1, 14 px": (lambda: nn.Conv2d(1024, 256, 1), (8, 1024, 14, 14)),
    "conv 512->512, 3x3, 7 px": (lambda: nn.Conv2d(512, 512, 3, padding=1), (8, 512, 7, 7)),
    "conv 16->16, 3x3, 32 px": (lambda: nn.Conv2d(16, 16, 3, padding=1), (32, 16, 32, 32)),
    "linear 768->2304": (lambda: nn.Linear(768, 2304), (8, 197, 768)),
    "linear 768->768": (lambda: nn.Linear(768, 768), (8, 197, 768)),
    "linear 3072->768": (lambda: nn.Linear(3072, 768), (2, 256, 3072)),
    "linear 768->768, 32 rows": (lambda: nn.Linear(768, 768), (32, 768)),
}


def compare_ways(rounds: int) -> None:
    """Time every way to run a layer against what the cost model counts for it."""
    print("layer                          counted f/c  timed f/c   chosen     ms f     ms c")
    for name, (build, shape) in SHAPES.items():
        torch.manual_seed(0)
        x = torch.randn(shape).requires_grad_()
        if x.ndim == 4:
            x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        modules = {way: attached_layer(build(), way) for way in ("factored", "composed", "auto")}
        times: dict[str, list[float]] = {way: [] for way in ("factored", "composed")}
        gradient = torch.randn_like(modules["auto"](x))
        for _ in range(rounds + 2):
            for way, collected in times.items():
                begun = time.perf_counter()
                modules[way](x).backward(gradient)
                collected.append(time.perf_counter() - begun)
        layer = modules["auto"].svf_weight.single
        positions = gradient[:, :1].numel() if x.ndim == 4 else x[..., 0].numel()
        counted = count_operations(layer, positions)
        f, c = (1e3 * statistics.median(times[way][2:]) for way in ("factored", "composed"))
        chosen = choose_way(modules["auto"].svf_weight, positions)
        ratio = counted["factored"] / counted["composed"]
        print(f"{name:<30} {ratio:11.2f} {f / c:10.2f}   {chosen:<8} {f:8.2f} {c:8.2f}")


def attached_layer(module: nn.Module, mode: str) -> nn.Module:
    """Attach random factors of the right shape: how long a layer takes does not depend on them."""
    weight = module.weight
    matrix = weight.detach().flatten(1)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    layer = AttachedLayer(
        "weight", LayerFactors(U, S, Vh), shape=tuple(weight.shape), view="matrix",
        dtype=weight.dtype, exact=True,
    )  # fmt: skip
    module.requires_grad_(False)
    install(module, {weight: AttachedWeight([layer], [WHOLE], mode)})
    if weight.ndim == 4:
        module.to(memory_format=torch.channels_last)
    return module


def report(name: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{name}: one step, {torch.get_num_threads()} threads, float32")
    print(
        "regime   layout           trained   s/step  /full  /lora   GFLOP  floor s  memory  /full"
    )
    for row in rows:
        same = {other["regime"]: other for other in rows if other["layout"] == row["layout"]}
        ratios = [
            f"{row['seconds'] / same[key]['seconds']:6.2f}" if key in same else " " * 6
            for key in ("full", "lora:8")
        ]
        memory = ""
        if "memory" in row:
            share = row["memory"] / same["full"]["memory"] if "full" in same else float("nan")
            memory = f"{row['memory'] / 2**20:7.0f} MB {share:5.2f}"
        print(
            f"{row['regime']:<8} {row['layout']:<13} {row['trainable_parameters']:>10,} "
            f"{row['seconds']:8.4f} {' '.join(ratios)} {row['operations'] / 1e9:7.0f} "
            f"{row['floor']:8.4f} {memory}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="some of the models; all by default")
    parser.add_argument("--regimes", default=",".join(REGIMES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ways", action="store_true", help="check the cost model, layer by layer")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "svftool-training"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--layout", default="default", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = QUICK if arguments.quick else CASES
    if arguments.one:
        (name,) = arguments.models
        folder = arguments.cache / name
        print(measure_memory(cases[name], folder, arguments.one, arguments.layout))
        return
    if arguments.ways:
        compare_ways(arguments.rounds)
        return
    results = {}
    for name in chosen(arguments.models, cases):
        folder = prepare(name, cases[name], arguments.cache)
        regimes = arguments.regimes.split(",")
        rows = time_steps(cases[name], folder, regimes, arguments.rounds)
        if arguments.memory:
            for row in rows:
                row["memory"] = memory_of(name, arguments, row["regime"], row["layout"])
        report(name, rows)
        results[name] = rows
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
