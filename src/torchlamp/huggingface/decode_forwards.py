"""What modules of a prepared model run: single tokens, steps and prompts, from low-bit copies."""

import inspect
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchlamp.decoding.head import LowBitHead
from torchlamp.decoding.mlp import LowBitMlp, activate
from torchlamp.huggingface.copies import Copies
from torchlamp.huggingface.file_weights import FileWeights
from torchlamp.huggingface.forward_only import forward_only
from torchlamp.huggingface.lookahead_cache import NAME, LookaheadCache, reading
from torchlamp.huggingface.plain_modules import PlainModules, is_known
from torchlamp.huggingface.site_forwards import Forward, check_float32, own_forward
from torchlamp.huggingface.sites import Sites
from torchlamp.kernels.constants import ACTIVATIONS, ROWS
from torchlamp.kernels.full_rows import linear
from torchlamp.kernels.low_bit_matrix import LowBitMatrix, serves_many
from torchlamp.policy.decodable import Settings
from torchlamp.policy.site import Site
from torchlamp.policy.sites import SITES
from torchlamp.simulation.statistics import Statistics


class DecodeForward(Forward):
    """A module's forward for tokens (batch, count, size); the module's own for everything else.

    Where many vectors aren't served (`serves_many`), that is for a count of 1 alone.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._class, self._function = type(module), type(module).forward
        self._known = is_known(self._class)
        #: Told what is read in full, where the model's own weights stay in their file.
        self.weights: FileWeights | None = None

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward without us."""
        result = super().original(*args, **kwargs)
        if self.weights is not None:
            self.weights.read_matrices(self.module)
        return result

    def note_rows(self, count: int) -> None:
        """Rows of the module's own weights that its kernel has read."""
        if self.weights is not None and count:
            self.weights.read_rows(count)

    def run_(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The low-bit kernel, or the module."""
        served = x.ndim == 3 and (x.shape[1] == 1 or serves_many())
        if not served or args or kwargs or not self.is_plain():
            return self.original(x, *args, **kwargs)
        check_float32(self.module, x)
        y = self.decode(x.detach().reshape(x.shape[0] * x.shape[1], x.shape[2]).contiguous())
        return forward_only(y.view(*x.shape[:2], y.shape[1]), x)

    def is_plain(self) -> bool:
        """Whether the kernel may stand in the place of the module's forward: it is torch's or transformers' own."""
        kind = type(self.module)
        unchanged = kind is self._class and kind.forward is self._function
        return self.own is None and self._known and unchanged

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """float32 (vectors, columns) to (vectors, outputs)."""


class LinearDecode(DecodeForward):
    """A linear layer: some rows of the low-bit matrix of all layers that read the same input."""

    def __init__(self, module: nn.Module, group: "LinearsDecode", index: int) -> None:
        super().__init__(module)
        self.group, self.index = group, index

    def decode(self, x: Tensor) -> Tensor:
        """float32 (vectors, columns) to (vectors, outputs)."""
        return self.group.output(x, self.index)


class LinearsDecode:
    """Linear layers with the same input as one low-bit matrix: their rows one below the other."""

    def __init__(
        self, sites: Sites, modules: list[nn.Module], settings: Settings, copies: Copies, name: str
    ) -> None:
        self.modules = modules
        maps = [sites.weights(module) for module in modules]
        rows = [m.matrix.detach().T for m in maps]
        self.sizes = [len(r) for r in rows]
        bits, columns = settings.bits, rows[0].shape[1]

        def matrix(name: str, parts: list[Tensor]) -> LowBitMatrix:
            total = sum(map(len, parts))
            return copies.take(
                name,
                lambda kept: LowBitMatrix.of(kept, bits, total, columns),
                lambda: LowBitMatrix.pack(parts[0] if len(parts) == 1 else torch.cat(parts), bits),
            )

        self.matrix = matrix(name, rows)
        biases = [
            torch.zeros(n) if m.bias is None else m.bias.detach()
            for m, n in zip(maps, self.sizes, strict=True)
        ]
        self.bias = torch.cat(biases) if any(m.bias is not None for m in maps) else None
        #: Each layer's rows as a matrix of its own, over the same memory where they begin a block of rows.
        if any(size % ROWS for size in self.sizes[:-1]):
            self.parts = [matrix(f"{name}.{number}", [part]) for number, part in enumerate(rows)]
            self.bytes = self.matrix.bytes + sum(part.bytes for part in self.parts)
        else:
            self.parts, self.bytes = self.matrix.split(self.sizes), self.matrix.bytes

    def output(self, x: Tensor, index: int) -> Tensor:
        """One layer's float32 (vectors, outputs) of (vectors, columns)."""
        y = self.parts[index].products(x)
        return y if self.bias is None else y + torch.split(self.bias, self.sizes)[index]


class MlpDecode(DecodeForward):
    """A gated MLP."""

    def __init__(
        self,
        module: nn.Module,
        mlp: LowBitMlp,
        thresholds: tuple[float, float],
        statistics: Statistics,
        number: int,
        given: Mapping[nn.Module, Forward],
    ) -> None:
        super().__init__(module)
        self.mlp, self.thresholds, self.statistics, self.number = mlp, thresholds, statistics, number
        #: The projections and the activation, which the kernel runs unseen.
        self.inside = PlainModules(module, given)

    def is_plain(self) -> bool:
        """Whether the MLP is of a known class, and nobody watches or has changed its projections or activation."""
        return super().is_plain() and self.inside.hold()

    def decode(self, x: Tensor) -> Tensor:
        """float32 (vectors, columns) to (vectors, outputs)."""
        y, recomputed, read = self.mlp.run(x, *self.thresholds)
        self.note_rows(2 * recomputed + read)
        eligible = len(x) * self.mlp.gate.rows
        self.statistics.record("mlp_up", self.number, recomputed, eligible)
        self.statistics.record("mlp_down", self.number, read, eligible)
        return y


class HeadDecode(DecodeForward):
    """The LM head."""

    def __init__(
        self, module: nn.Module, head: LowBitHead, threshold: float, top: int, statistics: Statistics
    ) -> None:
        super().__init__(module)
        self.head, self.threshold, self.top, self.statistics = head, threshold, top, statistics

    def decode(self, x: Tensor) -> Tensor:
        """float32 (vectors, columns) to logits (vectors, tokens)."""
        logits, _, recomputed = self.head.run(x, self.threshold, self.top)
        self.note_rows(recomputed)
        self.statistics.record("lm_head", -1, recomputed, logits.numel())
        return logits


class AttentionDecode(Forward):
    """An attention module's own forward, whose attention function finds its layer of a look-ahead cache."""

    def __init__(self, module: nn.Module, config: Any, number: int) -> None:
        super().__init__(module)
        self.config, self.number = config, int(getattr(module, "layer_idx", number))

    def run_(self, *args: Any, **kwargs: Any) -> Any:
        """The module, reading its layer."""
        # Architectures have different names for the keyword.
        caches = [value for value in (*kwargs.values(), *args) if isinstance(value, LookaheadCache)]
        if not caches or self.config._attn_implementation != NAME:
            return self.original(*args, **kwargs)
        with reading(caches[0].layers[self.number]):
            return self.original(*args, **kwargs)


def linears_decode(
    sites: Sites, modules: list[nn.Module], settings: Settings, copies: Copies, name: str
) -> tuple[list[Forward], LinearsDecode]:
    """Forwards of linear layers with the same input, and what they share."""
    group = LinearsDecode(sites, modules, settings, copies, name)
    return [LinearDecode(module, group, index) for index, module in enumerate(modules)], group


def check_attention(sites: Sites, layer: nn.Module) -> nn.Module:
    """The attention of a layer whose cache holds keys and values. ValueError for another one, or none."""
    attention = sites.attention(layer)
    if getattr(attention, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"{type(attention).__name__} makes keys and values of latent vectors, which a look-ahead cache doesn't hold"
        )
    if (reader := _reader_of_the_cache(attention)) is not None:
        raise ValueError(
            f"{type(attention).__name__} reads all keys or values in its {reader}, too, and a step would have it read "
            "the cache's copies"
        )
    return attention


def _reader_of_the_cache(attention: nn.Module) -> str | None:
    """A child that the forward of an attention calls on `key_states` or `value_states`, the names that transformers
    gives to what the cache returned (Doge's `dt_proj`); None without one. Norms, which come before it, don't count.
    """
    try:
        source = inspect.getsource(type(attention).forward)
    except (OSError, TypeError):
        return None
    _, update, after = source.partition(".update(")
    called = re.search(r"self\.(\w+)\(\s*(?:key_states|value_states)\b", after) if update else None
    if called is None or not isinstance(getattr(attention, called[1], None), nn.Module):
        return None
    return called[1]


def check_rows(sites: Sites, site: Site, layer: nn.Module) -> None:
    """ValueError for a layer whose site has no linear layers that can be copied."""
    for module in sites.modules(site, layer):
        sites.weights(module)


def check_mlp(
    sites: Sites, layer: nn.Module, given: Mapping[nn.Module, Forward], *, known: bool = False
) -> tuple[Tensor, Tensor, Tensor, str]:
    """Gate, up and down projection of a layer, (outputs, inputs) each, and the activation's name.

    `given` are the forwards that modules have of ours already (`WideModel`). `known` says that the formula was found to
    be right before, of the same weights: then none of them is read.

    Raises
    ------
    ValueError
        No gated MLP, one with biases or another formula, or an activation that the kernel doesn't know.
    """
    modules = [module for site in ("mlp_up", "mlp_down") for module in sites.modules(SITES[site], layer)]
    maps = [sites.weights(module) for module in modules]
    if not sites.is_gated(layer) or any(m.bias is not None for m in maps):
        raise ValueError(
            "sites mlp_up and mlp_down of decoding: the kernel runs gated MLPs without biases only; leave both out"
        )
    *inner, out = [m.matrix.detach().T for m in maps]
    gate, up = inner if len(inner) == 2 else inner[0].chunk(2)
    activation = _activation(sites.activation(layer))
    if not known:
        _check_formula(sites.mlp(layer), gate, up, out, activation, given)
    return gate, up, out, activation


def mlp_decode(
    sites: Sites,
    number: int,
    up: Settings,
    down: Settings,
    statistics: Statistics,
    full: torch.dtype,
    given: Mapping[nn.Module, Forward],
    copies: Copies,
    name: str,
) -> MlpDecode:
    """The forward of the MLP of layer `number`; raises as `check_mlp` does."""
    layer = sites.layers[number]
    # Columns of the down projection are copied for whoever reads them: no rule at either site, no reader.
    blind = up.threshold == down.threshold == float("inf")
    gate, inner, out, activation = check_mlp(sites, layer, given, known=copies.has(name))
    mlp = copies.take(
        name,
        lambda kept: LowBitMlp.of(gate, inner, out, kept, activation, up.bits, down.bits),
        lambda: LowBitMlp.pack(gate, inner, out, activation, up.bits, down.bits, None if blind else full),
    )
    return MlpDecode(sites.mlp(layer), mlp, (up.threshold, down.threshold), statistics, number, given)


def _check_formula(
    module: Any, gate: Tensor, up: Tensor, down: Tensor, activation: str, given: Mapping[nn.Module, Forward]
) -> None:
    """ValueError where a known MLP computes more than down(phi(gate x) * up x), told by one random vector."""
    if own_forward(module) is not None or not PlainModules(module, given).hold():
        return  # it runs in full precision
    x = torch.randn(1, 1, gate.shape[1], generator=torch.Generator().manual_seed(0))
    want = type(module).forward(module, x)[0, 0].double()
    x = x[0, 0]
    h = activate(activation, linear(x, gate))[0] * linear(x, up)
    difference = linear(h, down).double() - want
    # Written so that weights that aren't finite, of which nothing can be told, pass.
    if (
        difference.norm()
        > 1e-3 * want.norm() + 1e-6 * float(down.norm(dtype=torch.float64)) * h.double().norm()
    ):
        raise ValueError(
            f"sites mlp_up and mlp_down of decoding: {type(module).__name__} computes something else than a gated MLP; "
            "leave both out"
        )


def check_head(sites: Sites) -> tuple[nn.Module, Tensor]:
    """The LM head and its weight (tokens, columns). ValueError for a bias, which the proof doesn't cover."""
    module, _ = sites.lm_head()
    weights = sites.weights(module)
    if weights.bias is not None:
        raise ValueError(
            "site lm_head of decoding: the head has a bias, which its bounds don't cover; leave it out"
        )
    return module, weights.matrix.detach().T


def head_decode(
    sites: Sites, settings: Settings, top: int, statistics: Statistics, copies: Copies, name: str
) -> HeadDecode:
    """The forward of the LM head; raises as `check_head` does."""
    module, weight = check_head(sites)
    head = copies.take(
        name,
        lambda kept: LowBitHead.of(weight, kept, settings.bits),
        lambda: LowBitHead.pack(weight, settings.bits),
    )
    return HeadDecode(module, head, settings.threshold, top, statistics)


def _activation(module: nn.Module) -> str:
    """The kernel's name of an elementwise function, told by its class's values (hooks are looked for at each step)."""
    probe = torch.linspace(-6.0, 6.0, 97)
    values = type(module).forward(module, probe)
    for name in ACTIVATIONS:
        if torch.allclose(values, activate(name, probe)[0], rtol=1e-5, atol=1e-6):
            return name
    raise ValueError(
        f"activation {type(module).__name__} of the MLP: the decoding kernel knows {' and '.join(ACTIVATIONS)}; leave "
        "out mlp_up and mlp_down"
    )
