"""Look-ahead for compositions that are no transformer: four of them on the handwritten digits of scikit-learn.

`torchlamp.compose(g, f, x, policy)` forms the linear map g with a narrow accumulator, looks ahead through f, forms
again in float32 what f would amplify, and applies f:

- **softmax regression**: g the weights, f the softmax over ten digits;
- **convolution**: g the first convolution of a small net, f all that follows it (ReLU, pooling, a linear layer, the
  softmax), differentiated;
- **kernel regression** (Nadaraya and Watson): exp(-||x - x_k||^2 / 2 h^2) is a softmax of x.x_k / h^2 - ||x_k||^2 / 2
  h^2, since ||x||^2 is the same for all k: g the training images, f the average of their labels with these weights;
- **log-sum-exp pooling**: g as in softmax regression, f a smooth maximum over groups of templates.

`python examples/compose_digits.py [--seeds N]` takes less than a minute on 2 cores and needs the extra "study". The
error is the mean over test images of ||f - f32|| / ||f32|| in the 1-norm. Every rule stands beside as many sums chosen
at random. What comes out is in docs/compose.md.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchlamp import Accumulator, compose
from torchlamp.simulation.statistics import Statistics

ACCUMULATORS = ("ps2", "ps4", "ps7")
RULES = ("none", "strict:0.05", "strict:0.01", "running:0.01", "running:0.002")


@dataclass(frozen=True)
class Composition:
    """A linear map, what follows it, and inputs to try it on."""

    name: str
    g: nn.Module | Tensor
    f: Callable[[Tensor], Tensor]
    x: Tensor


@dataclass(frozen=True)
class Figures:
    """What one way of forming a composition's sums gives."""

    composition: str
    policy: str
    #: Recomputed sums / all, and the cost of all: operations, those of float32 being 1.
    rate: float
    cost: float
    #: Of the rule, and of as many sums chosen at random.
    error: float
    random_error: float


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training images float32 (images, 64), their labels int64 (images,), test images."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, _ = train_test_split(
        images, labels, test_size=0.25, random_state=seed, stratify=labels
    )
    scale = train.std()
    return (
        torch.as_tensor(train / scale).float(),
        torch.as_tensor(train_labels),
        torch.as_tensor(test / scale).float(),
    )


def fit(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 20) -> None:
    """Train a classifier with Adam in float32."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def average_labels(y: Tensor, targets: Tensor) -> Tensor:
    """Labels (keys, classes) averaged with the softmax of y (rows, keys)."""
    return y.softmax(-1) @ targets


def smooth_maximum(y: Tensor, groups: int) -> Tensor:
    """Log-sum-exp of each group of components: (rows, groups)."""
    return y.view(len(y), groups, -1).logsumexp(-1)


def compositions(seed: int) -> list[Composition]:
    """The four, trained on one split of the digits."""
    torch.manual_seed(seed)
    train, labels, test = digits(seed)
    regression = nn.Linear(64, 10)
    fit(regression, train, labels)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
    )
    fit(net, train.view(-1, 1, 8, 8), labels)
    width = 1.5
    memory = nn.Linear(64, len(train))
    with torch.no_grad():
        memory.weight.copy_(train / width**2)
        memory.bias.copy_(-train.square().sum(1) / (2 * width**2))
    templates = nn.Linear(64, 40)
    pooled = nn.Sequential(templates, _Pool(10))
    fit(pooled, train, labels)
    one_hot = nn.functional.one_hot(labels, 10).float()
    return [
        Composition("softmax regression", regression, nn.Softmax(-1), test),
        Composition("convolution", net[0], nn.Sequential(*net[1:], nn.Softmax(-1)), test.view(-1, 1, 8, 8)),
        Composition("kernel regression", memory, partial(average_labels, targets=one_hot), test),
        Composition("log-sum-exp pooling", templates, partial(smooth_maximum, groups=10), test),
    ]


class _Pool(nn.Module):
    """`smooth_maximum` as a module, for training."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, y: Tensor) -> Tensor:
        """The pooled groups."""
        return smooth_maximum(y, self.groups)


def cost(accumulator: str, rule: str, rate: float) -> float:
    """Operations of g, those of float32 being 1: the accumulator's share of 32 bits, twice with sums of squares."""
    grid = Accumulator.parse(accumulator).format.grid
    exponent_bits = math.ceil(math.log2(grid.max_exponent - grid.min_exponent + 1))
    narrow = (1 + exponent_bits + grid.mantissa_bits) / 32
    return narrow * (2 if rule.startswith("running") else 1) + rate


def measure(c: Composition, accumulator: str, rule: str, seed: int) -> Figures:
    """Error of one policy, and of its random control, against float32."""
    with torch.no_grad():
        exact = c.f(c.g(c.x) if isinstance(c.g, nn.Module) else c.x @ c.g.T).flatten(1)

    def error(policy: str, statistics: Statistics | None = None) -> float:
        generator = torch.Generator().manual_seed(seed)
        found = compose(c.g, c.f, c.x, policy, statistics=statistics, generator=generator).flatten(1)
        return float(((found - exact).abs().sum(1) / exact.abs().sum(1)).mean())

    statistics = Statistics()
    found = error(f"{accumulator}+{rule}", statistics)
    rate = statistics.recompute_rate
    random_error = error(f"{accumulator}+random:{rate}") if rate else found
    return Figures(c.name, f"{accumulator}+{rule}", rate, cost(accumulator, rule, rate), found, random_error)


def study(seeds: int) -> Any:
    """A pandas table: mean and standard error over the seeds, a row for each composition and policy."""
    import pandas

    found = [
        measure(c, accumulator, rule, seed)
        for seed in range(seeds)
        for c in compositions(seed)
        for accumulator in ACCUMULATORS
        for rule in RULES
    ]
    table = pandas.DataFrame([vars(f) for f in found])
    return table.groupby(["composition", "policy"], sort=False).agg(["mean", "sem"])


def show(table: Any) -> None:
    """Print it, one block for each composition."""
    from rich.console import Console
    from rich.table import Table

    printed = Table(caption="± standard error over the seeds")
    printed.add_column("composition", no_wrap=True)
    for heading in ("policy", "recomputed", "cost", "error", "at random"):
        printed.add_column(heading, no_wrap=True, justify="left" if heading == "policy" else "right")
    for name, rows in table.groupby("composition", sort=False):
        for (_, policy), row in rows.iterrows():
            errors = [f"{row[k, 'mean']:.1e} ± {row[k, 'sem']:.0e}" for k in ("error", "random_error")]
            printed.add_row(
                str(name), policy, f"{row['rate', 'mean']:.1%}", f"{row['cost', 'mean']:.2f}", *errors
            )
            name = ""
        printed.add_section()
    console = Console(emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, 110)
    console.print(printed)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="splits and trained models (default: 5)")
    chosen = parser.parse_args()
    if chosen.seeds < 2:
        parser.error(f"--seeds {chosen.seeds}: at least 2 are needed for a standard error")
    show(study(chosen.seeds))


if __name__ == "__main__":
    main()
