"""Tiny random models of every architecture, and the inputs they are tried on."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from site_models import FAMILIES
from torch import Tensor

VOCABULARY = 61
WINDOW = 6
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LAYERS = ["sliding_attention", "full_attention"]
_OWN: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 5,
            "layer_types": _LAYERS,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "sliding_window": WINDOW,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 16,
            "layer_types": _LAYERS,
        },
    ),
    "gpt2": ("GPT2", {}),
    "gpt_oss": (
        "GptOss",
        {
            "sliding_window": WINDOW,
            "layer_types": _LAYERS,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
}
ARCHITECTURES = tuple(_OWN)


def _build(name: str) -> transformers.PreTrainedModel:
    family, own = _OWN[name]
    settings = {**_COMMON, **own}
    if name == "gpt2":
        settings = {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "initializer_range": 0.25,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
            "scale_attn_by_inverse_layer_idx": True,
        }
    config_class = getattr(transformers, f"{family}TextConfig" if name == "gemma3" else f"{family}Config")
    model_class = getattr(transformers, f"{family}LMHeadModel" if name == "gpt2" else f"{family}ForCausalLM")
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: transformers.PreTrainedModel = model_class._from_config(
            config_class(**settings), attn_implementation="eager"
        ).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "sinks" in parameter_name:
                parameter.normal_()
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only lose by being shared between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def build() -> Callable[[str], transformers.PreTrainedModel]:
    """A fresh model by the name of its architecture; equal names give equal weights."""
    return _build


@pytest.fixture(scope="session", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    """One model of each architecture under its own eager attention; a test must leave it so."""
    return _build(request.param)


@pytest.fixture(scope="session")
def llama() -> transformers.PreTrainedModel:
    """The plainest of them."""
    return _build("llama")


def _tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


@pytest.fixture(scope="session")
def tokens() -> Callable[..., Tensor]:
    """Random token ids (batch, length)."""
    return _tokens


@pytest.fixture(scope="session")
def padded() -> dict[str, dict[str, Tensor]]:
    """Inputs of every shape a forward meets: lengths around a tile, padding on either side, one token."""
    left = torch.ones(3, 17, dtype=torch.long)
    left[1, :5], left[2, :16] = 0, 0
    return {
        "one": {"input_ids": _tokens(1, 1)},
        "short": {"input_ids": _tokens(1, 5)},
        "longer than a tile": {"input_ids": _tokens(1, 70)},
        "batch": {"input_ids": _tokens(3, 17)},
        "left": {"input_ids": _tokens(3, 17), "attention_mask": left},
        "right": {"input_ids": _tokens(3, 17), "attention_mask": left.flip(1)},
    }


@pytest.fixture(scope="module")
def families(build):
    built = {name: build(name) for name in FAMILIES if name != "phi3"}
    torch.manual_seed(7)
    config = transformers.Phi3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,
        pad_token_id=0,
    )
    built["phi3"] = transformers.Phi3ForCausalLM._from_config(config, attn_implementation="eager").eval()
    return built


@pytest.fixture(params=FAMILIES)
def family(request, families):
    return families[request.param]


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield
