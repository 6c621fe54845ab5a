"""Exact ways to form scores, by the KL of attention rows: plain, and with the 3 % recomputed that `running` picks.

    python docs/study/representatives.py smollm2-135m
    python docs/study/representatives.py gemma3-270m
    python docs/study/representatives.py qwen.gguf

Every sixth layer, window 38 of 256 tokens, ps4; statistics of the window's own queries and keys, or of window 36. Each
layer gets the exact operands, so that errors don't add up over depth. Printed relative to `center.balance`.
"""

import argparse

import torch

import torchlamp
from torchlamp.arithmetic.accumulators import Accumulator
from torchlamp.arithmetic.transforms import Transform
from torchlamp.arithmetic.transforms.chain import change_operands, fit
from torchlamp.arithmetic.transforms.moments import Moments
from torchlamp.data.text import cut_windows, default_text
from torchlamp.kernels.products import products
from torchlamp.simulation import attention as site

WINDOW, CALIBRATION, EVERY, RATE = 38, 36, 6, 0.03
BASE = "center.balance"


def operands(model, window):
    """Queries (heads, n, size), keys (key heads, n, size) and scaling of every layer."""
    found, original = [], site.score_operands

    def kept(query, key, **others):
        found.append((query[0].contiguous(), key[0].contiguous(), others["scaling"]))
        return original(query, key, **others)

    site.score_operands = kept
    try:
        with torchlamp.lookahead(model, "ps23"), torch.inference_mode():
            model(input_ids=window[None])
    finally:
        site.score_operands = original
    return found


class Layer:
    """The operands of a layer, its exact scores y and probabilities z."""

    def __init__(self, query, key, scaling):
        self.query, self.key, self.scaling = query, key, scaling
        self.visible = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).tril()
        self.y = self.exact(query, key).float()
        self.z = torch.where(self.visible, self.y, -torch.inf).softmax(-1)

    def exact(self, query, key):
        """Float64 scores."""
        rows = query.double().reshape(len(key), -1, query.shape[-1])
        return (rows @ key.double().mT).view(*query.shape[:2], -1) * self.scaling

    def moments(self, weighted=False, query=None):
        """Statistics of queries and keys, each weighted by the sum of its z (1 - z) or not."""
        query = self.query if query is None else query
        rows, weight = query.reshape(len(self.key), -1, query.shape[-1]).double(), self.z * (1 - self.z)
        if not weighted:
            return Moments.of(rows, True), Moments.of(self.key, True)
        by_key = weight.sum(1).view(len(self.key), -1, weight.shape[-1]).sum(1)
        pairs = ((rows, weight.sum(2).view(len(self.key), -1)), (self.key.double(), by_key))
        return tuple(self._weighted(x, w.double()) for x, w in pairs)

    @staticmethod
    def _weighted(x, w):
        of_each = x * w[..., None]
        return Moments(w.sum(1), of_each.sum(1), (x * of_each).sum(1), x.mT @ of_each)

    def error(self, changes, *, query=None, key=None, wide=0, accumulator="ps4"):
        """Errors of scores and what `running` expects of them; the last `wide` terms are summed in float32."""
        query, key = (
            own if given is None else given for own, given in ((self.query, query), (self.key, key))
        )
        changed = change_operands(changes, query, key.mT)
        left, right = changed.left, changed.right.contiguous()
        narrow = left.shape[-1] - wide
        form = Accumulator.parse(accumulator)
        sums, squares = products(
            left[..., :narrow].contiguous(), right[:, :narrow].contiguous(), form.accumulation,
            scaling=self.scaling, squares=True,
        )  # fmt: skip
        error = sums.double() - self.exact(left[..., :narrow], right[:, :narrow].mT)
        return error.float(), squares.sqrt() * form.unit_roundoff / 2 * self.scaling

    def loss(self, error, expected):
        """Mean KL of a row with all errors, and without those of the 3 % that look as if they mattered most."""
        low = torch.where(self.visible, self.y + error, -torch.inf).softmax(-1)
        weight = torch.where(self.visible, 2 * low * (1 - low) * expected, 0.0).flatten()
        mended = error.flatten().clone()
        mended[weight.topk(int(RATE * self.visible.sum() * len(error))).indices] = 0
        return torch.tensor([self._kl(error), self._kl(mended.view(error.shape))])

    def _kl(self, error):
        logits = (
            torch.where(self.visible, self.y, -torch.inf),
            torch.where(self.visible, self.y + error, -torch.inf),
        )
        rows = self.z * (logits[0].log_softmax(-1) - logits[1].log_softmax(-1))
        return float(torch.where(self.visible, rows, 0.0).sum(-1).mean())


def fitted(names, moments):
    """The changes of a chain of transforms."""
    return fit([Transform.parse(name) for name in names.split(".") if name], *moments)


def losses(layer, elsewhere):
    """What every form of the sum loses at one layer."""
    own, weighted, group = layer.moments(), layer.moments(True), len(layer.query) // len(layer.key)
    base, both = fitted(BASE, own), fitted("bicenter.balance", own)
    yield "none", layer.error([])
    for names in ("center", "center.sort", "bicenter.sort"):
        yield names, layer.error(fitted(names, own))
    yield BASE, layer.error(base)
    yield "bicenter.balance", layer.error(both)
    yield "bicenter.balance in ps5", layer.error(both, accumulator="ps5")
    own_keys = layer.key.repeat_interleave(group, 0)
    each = Moments.of(layer.query, True), Moments.of(own_keys, True)
    yield "headwise.bicenter.balance", layer.error(fitted("bicenter.balance", each), key=own_keys)
    for size in (64, 16):
        rest = layer.query - layer.query.unflatten(1, (-1, size)).mean(2).repeat_interleave(size, 1)
        yield (
            f"less means of {size} queries",
            layer.error(fitted(BASE, layer.moments(query=rest)), query=rest),
        )
    for wide in (1, 8):
        yield f"the {wide} largest in float32", layer.error(base, wide=wide)
    for center, names in (("center", BASE), ("bicenter", "bicenter.balance")):
        (mean,) = fitted(center, weighted)
        yield f"{center} weighted", layer.error([mean, *fitted("balance", mean.moments(*own))])
        yield f"{names} weighted", layer.error(fitted(names, weighted))
    yield f"{BASE} of window {CALIBRATION}", layer.error(fitted(BASE, elsewhere.moments()))


def main():
    """Print a line for each form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    model, tokenizer = torchlamp.load(parser.parse_args().model)
    windows = cut_windows(tokenizer, [default_text()], WINDOW + 1, 256)
    layers, others = operands(model, windows[WINDOW]), operands(model, windows[CALIBRATION])
    total = {}
    for number in range(1, len(layers), EVERY):
        layer = Layer(*layers[number])
        for name, (error, expected) in losses(layer, Layer(*others[number])):
            total[name] = total.get(name, 0) + layer.loss(error, expected)
    for name, found in total.items():
        plain, mended = (found / total[BASE]).tolist()
        print(f"{name:36} {plain:8.3f} {mended:8.3f}")


if __name__ == "__main__":
    main()
