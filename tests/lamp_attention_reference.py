"""LampAttention for the queries of one warp in plain loops over Python numbers: the definition, without tensors.

Scores come in as numbers of their formats. Rounding is done in exact rationals, sums of exponentials by `math.fsum`.
"""

import functools
import itertools
import math
import struct
from fractions import Fraction

INFINITY = math.inf


def single(x):
    """The nearest float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


@functools.cache
def to_format(x, bits, smallest, largest, lost=0):
    """|x| to the nearest number with so many mantissa bits and exponents, ties to even; saturating. NaN stays."""
    if math.isnan(x):
        return x
    top = (2 ** (bits + 1) - 1 - lost) * 2.0 ** (largest - bits)
    if math.isinf(x):
        return math.copysign(top, x)
    if x == 0:
        return 0.0
    exponent = max(math.frexp(abs(x))[1] - 1, smallest)
    quantum = Fraction(2) ** (exponent - bits)
    return math.copysign(min(float(round(Fraction(abs(x)) / quantum) * quantum), top), x)


def narrow(x):
    """To e4m3fn, saturating."""
    return to_format(x, 3, -6, 8, lost=1)


@functools.cache
def exponential(maximum, y, recomputed):
    """exp(y - maximum) as the low path or the high path has it."""
    if maximum == -INFINITY:
        return 0.0
    bits = 11 if recomputed else 3
    base = maximum if recomputed else narrow(maximum)
    shift = base - y
    if math.isnan(shift):
        return shift
    shift = to_format(max(shift, 0.0), bits, -14, 15)
    return to_format(math.exp(-shift), bits, -30, 0)


def largest(values):
    """The largest number, NaN if there is one, -inf if there is none."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values, default=-INFINITY)


def exp32(x):
    return single(math.exp(x)) if x < 700 else INFINITY


class Warp:
    """The rows of a warp, tile by tile. `margin[i][j]` is the bound that the option /norms multiplies."""

    def __init__(
        self, low, high, visible, *, delta, tau, margin=None, greedy=False, compact=False, sink=None
    ):
        self.low, self.high, self.visible, self.margin = low, high, visible, margin
        self.delta, self.tau, self.greedy, self.compact = delta, tau, greedy, compact
        self.rows, self.keys = range(len(low)), len(low[0]) if low else 0
        self.maximum = [-INFINITY if sink is None else sink for _ in self.rows]
        self.total = [0.0 if sink is None else 1.0 for _ in self.rows]
        #: (row, key) -> recomputed, recomputed by the second stage.
        self.chosen, self.late = set(), set()
        #: (row, key) -> what its exponential has been multiplied by since.
        self.scales = {}
        self.weights = [[0.0] * self.keys for _ in self.rows]

    def run(self, offset=0):
        for start in range(-offset, self.keys, 64):
            self.tile(start)
        for i in self.rows:
            for j in self.seen(i, range(self.keys)):
                self.weights[i][j] = self.divided(
                    single(self.weights[i][j] * self.scales[i, j]), self.total[i]
                )
        return self

    @staticmethod
    def divided(a, b):
        return math.nan if b == 0 or math.isnan(b) else single(a / b)

    def seen(self, i, keys):
        return [j for j in keys if 0 <= j < self.keys and self.visible[i][j]]

    def tile(self, start):
        blocks = [range(start + 16 * s, start + 16 * s + 16) for s in range(4)]
        maximum, first = list(self.maximum), set()
        if self.delta is None:
            for i in self.rows:
                maximum[i] = largest([maximum[i], *(self.low[i][j] for b in blocks for j in self.seen(i, b))])
        else:
            for s in sorted(range(4), key=lambda s: -self.threat(blocks[s])):
                if any(
                    not self.stays(i, blocks[s], maximum[i]) for i in self.rows if self.seen(i, blocks[s])
                ):
                    first.add(s)
                    for i in self.rows:
                        maximum[i] = largest(
                            [maximum[i], *(self.high[i][j] for j in self.seen(i, blocks[s]))]
                        )
        second = self.second_stage(blocks, maximum, first)
        if self.compact and len(first | second) >= 2:
            first, second = {s for s in range(4) if self.any_sees(blocks[s])}, set()
            for i in self.rows:
                again = [self.high[i][j] for s in first for j in self.seen(i, blocks[s])]
                maximum[i] = largest([self.maximum[i], *again])
        self.finish(blocks, maximum, first, second)

    def any_sees(self, block):
        return any(self.seen(i, block) for i in self.rows)

    def threat(self, block):
        worst = -INFINITY
        for i in self.rows:
            if self.seen(i, block):
                difference = largest(self.low[i][j] for j in self.seen(i, block)) - self.maximum[i]
                worst = max(worst, INFINITY if math.isnan(difference) else difference)
        return worst

    def stays(self, i, block, maximum):
        seen = self.seen(i, block)
        unit = abs(maximum) if self.margin is None else largest(self.margin[i][j] for j in seen)
        top = largest(self.low[i][j] for j in seen)
        return maximum > top + self.delta * unit

    def step(self, i, blocks, maximum, recomputed):
        """Exponentials by key, what the earlier ones are multiplied by, and the new sum."""
        found = {
            j: exponential(maximum, (self.high if s in recomputed else self.low)[i][j], s in recomputed)
            for s, block in enumerate(blocks)
            for j in self.seen(i, block)
        }
        factor = 0.0 if self.maximum[i] == -INFINITY else exp32(self.maximum[i] - maximum)
        return found, factor, single(factor * self.total[i] + math.fsum(found.values()))

    def second_stage(self, blocks, maximum, first):
        cost, budget = [], []
        for i in self.rows:
            found, _, omega = self.step(i, blocks, maximum[i], first)
            cost.append([math.fsum((omega - found[j]) * found[j] for j in self.seen(i, b)) for b in blocks])
            budget.append(self.tau * omega * omega)
        free = [s for s in range(4) if s not in first]

        def fits(low):
            return all(sum(cost[i][s] for s in low) <= budget[i] for i in self.rows)

        if self.greedy:
            low = []
            for s in sorted(free, key=lambda s: max(self.share(cost[i][s], budget[i]) for i in self.rows)):
                if fits([*low, s]):
                    low.append(s)
        else:
            subsets = (c for n in range(len(free), -1, -1) for c in itertools.combinations(free, n))
            low = next(c for c in subsets if not c or fits(c))
        return {s for s in free if s not in low and self.any_sees(blocks[s])}

    @staticmethod
    def share(cost, budget):
        if budget > 0:
            return cost / budget
        return 0.0 if cost == 0 else INFINITY

    def finish(self, blocks, maximum, first, second):
        for i in self.rows:
            found, factor, self.total[i] = self.step(i, blocks, maximum[i], first | second)
            for key in [key for key in self.scales if key[0] == i]:
                self.scales[key] = single(self.scales[key] * factor)
            for s, block in enumerate(blocks):
                for j in self.seen(i, block):
                    self.weights[i][j], self.scales[i, j] = found[j], 1.0
                    if s in first | second:
                        self.chosen.add((i, j))
                    if s in second:
                        self.late.add((i, j))
            self.maximum[i] = maximum[i]
