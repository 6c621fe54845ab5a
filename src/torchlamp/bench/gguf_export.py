"""A transformers model of Llama's, Qwen 2's or Gemma 3's type into a float32 GGUF file, as llama.cpp reads it.

Settings come from the model's configuration and weights from the model, as they are now. What llama.cpp would compute
otherwise than transformers is refused, never left out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Fixed by llama.cpp for Gemma 3: every sixth layer sees the whole context.
_GEMMA_PATTERN = 6


@dataclass(frozen=True)
class _Type:
    """llama.cpp's name of a transformers model type, and how its tensors differ."""

    architecture: str
    activation: str
    #: Added to the weights of norms, which llama.cpp wants as factors.
    norm_offset: float
    #: Rows of queries and keys go from halves (transformers' rotary positions) to pairs (llama.cpp's).
    rotary_pairs: bool


_TYPES = {
    "llama": _Type("llama", "silu", 0.0, True),
    "qwen2": _Type("qwen2", "silu", 0.0, False),
    "gemma3_text": _Type("gemma3", "gelu_pytorch_tanh", 1.0, False),
}


@torch.no_grad()
def write_gguf(model: Any, path: Path, tokenizer_from: Path | None = None) -> None:
    """Write a model as a float32 GGUF file.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of type ``llama``, ``qwen2`` or ``gemma3_text``, on the CPU. A tied LM head is left out, as GGUF files do.
    path : Path
        The file to write; an existing one is replaced.
    tokenizer_from : Path, optional
        A GGUF file of the same model whose tokenizer is copied. Without it the file has token numbers only, which is
        all that decoding needs, and llama.cpp loads it quicker.

    Raises
    ------
    ValueError
        Another type of model, a setting that llama.cpp doesn't have, or a tokenizer of another vocabulary.
    OSError
        A file can't be read or written.
    """
    import gguf

    config = model.config
    kind = _checked(config)
    tokenizer = _tokenizer(tokenizer_from, config.vocab_size)
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    tensors = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and tied:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(
                f"weight {key!r}: llama.cpp's {kind.architecture} has no such tensor; can't be written"
            )
        tensors[name] = _laid_out(key, tensor.float(), config, kind).contiguous().numpy()
    writer = gguf.GGUFWriter(path, kind.architecture)
    _add_settings(writer, config)
    for key, (value, field_type, element_type) in tokenizer.items():
        writer.add_key_value(key, value, field_type, element_type)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_settings(writer: Any, config: Any) -> None:
    import gguf

    gemma = config.model_type == "gemma3_text"
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_name(config._name_or_path or config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base((rope["full_attention"] if gemma else rope)["rope_theta"])
    if gemma:
        # By its name: gguf 0.17 has no method for it. Files without it get llama.cpp's 10 000.
        writer.add_float32(
            f"{_TYPES[config.model_type].architecture}.rope.freq_base_swa",
            rope["sliding_attention"]["rope_theta"],
        )
        writer.add_sliding_window(config.sliding_window)


def _laid_out(key: str, tensor: Tensor, config: Any, kind: _Type) -> Tensor:
    """A weight as llama.cpp lays it out; float32, of the same shape."""
    if kind.rotary_pairs and ("q_proj" in key or "k_proj" in key):
        heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
        return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor + kind.norm_offset if "norm" in key else tensor


def _tokenizer(source: Path | None, vocabulary: int) -> dict[str, tuple[Any, Any, Any]]:
    """The tokenizer's keys with their values and types; of no source, those that say that there is none."""
    import gguf

    if source is None:
        return {"tokenizer.ggml.model": ("none", gguf.GGUFValueType.STRING, None)}
    found = {}
    for key, field in gguf.GGUFReader(source).fields.items():
        if key.startswith("tokenizer."):
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            found[key] = (field.contents(), field.types[0], element)
    size = len(found["tokenizer.ggml.tokens"][0]) if "tokenizer.ggml.tokens" in found else 0
    if size != vocabulary:
        raise ValueError(
            f"tokenizer of {source.name!r} has {size} tokens, the model {vocabulary}: give the GGUF file that the "
            "model comes from, or none"
        )
    return found


def _checked(config: Any) -> _Type:
    """The type of a model, all of whose settings llama.cpp has."""
    kind = _TYPES.get(config.model_type)
    if kind is None:
        raise ValueError(
            f"model type {config.model_type!r} can't be written as GGUF: allowed are {', '.join(_TYPES)}"
        )
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    gemma = config.model_type == "gemma3_text"
    ropes = [*config.rope_parameters.values()] if gemma else [config.rope_parameters]
    wanted: dict[str, tuple[Any, Any]] = {
        "activation": (activation, kind.activation),
        "rope_type": ({rope.get("rope_type", "default") for rope in ropes}, {"default"}),
    }
    if getattr(config, "use_sliding_window", False):
        wanted["use_sliding_window"] = (True, False)
    if gemma:
        layers = range(1, config.num_hidden_layers + 1)
        wanted |= {
            "layer_types": (
                list(config.layer_types),
                [f"{'sliding' if layer % _GEMMA_PATTERN else 'full'}_attention" for layer in layers],
            ),
            "query_pre_attn_scalar": (config.query_pre_attn_scalar, config.head_dim),
            "attn_logit_softcapping": (config.attn_logit_softcapping, None),
            "final_logit_softcapping": (config.final_logit_softcapping, None),
            "use_bidirectional_attention": (
                bool(getattr(config, "use_bidirectional_attention", False)),
                False,
            ),
        }
    for name, (value, expected) in wanted.items():
        if value != expected:
            raise ValueError(
                f"{name} {value!r}: llama.cpp's {kind.architecture} computes with {expected!r}, so the file would "
                "hold another model"
            )
    return kind
