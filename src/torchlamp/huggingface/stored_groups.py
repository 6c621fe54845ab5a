"""Linear layers of a simulated policy whose weights are stored: what they compute in the place of `LinearGroup`."""

from typing import Any

import torch
from torch import Tensor, nn

from torchlamp.huggingface.site_forwards import LinearGroup, linear_map
from torchlamp.simulation.linear import LinearResult
from torchlamp.simulation.stored_linear import (
    StoredVocabulary,
    StoredWeights,
    changed_group,
    for_the_top,
    stored_linears,
)
from torchlamp.simulation.stored_mlp import (
    Neurons,
    OutputSize,
    StoredColumns,
    column_norms,
    stored_down,
    stored_neurons,
)


class StoredGroup(LinearGroup):
    """Layers whose outputs are looked at one by one: rows that the rule picks are read in full."""

    _stored: list[StoredWeights] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a deep copy takes over: not the stored weights, which it makes anew of its own."""
        return {**super().__getstate__(), "_stored": None}

    def forget(self) -> None:
        """Drop the copies, too, which are made again of the weights."""
        super().forget()
        self._stored = None

    @property
    def stored(self) -> list[StoredWeights]:
        """The modules' linear maps with their copies, made once."""
        if self._stored is None:
            operand = self.policy.precision.operand
            self._stored = [StoredWeights.store(weights, operand) for weights in self.maps]
        return self._stored

    def representative(self, x: Tensor) -> tuple[Tensor, list[StoredWeights]]:
        """Inputs and stored maps, changed by the site's transforms if it has any."""
        precision = self.policy.precision
        if not precision.transforms:
            return x, self.stored
        moments = self.attached.input_moments(self.site, self.layer, x)
        return changed_group(x, self.maps, precision.transforms, precision.operand, moments)

    def compute(self, x: Tensor, generator: torch.Generator | None) -> LinearResult:
        """All layers of the group from their copies."""
        x, stored = self.representative(x)
        return stored_linears(
            x,
            stored,
            rule=self.policy.rule,
            next_function=self.looks_ahead(),
            generator=generator,
            layer=self.layer,
        )


class StoredHead(StoredGroup):
    """The LM head, whose largest logit is that of full precision."""

    def compute(self, x: Tensor, generator: torch.Generator | None) -> LinearResult:
        """The logits; tokens that could be the largest are read in full, too."""
        x, stored = self.representative(x)
        return stored_linears(
            x,
            stored,
            rule=self.policy.rule,
            next_function=StoredVocabulary(),
            always=for_the_top(stored[0]),
            generator=generator,
            layer=self.layer,
        )


class StoredNeurons(StoredGroup):
    """Gate and up projection: the rule picks neurons, whose rows are read in full."""

    #: The activation, whether there is a gate, and the module of the down projection.
    phi: nn.Module
    gated: bool
    down: nn.Module
    #: Where the norm of the output is left for the down projection; None: it isn't stored.
    size: OutputSize | None = None
    _neurons: Neurons | None = None

    def __getstate__(self) -> dict[str, Any]:
        """As for every stored group."""
        return {**super().__getstate__(), "_neurons": None}

    def reads(self) -> list[nn.Module]:
        """The projections, and the down projection, through which a neuron counts."""
        return [*super().reads(), self.down]

    def compute(self, x: Tensor, generator: torch.Generator | None) -> LinearResult:
        """Gate and up, some neurons in full."""
        if self._neurons is None:
            self._neurons = Neurons(self.phi, self.gated, column_norms(linear_map(self.down)))
        x, stored = self.representative(x)
        return stored_neurons(
            x,
            stored,
            self._neurons,
            rule=self.policy.rule,
            size=self.size,
            generator=generator,
            layer=self.layer,
        )


class StoredDown(StoredGroup):
    """The down projection: the rule picks columns, which are read in full."""

    size: OutputSize | None = None
    _columns: StoredColumns | None = None

    def __getstate__(self) -> dict[str, Any]:
        """As for every stored group."""
        return {**super().__getstate__(), "_columns": None}

    def forget(self) -> None:
        """As for every stored group."""
        super().forget()
        self._columns = None

    def compute(self, x: Tensor, generator: torch.Generator | None) -> LinearResult:
        """The output, some columns in full."""
        x, stored = self.representative(x)
        if self._columns is None or self.policy.precision.transforms:
            self._columns = StoredColumns(stored[0])
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        return stored_down(
            x,
            self._columns,
            rule=self.policy.rule,
            size=None if self.size is None else self.size.take(rows),
            generator=generator,
            layer=self.layer,
        )
