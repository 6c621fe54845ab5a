"""Decoder layers whose formula is known by their classes, each in one native call.

Modules one by one cost some fifty small operations a layer, a third of a token's time at the size of SmolLM2. The
numbers are those of the modules' own kernels, up to float32 rounding in norms and rotary positions.
"""

from typing import Any

from torch import Tensor, nn

from torchlamp.huggingface.decode_forwards import LinearsDecode, MlpDecode
from torchlamp.huggingface.plain_modules import is_known, is_one_of
from torchlamp.kernels.dispatch import NativeKernels, NativeObject

#: Families of transformers whose decoder layers have RMSNorms, rotary positions over the whole head and a gated MLP:
#: how their classes' names begin, and what their norms add to the weight (Gemma's multiply by 1 + w).
FAMILIES = {
    "llama": ("Llama", 0.0),
    "mistral": ("Mistral", 0.0),
    "qwen2": ("Qwen2", 0.0),
    "qwen3": ("Qwen3", 0.0),
    "gemma3": ("Gemma3", 1.0),
}
#: The sites whose low-bit rows the kernel of a layer reads.
ROW_SITES = ("qkv", "attention_out")
#: Models of those families that hand hidden states from layer to layer untouched.
DECODERS = {
    name: f"{prefix}{'Text' if name == 'gemma3' else ''}Model" for name, (prefix, _) in FAMILIES.items()
}


class NativeLayer:
    """A decoder layer over its low-bit copies and its own norms; made of a layer that `can_fuse` knows."""

    def __init__(self, module: nn.Module, rows: dict[str, LinearsDecode], mlp: MlpDecode) -> None:
        self.module, self.mlp = module, mlp
        self.qkv, self.out = (rows[site] for site in ROW_SITES)
        attention: Any = module.self_attn
        self.attention = attention
        self.family = family_of(module) or ""
        self.size = int(attention.head_dim)
        queries, keys, _ = (n // self.size for n in self.qkv.sizes)
        self.heads, self.kv_heads = queries, keys
        self.scaling = float(attention.scaling)
        self.number = int(attention.layer_idx)
        self._native = NativeObject()

    def kernel(self, native: NativeKernels) -> Any:
        """The native object over the layer's copies and weights."""
        return self._native.get(native, self._make)

    def _make(self, native: NativeKernels) -> Any:
        layer, attention, plus = self.module, self.attention, FAMILIES[self.family][1]
        four = hasattr(layer, "pre_feedforward_layernorm")

        def weight(owner: nn.Module, name: str) -> Tensor | None:
            norm = getattr(owner, name, None)
            return None if norm is None else (norm.weight.detach() + plus)

        second = layer.post_attention_layernorm
        return native.extension.Layer(
            native.instruction_set,
            self.qkv.matrix.kernel(native),
            self.out.matrix.kernel(native),
            self.mlp.mlp.kernel(native),
            weight(layer, "input_layernorm"),
            weight(layer, "post_attention_layernorm") if four else None,
            weight(layer, "pre_feedforward_layernorm" if four else "post_attention_layernorm"),
            weight(layer, "post_feedforward_layernorm") if four else None,
            weight(attention, "q_norm"),
            weight(attention, "k_norm"),
            getattr(second, "variance_epsilon", getattr(second, "eps", None)),
            self.qkv.bias,
            self.out.bias,
            self.heads,
            self.kv_heads,
            self.size,
            *self.mlp.thresholds,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_native": NativeObject()}


def can_fuse(layer: nn.Module, rows: dict[str, LinearsDecode]) -> bool:
    """Whether a layer's parts are those of one of `FAMILIES`, all the way down, so that its formula is known.

    `rows` are the low-bit rows of the layer by their sites: the kernel needs those of `ROW_SITES`, queries, keys and
    values apart, and no others.
    """
    family = family_of(layer)
    if family is None or set(rows) != set(ROW_SITES) or len(rows[ROW_SITES[0]].sizes) != 3:
        return False
    prefix, _ = FAMILIES[family]
    parts = {"self_attn": "Attention", "mlp": "MLP", "input_layernorm": "RMSNorm"}
    norms = [m for m in layer.modules() if is_one_of(type(m), [f"{prefix}RMSNorm"], family)]
    named = [m for name, m in layer.named_modules() if name.endswith("norm")]
    attention: Any = getattr(layer, "self_attn", None)
    config = getattr(attention, "config", None)
    return (
        all(is_one_of(type(getattr(layer, at, None)), [prefix + name], family) for at, name in parts.items())
        and norms == named
        and len({getattr(m, "variance_epsilon", getattr(m, "eps", None)) for m in norms}) == 1
        and getattr(config, "partial_rotary_factor", None) in (None, 1, 1.0)
        and getattr(attention, "attn_logit_softcapping", None) is None
    )


def family_of(layer: nn.Module) -> str | None:
    """The family of `FAMILIES` whose decoder layer this is; None: another layer."""
    for family, (prefix, _) in FAMILIES.items():
        if is_one_of(type(layer), [f"{prefix}DecoderLayer"], family) and is_known(type(layer)):
            return family
    return None


def is_decoder(decoder: nn.Module, family: str | None) -> bool:
    """Whether a model is the one of `DECODERS` for this family, with transformers' forward and the family's norm."""
    kind, norm = type(decoder), type(getattr(decoder, "norm", None))
    return (
        family is not None
        and is_one_of(kind, [DECODERS[family]], family)
        and is_known(kind)
        and is_one_of(norm, [f"{FAMILIES[family][0]}RMSNorm"], family)
    )


def norm_formula(norm: Any, family: str) -> tuple[Tensor, float]:
    """What an RMSNorm of a family multiplies by, float32 (size,), and its eps."""
    weight = (norm.weight.detach() + FAMILIES[family][1]).contiguous()
    return weight, float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
