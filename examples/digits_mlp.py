"""Mixed-precision accumulation in multilayer perceptrons: cost against accuracy on handwritten digits.

The setting of El Arar, Filip, Mary and Riccietti (arXiv 2503.15568), the predecessor of LAMP. Each hidden layer is
h_l = phi(W_l h_{l-1} + b_l). Its inner products are formed with a narrow accumulator; from that output the condition
number of each, kappa_ip = (|w_i|^T |h| + |b_i|) / |w_i^T h + b_i|, times that of the activation, kappa_phi, is
estimated; where the product exceeds T the inner product is formed again in float32 (their Algorithm 1, here the rule
`condition:T`). The last layer, 2 % of the operations, is float32 throughout: no activation follows it.
The perceptrons are trained here, in float32, on scikit-learn's digits: 1797 images of 8 x 8.

`python examples/digits_mlp.py [--seeds N] [--figure digits.svg]` takes about half a minute on 2 cores and needs the
extra "study". What comes out, and where the method doesn't win, is in docs/tasks.md.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchlamp import Accumulator
from torchlamp.simulation.activation import activated
from torchlamp.simulation.linear import linear

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}
ACCUMULATORS = ("e5m2", "e4m3fn", "ps4", "ps5", "ps7", "ps10", "fp32")
THRESHOLDS = (2, 4, 8, 16)
#: Nothing recomputed; Algorithm 1; as many of each image and layer at random; Algorithm 1 with the cheap numerator; the
#: expected rounding error weighed by the next layer, and its random control.
RULES = (
    "none",
    *(f"condition:{t}" for t in THRESHOLDS),
    *(f"random-like:condition:{t}" for t in THRESHOLDS),
    *(f"condition-cheap:{t}" for t in THRESHOLDS),
    *(f"running:{t}" for t in (0.03, 0.01, 0.003)),
)
#: The accumulators that are also run with these rules; the others are uniform competitors.
MIXED = ACCUMULATORS[:3]
#: The rules of the printed table.
SHOWN = ("none", "condition:2", "condition:4", "random-like:condition:4", "condition-cheap:4", "running:0.01")
#: Images, hidden layers, digits.
WIDTHS = (64, 128, 128, 64, 10)


@dataclass(frozen=True)
class Figures:
    """What one way of forming the inner products gives on the test images of one perceptron."""

    activation: str
    accumulate: str
    rule: str
    seed: int
    #: Recomputed inner products / all, over the hidden layers.
    rate: float
    #: Operations, those of all products in float32 being 1; see `cost`.
    cost: float
    #: Mean over images and hidden units of |h - h32| / max(|h|, |h32|), h32 in float32: at most 2.
    component: float
    #: Mean over the images of ||y - y32|| / ||y32||, y the ten outputs; infinite after an overflow.
    error: float
    #: Share of the images recognised.
    accuracy: float


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, their labels, test images, their labels: float32 (images, 64), int64 (images,)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, random_state=seed, stratify=labels)
    train_images, test_images, train_labels, test_labels = (torch.as_tensor(part) for part in parts)
    mean, deviation = train_images.mean(), train_images.std()
    normal = [((part - mean) / deviation).float() for part in (train_images, test_images)]
    return normal[0], train_labels, normal[1], test_labels


def train(activation: str, images: Tensor, labels: Tensor, seed: int, epochs: int = 30) -> list[nn.Linear]:
    """The layers of a perceptron trained with Adam in float32."""
    torch.manual_seed(seed)
    layers = [nn.Linear(*sizes) for sizes in pairwise(WIDTHS)]
    optimizer = torch.optim.Adam([p for layer in layers for p in layer.parameters()], lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            h = images[batch]
            for layer in layers[:-1]:
                h = ACTIVATIONS[activation](layer(h))
            optimizer.zero_grad()
            nn.functional.cross_entropy(layers[-1](h), labels[batch]).backward()
            optimizer.step()
    return layers


def infer(
    layers: Sequence[nn.Linear], activation: str, images: Tensor, accumulate: str, rule: str, seed: int = 0
) -> tuple[Tensor, Tensor, float]:
    """Run the layers with such inner products.

    Returns
    -------
    hidden : Tensor
        float32 (images, hidden units): the outputs of all hidden layers side by side.
    y : Tensor
        float32 (images, 10).
    rate : float
        Recomputed inner products / all.
    """
    phi = ACTIVATIONS[activation]
    generator = torch.Generator().manual_seed(seed)
    h, hidden, selected, eligible = images, [], 0, 0
    for layer, following in pairwise(layers):
        look = activated(phi, following.weight.detach().norm(dim=0))
        result = linear(
            h,
            layer.weight,
            layer.bias,
            accumulator=accumulate,
            rule=rule,
            next_function=look,
            generator=generator,
        )
        selected += int(result.selected.sum())
        eligible += result.eligible * len(images)
        h = phi(result.output)
        hidden.append(h)
    last = linear(h, layers[-1].weight, layers[-1].bias, accumulator="fp32", rule="none")
    return torch.cat(hidden, dim=1), last.output, selected / eligible


def cost(accumulate: str, rule: str, rate: float) -> float:
    """Operations of the hidden layers' products, those of float32 being 1.

    A narrow operation costs its accumulator's share of 32 bits; what is recomputed costs a float32 product on top.
    The exact numerator |W| |h| of `condition` is a second narrow product, the norms of `condition-cheap` cost nothing;
    `running` sums squares along the way, counted as another narrow product.
    """
    grid = Accumulator.parse(accumulate).format.grid
    exponent_bits = (grid.max_exponent - grid.min_exponent + 1).bit_length()
    narrow = (1 + exponent_bits + grid.mantissa_bits) / 32
    return narrow * (2 if rule.startswith(("condition:", "running:")) else 1) + rate


def measure(
    activations: Iterable[str] = tuple(ACTIVATIONS),
    accumulators: Iterable[str] = ACCUMULATORS,
    rules: Iterable[str] = RULES,
    seeds: int = 5,
    epochs: int = 30,
) -> list[Figures]:
    """Train a perceptron for every seed and activation, and run its test images in every way.

    The seed sets the split, the training and the random control.
    """
    runs = [(a, rule) for a in accumulators for rule in (rules if a in MIXED else ["none"])]
    found = []
    for seed in range(seeds):
        train_images, train_labels, images, labels = digits(seed)
        for activation in activations:
            layers = train(activation, train_images, train_labels, seed, epochs)
            exact, outputs, _ = infer(layers, activation, images, "fp32", "none")
            for accumulate, rule in runs:
                hidden, y, rate = infer(layers, activation, images, accumulate, rule, seed)
                largest = torch.maximum(hidden.abs(), exact.abs())
                component = torch.where(largest == 0, 0, (hidden - exact).abs() / largest).nan_to_num(
                    torch.inf
                )
                error = (y - outputs).norm(dim=1) / outputs.norm(dim=1)
                found.append(
                    Figures(
                        activation, accumulate, rule, seed, rate, cost(accumulate, rule, rate),
                        float(component.nan_to_num(2).mean()), float(error.nan_to_num(torch.inf).mean()),
                        float((y.argmax(1) == labels).float().mean()),
                    )
                )  # fmt: skip
    return found


def averages(figures: Sequence[Figures]) -> Any:
    """A pandas table with mean and standard error over the seeds, a row for every way, in the order of the runs."""
    import pandas

    table = pandas.DataFrame([asdict(f) for f in figures])
    measured = [field.name for field in fields(Figures)][4:]
    return table.groupby(["activation", "accumulate", "rule"], sort=False)[measured].agg(["mean", "sem"])


def show(table: Any) -> None:
    """Print the rows of `SHOWN`."""
    from rich.console import Console
    from rich.table import Table

    printed = Table(caption="± standard error over the seeds")
    for heading in ("", "accumulator", "rule"):
        printed.add_column(heading, no_wrap=True)
    for heading in ("recomputed", "cost", "component error", "output error", "accuracy"):
        printed.add_column(heading, justify="right", no_wrap=True)
    for group, rows in table.groupby(["activation", "accumulate"], sort=False):
        for (_, _, rule), row in rows.iterrows():
            if rule in SHOWN:
                errors = [
                    f"{row[name, 'mean']:.1e} ± {row[name, 'sem']:.0e}" for name in ("component", "error")
                ]
                recognised = f"{row['accuracy', 'mean']:.1%} ± {row['accuracy', 'sem']:.1%}"
                rate, price = f"{row['rate', 'mean']:.1%}", f"{row['cost', 'mean']:.2f}"
                printed.add_row(*group, rule, rate, price, *errors, recognised)
        printed.add_section()
    console = Console(emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(printed)


def draw(table: Any, path: Path) -> None:
    """Both errors against cost, one column for each activation, as SVG (or what the file's ending says)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.fonttype"] = "none"

    families = {
        "condition:": ("o", "-"), "condition-cheap:": ("s", "-."), "random-like:": ("x", ":"), "running:": ("^", "--")
    }  # fmt: skip
    names = list(dict.fromkeys(table.index.get_level_values("activation")))
    figure, axes = pyplot.subplots(2, len(names), figsize=(5 * len(names), 8), squeeze=False, sharex=True)
    for column, activation in enumerate(names):
        part = table.loc[activation]
        for row, (measured, label) in enumerate(
            {
                "component": "mean relative error of the hidden components",
                "error": "relative error of the outputs",
            }.items()
        ):
            axis = axes[row][column]
            uniform = part.xs("none", level="rule")
            uniform = uniform[uniform[measured, "mean"] > 0].sort_values(("cost", "mean"))
            axis.plot(uniform["cost", "mean"], uniform[measured, "mean"], "k.-", label="uniform")
            for accumulate, point in uniform.iterrows():
                axis.annotate(accumulate, (point["cost", "mean"], point[measured, "mean"]), fontsize=8)
            for color, accumulate in enumerate(a for a in MIXED if a in uniform.index):
                for family, (marker, line) in families.items():
                    rules = [r for r in part.loc[accumulate].index if r.startswith(family)]
                    curve = part.loc[accumulate].loc[rules].sort_values(("cost", "mean"))
                    if len(curve):
                        axis.errorbar(
                            curve["cost", "mean"], curve[measured, "mean"], yerr=curve[measured, "sem"],
                            marker=marker, linestyle=line, color=f"C{color}", label=f"{accumulate} {family[:-1]}",
                        )  # fmt: skip
            axis.set(
                yscale="log", title=activation if row == 0 else None, ylabel=label if column == 0 else None
            )
            axis.set_xlabel("operations, float32 = 1" if row == 1 else "")
            axis.grid(alpha=0.3)
    curves = axes[0][0].get_legend_handles_labels()
    figure.legend(*curves, loc="lower center", ncols=5, fontsize=7)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Measure, print, and draw if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="perceptrons for each activation (default: 5)")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="also draw error against cost, as .svg or .png"
    )
    chosen = parser.parse_args()
    if chosen.seeds < 1:
        parser.error(f"--seeds {chosen.seeds}: at least 1 is needed")
    if chosen.figure and not chosen.figure.resolve().parent.is_dir():
        parser.error(f"--figure {chosen.figure}: there is no folder {chosen.figure.parent}")
    table = averages(measure(seeds=chosen.seeds))
    show(table)
    if chosen.figure:
        draw(table, chosen.figure)


if __name__ == "__main__":
    main()
