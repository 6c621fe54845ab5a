"""What a rule sees: a tile of query rows, or of a layer's output rows, after the low-precision pass."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from torchlamp.rules.answers import Answer, Asked, checked
from torchlamp.rules.block_view import BlockView


class Tile:
    """A tile of rows as the low-precision pass left it; it answers what a rule asks.

    `Tile(...)` is a tile of query rows of one attention layer, or of logits over a vocabulary: what follows is a
    softmax. `ElementTile` is the tile of a linear layer whose sums are read one by one or through a norm. Rules see
    both as this one class and ask for what they need.

    Every tensor has the shape (..., rows, keys); the leading dimensions of an attention are (batch, heads). Floating
    tensors share one dtype (float32 in the attention loop, float64 is welcome in studies) and one device. Rules read
    and never write them. Each `Answer` is given as a tensor or as a function without arguments that returns one; it
    is called when a rule first asks, and once. A rule that asks for an answer that was not given gets a ValueError
    that names it.

    Parameters
    ----------
    scores
        y: the low-precision product, scaled and rounded again; before softcap and mask.
    logits
        What enters the softmax: y, or softcap(y), plus a bias if the model has one. Where not visible this is
        meaningless, as are `scores`, `slope` and the errors.
    probabilities
        z: softmax of the logits over the visible keys (and the attention sink, if any); 0 where not visible.
    visible
        bool: the keys that a row may attend to. A row may have none.
    slope
        d logits / d scores, for softcap c: 1 - (softcap(y) / c)^2. None means 1 everywhere.
    error
        r: expected size of the error of y, see `Running`. With operands that are stored in few bits it holds their
        quantisation error, too: the root of the sum of both squares.
    generator
        Source of random numbers, on the CPU; None unless a rule draws.
    exact
        y in float32, which no hardware could know: for oracles.
    distance
        How far the value of key j is from the row's output o = sum_j z_j v_j, through the output projection and
        relative to the residual stream, see `RunningResidual`.
    layer
        Number of the layer in the model, 0 for the first; the heads of dimension -3 are those of the layer.
    bridge_error
        r from norms, without by-products of the accumulation, see `Bridge`.
    output_distance
        ||v_j - o|| / ||o||, see `RunningOutput`.
    blocks
        The tile's place and operands, for rules that choose blocks.

    Raises
    ------
    ValueError
        If the shapes differ or `visible` is not boolean.
    """

    logits = Asked("what enters the softmax")
    probabilities = Asked("the softmax of the logits")
    error = Asked("the expected rounding error of each score")
    bridge_error = Asked("the error estimate made of norms")
    exact = Asked("the exact scores")
    distance = Asked("the distance of each value from the output, relative to the residual stream")
    output_distance = Asked("the distance of each value from the output, relative to the output")
    condition = Asked("the condition number of each entry (an ElementTile has them)")
    cheap_condition = Asked("the bound of the condition number made of norms (an ElementTile has it)")
    numerator = Asked("the numerator |w|^T |x| of the condition number (an ElementTile has it)")
    cheap_numerator = Asked("the numerator ||w|| ||x|| of the condition number (an ElementTile has it)")

    _blocks: BlockView | None = None

    def __init__(
        self,
        scores: Tensor,
        logits: Tensor,
        probabilities: Tensor,
        visible: Tensor,
        slope: Tensor | None = None,
        error: Answer = None,
        generator: torch.Generator | None = None,
        exact: Answer = None,
        distance: Answer = None,
        layer: int = 0,
        *,
        bridge_error: Answer = None,
        output_distance: Answer = None,
        blocks: BlockView | None = None,
    ) -> None:
        self._blocks = blocks
        answers: dict[str, Answer] = {
            "logits": logits,
            "probabilities": probabilities,
            "error": error,
            "exact": exact,
            "distance": distance,
            "bridge_error": bridge_error,
            "output_distance": output_distance,
        }
        self._set(scores, visible, slope, generator, layer, answers)

    def _set(
        self,
        scores: Tensor,
        visible: Tensor,
        slope: Tensor | None,
        generator: torch.Generator | None,
        layer: int,
        answers: dict[str, Answer],
    ) -> None:
        self.scores, self.visible, self.slope = scores, visible, slope
        self.generator, self.layer = generator, layer
        #: Attribute -> its answer so far; for `Asked`.
        self.answers = answers
        named: dict[str, Answer] = {"visible": visible, "slope": slope, **answers}
        for name, answer in named.items():
            if isinstance(answer, Tensor):
                checked(name, answer, scores)
        if scores.ndim < 2:
            raise ValueError(f"scores has shape {tuple(scores.shape)}: a tile needs at least (rows, keys)")
        if visible.dtype != torch.bool:
            raise ValueError(f"visible has dtype {visible.dtype}: it must be torch.bool")

    def knows(self, name: str) -> bool:
        """Whether the tile has an answer of this name, computed or not."""
        return self.answers.get(name) is not None

    def replace(self, **changes: Any) -> Tile:
        """A tile with some tensors, answers, the generator or the layer changed; nothing is computed.

        Raises
        ------
        TypeError
            A name that is neither an answer nor an attribute.
        ValueError
            As for the class.
        """
        own = {"scores", "visible", "slope", "generator", "layer"}
        for name in changes:
            if name not in own and not isinstance(vars(Tile).get(name), Asked) and name not in self.answers:
                raise TypeError(
                    f"a tile has no {name!r}: it has {', '.join(sorted(own | set(self.answers)))}"
                )
        plain = {name: changes.get(name, getattr(self, name)) for name in own}
        answers = {**self.answers, **{name: value for name, value in changes.items() if name not in own}}
        changed = copy.copy(self)
        changed._set(**plain, answers=answers)
        return changed

    def to(self, device: torch.device | str) -> Tile:
        """Return the tile with its tensors on another device; the generator stays on the CPU."""

        def moved(answer: Answer) -> Answer:
            if answer is None or isinstance(answer, Tensor):
                return None if answer is None else answer.to(device)
            return lambda: answer().to(device)

        tensors = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return self.replace(**tensors, **{name: moved(answer) for name, answer in self.answers.items()})

    @property
    def blocks(self) -> BlockView:
        """The tile's place and operands; ValueError for a tile that was given none."""
        if self._blocks is None:
            raise ValueError(
                "the tile has no `blocks`, its place among all rows and keys: give it a BlockView"
            )
        return self._blocks

    @property
    def gain(self) -> Tensor:
        """2 z (1 - z) s: the l1 change of the probabilities per unit of absolute error in y_j (docs/method.md 3.2)."""
        z = self.probabilities
        gain = (1 - z).mul_(z).mul_(2)
        return gain if self.slope is None else gain.mul_(self.slope)

    @classmethod
    def from_scores(
        cls,
        scores: Tensor,
        visible: Tensor | None = None,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        error: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tile:
        """Build the tile that a plain attention would show to a rule.

        Parameters
        ----------
        scores
            (..., rows, keys), floating.
        visible
            Bool, broadcastable to `scores`; None: everything is visible.
        softcap
            The c of the softcap c tanh(y / c), > 0; None: no softcap.
        sinks
            Logits of the attention sink, broadcastable to (..., rows, 1); None: no sink.
        error
            The r of `error`, broadcastable to `scores`.
        generator
            For the random rules.

        Returns
        -------
        The tile; rows without a visible key have probability 0 everywhere.
        """
        shown = torch.ones_like(scores, dtype=torch.bool) if visible is None else visible.expand(scores.shape)
        logits, slope = scores, None
        if softcap is not None:
            logits = softcap * torch.tanh(scores / softcap)
            slope = 1 - (logits / softcap).square()
        masked = logits.masked_fill(~shown, -torch.inf)
        if sinks is not None:
            masked = torch.cat([masked, sinks.expand(*scores.shape[:-1], 1).to(masked)], dim=-1)
        probabilities = masked.softmax(dim=-1)[..., : scores.shape[-1]].masked_fill(~shown, 0.0)
        expanded = None if error is None else error.expand(scores.shape)
        return Tile(scores, logits, probabilities, shown, slope, expanded, generator)
