"""Where the sites of a transformers decoder are: its layers, and in each the linear layers and norms of a site.

Modules are found by the names that transformers gives them in Llama, Mistral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX, OPT,
Falcon and DeepSeek (and in the many models written after these); `policy.sites` has those of each site. What isn't
found by its name is refused, never guessed. docs/families.md lists which sites run in which family.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from torchlamp.huggingface.offloaded import present
from torchlamp.huggingface.site_forwards import linear_map, plain
from torchlamp.kernels.full_rows import FULL
from torchlamp.policy.site import Site
from torchlamp.policy.sites import GATED, SITES
from torchlamp.simulation.linear_sums import Weights
from torchlamp.simulation.norms import Norm

_LAYERS = ("layers", "h", "blocks")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward")
_HEAD_SIZE = ("head_dim", "head_size")
_ACTIVATION = ("act_fn", "activation_fn", "act")
_FINAL_NORM = ("norm", "ln_f", "final_layernorm")
#: Words of configurations for sublayers that don't follow one after the other.
_PARALLEL = ("use_parallel_residual", "parallel_attn", "parallel_attention")
#: Beside `input_layernorm`, of layers with a norm behind each sublayer.
_FOUR_NORMS = frozenset(
    {"pre_feedforward_layernorm", "post_feedforward_layernorm", "post_attention_layernorm"}
)


@dataclass(frozen=True)
class Norms:
    """The norms of a decoder layer, each with its name.

    `attention` and `mlp` read the residual stream. Where a model has norms behind its sublayers (Gemma 2 and 3), these
    are `after_attention` and `after_mlp`, and what they give is added to the stream.
    """

    attention: tuple[str, nn.Module]
    mlp: tuple[str, nn.Module]
    after_attention: tuple[str, nn.Module] | None = None
    after_mlp: tuple[str, nn.Module] | None = None


class Sites:
    """The modules of a model's sites; each is looked for when it is asked for.

    Raises
    ------
    ValueError
        From every method: something isn't there, or isn't of a kind whose arithmetic is known.
    TypeError
        A weight that is neither float32 nor of half precision.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._decoder = _decoder(model)
        self._paths = {id(module): path for path, module in model.named_modules()}
        self.layers = _layers(self._decoder)

    def attention(self, layer: nn.Module) -> nn.Module:
        """The self-attention of a layer."""
        found = self._child(layer, _ATTENTION, "attention")
        if isinstance(found, nn.ModuleList):
            raise ValueError(
                f"{self._path(found)}: {type(layer).__name__} has {len(found)} attentions, the look-ahead knows layers "
                "of one"
            )
        return found

    def mlp(self, layer: nn.Module) -> nn.Module:
        """The MLP of a layer."""
        return self._child(layer, _MLP, "MLP")

    def modules(self, site: Site, layer: nn.Module | None = None) -> list[nn.Module]:
        """The modules that form a site's sums together; `layer` is a decoder layer if the site is in every one."""
        place = site.place
        if not place.in_layers:
            return [self.lm_head()[0]]
        assert layer is not None
        found = {"attention": self.attention, "mlp": self.mlp}.get(place.parent)
        parent = layer if found is None else found(layer)
        if place.last:
            self._check_last(parent)
        return self._group(parent, place.names, site.summary) if place.names else [parent]

    def is_gated(self, layer: nn.Module) -> bool:
        """Whether the MLP is a GLU: the gate comes first, or both halves are one module."""
        mlp = self.mlp(layer)
        if any(all(hasattr(mlp, name) for name in names) for names in GATED):
            return True
        up, down = (_first(mlp, SITES[site].place.names) for site in ("mlp_up", "mlp_down"))
        out, into = getattr(up, "out_features", None), getattr(down, "in_features", None)
        if out is not None and into is not None and out != into:
            raise ValueError(
                f"{self._path(mlp)} ({type(mlp).__name__}) makes {into} numbers of {out} sums, by a gate that the "
                "look-ahead doesn't know: leave out mlp_up and mlp_down"
            )
        return False

    def activation(self, layer: nn.Module) -> nn.Module:
        """The elementwise function of the MLP."""
        return self._child(self.mlp(layer), _ACTIVATION, "activation")

    def head_size(self, layer: nn.Module) -> int:
        """Length of a query's, key's or value's vector."""
        attention = self.attention(layer)
        for name in _HEAD_SIZE:
            if isinstance(size := getattr(attention, name, None), int):
                return size
        raise self._missing(attention, _HEAD_SIZE, "head size")

    def norms(self, layer: nn.Module) -> Norms:
        """The norms of a layer; refuses layers whose sublayers don't follow one after the other, each added at once."""
        names = {name for name, _ in layer.named_children()}

        def named(name: str) -> tuple[str, nn.Module]:
            return name, getattr(layer, name)

        if names >= _FOUR_NORMS:
            self._check_other_norms(layer, {"input_layernorm", *_FOUR_NORMS})
            return Norms(
                named("input_layernorm"),
                named("pre_feedforward_layernorm"),
                named("post_attention_layernorm"),
                named("post_feedforward_layernorm"),
            )
        for first, second in (("input_layernorm", "post_attention_layernorm"), ("ln_1", "ln_2")):
            if {first, second} <= names:
                self._check_residual()
                self._check_other_norms(layer, {first, second})
                return Norms(named(first), named(second))
        wanted = ["input_layernorm and post_attention_layernorm", "ln_1 and ln_2"]
        raise self._missing(layer, wanted, "norms of the residual stream")

    def final_norm(self) -> nn.Module:
        """The norm behind the last layer."""
        return self._child(self._decoder, _FINAL_NORM, "final norm")

    def lm_head(self) -> tuple[nn.Module, float | None]:
        """The output embedding and the softcap of the final logits."""
        head = self._model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ValueError(f"site lm_head: {type(self._model).__name__} has no LM head")
        config = self._model.config.get_text_config()  # type: ignore[union-attr,operator]
        for name in ("logit_scale", "logits_scaling"):
            if getattr(config, name, 1) not in (None, 1, 1.0):
                raise ValueError(
                    f"site lm_head: {type(self._model).__name__} scales its logits ({name}="
                    f"{getattr(config, name)}), which the look-ahead doesn't know"
                )
        return head, getattr(config, "final_logit_softcapping", None)

    def check_free(self, module: nn.Module, site: str, other: str) -> None:
        """ValueError for a module that forms sums of two sites of a policy."""
        if site != other:
            raise ValueError(
                f"{self._path(module)} belongs to the sites {site} and {other}: name one of them"
            )

    def weights(self, module: nn.Module) -> Weights:
        """The linear map of a module."""
        kind = type(module)
        if kind is not nn.Linear and kind is not Conv1D:
            raise ValueError(
                f"{self._path(module)} is a {kind.__module__}.{kind.__name__}: only torch.nn.Linear and GPT-2's Conv1D "
                "can run in low precision; merge adapters and load the model without quantisation"
            )
        weight: Tensor = module.weight  # type: ignore[assignment]
        if weight.dtype not in FULL:
            raise TypeError(
                f"{self._path(module)} has weights of {weight.dtype}: low precision is that of float32, bfloat16 and "
                "float16 weights; load the model with dtype=torch.float32"
            )
        return linear_map(module)

    @torch.no_grad()
    def norm(self, module: nn.Module) -> Norm:
        """The formula of a norm module; RMSNorms, of which every model has its own class, are probed."""
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        found = None
        with present([module]):
            weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        if isinstance(eps, float) and isinstance(weight, Tensor):
            size = weight.numel()
            if isinstance(module, nn.LayerNorm):
                found = Norm("layer", weight.detach(), None if bias is None else bias.detach(), eps)
            else:
                # Of a vector of ones an RMSNorm makes its weight (Gemma's is 1 + w), but for the eps.
                ones = torch.ones(1, size, device=weight.device)
                found = Norm("rms", plain(module)(ones)[0] * (1 + eps) ** 0.5, None, eps)
            probe = torch.linspace(-1.0, 2.0, size, device=weight.device)[None]
            if torch.allclose(plain(module)(probe), found(probe), rtol=1e-4, atol=1e-5):
                return found
        raise ValueError(
            f"{self._path(module)} is a {type(module).__name__}: the look-ahead knows RMSNorm and LayerNorm only"
        )

    def _check_residual(self) -> None:
        config = self._model.config.get_text_config()  # type: ignore[union-attr,operator]
        if any(getattr(config, name, False) for name in _PARALLEL):
            raise ValueError(
                f"{type(self._model).__name__} runs attention and MLP side by side on one norm, which the look-ahead "
                "through the residual stream doesn't know: leave out attention_out, mlp_down and norm"
            )
        if getattr(config, "residual_multiplier", 1) not in (1, 1.0):
            raise ValueError(
                f"{type(self._model).__name__} scales what it adds to the residual stream (residual_multiplier), "
                "which the look-ahead doesn't know: leave out the sites attention_out and mlp_down"
            )

    def _check_other_norms(self, layer: nn.Module, known: set[str]) -> None:
        """Refuse layers with norms in other places (GLM 4's behind its sublayers), which change what an error does."""
        others = [
            name
            for name, child in layer.named_children()
            if name not in known and ("norm" in type(child).__name__.lower() or "norm" in name)
        ]
        if others:
            raise ValueError(
                f"{self._path(layer)} ({type(layer).__name__}) has norms that the look-ahead doesn't know: "
                f"{', '.join(others)}; sites and rules that don't read the residual stream can run"
            )

    def _group(self, parent: nn.Module, choices: Iterable[tuple[str, ...]], what: str) -> list[nn.Module]:
        for names in choices:
            found = [_at(parent, name) for name in names]
            if all(isinstance(module, nn.Module) for module in found):
                return found
        raise self._missing(parent, [" + ".join(names) for names in choices], what)

    def _check_last(self, sublayer: nn.Module) -> None:
        """Refuse a sublayer with a norm of its own in front of its last projection (BitNet)."""
        for name, _ in sublayer.named_children():
            if name.endswith("sub_norm"):
                raise ValueError(
                    f"{self._path(sublayer)}.{name}: a norm in front of the last projection, which the look-ahead "
                    "doesn't know; the rules strict and running at the site scores don't need it"
                )

    def _child(self, parent: nn.Module, names: Iterable[str], what: str) -> nn.Module:
        for name in names:
            child = getattr(parent, name, None)
            if isinstance(child, nn.Module):
                return child
        raise self._missing(parent, names, what)

    def _missing(self, parent: nn.Module, names: Iterable[str], what: str) -> ValueError:
        if isinstance(getattr(parent, "experts", None), nn.Module):
            return ValueError(
                f"{type(self._model).__name__}: {self._path(parent)} ({type(parent).__name__}) is a mixture of experts "
                "that the look-ahead doesn't know: leave out mlp_up and mlp_down; the other sites can run"
            )
        return ValueError(
            f"{type(self._model).__name__}: no {what} found in {self._path(parent)} ({type(parent).__name__}); looked "
            f"for {', '.join(names)}"
        )

    def _path(self, module: nn.Module) -> str:
        return self._paths.get(id(module)) or "the model"


def _first(parent: nn.Module, choices: Iterable[tuple[str, ...]]) -> Any:
    """The one module of the first choice that is there; None where a choice of several is, or none."""
    for names in choices:
        if all(isinstance(_at(parent, name), nn.Module) for name in names):
            return _at(parent, names[0]) if len(names) == 1 else None
    return None


def _at(parent: Any, path: str) -> Any:
    """What hangs below a module under a name with dots; None: nothing does."""
    for name in path.split("."):
        parent = getattr(parent, name, None)
    return parent


def _decoder(model: nn.Module) -> nn.Module:
    """The part of a model that holds the text decoder's layers."""
    found = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    return found if isinstance(found, nn.Module) else model


def _layers(decoder: nn.Module) -> list[nn.Module]:
    """The decoder layers in their order; empty where they can't be told."""
    for name in _LAYERS:
        layers = getattr(decoder, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers) > 0:
            found = list(layers)
            if all(any(hasattr(layer, a) for a in _ATTENTION) for layer in found):
                return found
    return []
