"""Trains a small GPT by eager PyTorch and by backend="fa3": the two loss curves lie on each other.

    python benchmarks/train_gpt.py --out curves.csv                # as much as the device allows
    python benchmarks/train_gpt.py --steps 20 --small --out curves.csv

Every run has the same weights and batches. Attention is nanoGPT's manual path with a learned bias
of the distance, so that a captured tensor is trained too. Each sequence is a walk along a hidden
Markov chain, repeated after half its length: the chain is learned first, copying later, by
attention alone.

eager32  eager in float32, which the others are held against
eager    eager under bfloat16 autocast
fa3      the same, compiled

The CSV has a row a step; `--plot` draws it (matplotlib, the extra `docs`), with `--read CSV` an
earlier one without training. The exit status is 1 if fa3 is on average more than twice as far from
eager32 as eager is, plus 0.005, or left an attention alone.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa3_compile import backend
from fa3_compile.report import collect

RUNS = ("eager32", "eager", "fa3")
FLOOR = 0.005


@dataclass
class Shape:
    """Of the model and its batches."""

    layers: int = 4
    heads: int = 8
    width: int = 512
    length: int = 512
    batch: int = 16
    vocabulary: int = 64


SMALL = Shape(layers=2, heads=2, width=32, length=64, batch=8, vocabulary=16)


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.length = shape.heads, shape.length
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.bias = nn.Parameter(torch.zeros(shape.heads, shape.length))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        at = torch.arange(n, device=x.device)
        distance = at[:, None] - at
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores + self.bias[:, distance.clamp(min=0)]
        scores = scores.masked_fill(distance < 0, -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.before, self.between = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.wide = nn.Linear(shape.width, 4 * shape.width)
        self.narrow = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.narrow(F.gelu(self.wide(self.between(x))))


class GPT(nn.Module):
    """Tokens [B, S] -> the mean cross entropy of the next token."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        scores = self.head(self.norm(x))
        return F.cross_entropy(scores[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def batches(shape: Shape, steps: int) -> list[Tensor]:
    """One [B, S] of tokens a step: half a walk along a chain in which four tokens may follow
    each, and the same half again."""
    generator = torch.Generator().manual_seed(1)
    follow = torch.randint(shape.vocabulary, (shape.vocabulary, 4), generator=generator)
    found = []
    for _ in range(steps):
        walk = [torch.randint(shape.vocabulary, (shape.batch,), generator=generator)]
        turns = torch.randint(4, (shape.length // 2, shape.batch), generator=generator)
        for turn in turns[1:]:
            walk.append(follow[walk[-1], turn])
        half = torch.stack(walk, 1)
        found.append(torch.cat([half, half], 1))
    return found


def train(
    name: str, shape: Shape, data: list[Tensor], device: torch.device, options: dict[str, str]
) -> list[float]:
    """The loss of each step. The options are backend="fa3"'s."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = GPT(shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    call = torch.compile(model, backend=backend.fa3, options=options) if name == "fa3" else model
    narrow = name != "eager32"
    cast = torch.autocast(device.type, dtype=torch.bfloat16) if narrow else nullcontext()
    losses = []
    for tokens in data:
        with cast:
            loss = call(tokens.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warm.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def distance(curve: list[float], other: list[float]) -> float:
    """The mean absolute difference of two curves."""
    return sum(abs(a - b) for a, b in zip(curve, other, strict=True)) / len(curve)


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The curves, and how far two of them are from the first."""
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "fa3"
    figure, (losses, differences) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    exact = curves["eager32"]
    for (name, curve), line in zip(curves.items(), ("-", "--", ":"), strict=True):
        losses.plot(curve, line, label=name)
        if name != "eager32":
            off = [abs(a - b) for a, b in zip(curve, exact, strict=True)]
            differences.plot(off, lw=0.8, label=name)
    losses.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    differences.set(xlabel="step", ylabel="distance from eager32", ylim=(0, None))
    for axes in (losses, differences):
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def read(path: Path) -> dict[str, list[float]]:
    """The curves of a CSV that `main` wrote."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in RUNS}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="a model for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernels", help="as the option; a CPU has only the reference")
    parser.add_argument("--out", type=Path, default=Path("train_gpt.csv"))
    parser.add_argument("--plot", type=Path, help="an image of the curves, such as curves.svg")
    parser.add_argument("--read", type=Path, help="the curves of an earlier run, to be drawn")
    arguments = parser.parse_args()
    if arguments.read:
        draw(read(arguments.read), arguments.plot or arguments.read.with_suffix(".svg"))
        return 0
    device = torch.device(arguments.device)
    shape = SMALL if arguments.small else Shape()
    data = batches(shape, arguments.steps)
    kernels = arguments.kernels or ("reference" if device.type == "cpu" else None)
    options = {"kernels": kernels} if kernels else {}
    curves, fused = {}, False
    for name in RUNS:
        begun = time.perf_counter()
        with collect() as report:
            curves[name] = train(name, shape, data, device, options)
        seconds = time.perf_counter() - begun
        print(f"{name:8} {curves[name][0]:.4f} -> {curves[name][-1]:.4f} in {seconds:.1f} s")
        for region in report.regions:
            print(f"         {region.line()}")
        fused = len(report.fused) == len(report.regions)
    with arguments.out.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", *curves])
        for step, losses in enumerate(zip(*curves.values(), strict=True)):
            rows.writerow([step, *(f"{loss:.6f}" for loss in losses)])
    if arguments.plot:
        draw(curves, arguments.plot)
    exact, eager, ours = curves.values()
    allowed = 2 * distance(eager, exact) + FLOOR
    found = distance(ours, exact)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; mean distances:")
    print(f"  eager from eager32 {distance(eager, exact):.5f}")
    print(f"  fa3 from eager32   {found:.5f}, at most {allowed:.5f}")
    print(f"  fa3 from eager     {distance(ours, eager):.5f}")
    return int(not (fused and found <= allowed))


if __name__ == "__main__":
    raise SystemExit(main())
