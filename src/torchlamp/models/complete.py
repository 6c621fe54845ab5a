"""Weights that a checkpoint lacks, has too many of or has in another shape: refused by name, never filled at random."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

#: Tensors of GGUF files that hold no weight of a layer: rotary frequencies, which the configuration gives too.
_NOT_WEIGHTS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
_SHOWN = 3


def check_complete(what: str, report: Mapping[str, Any]) -> None:
    """Refuse a model whose weights aren't all from its checkpoint.

    Parameters
    ----------
    what : str
        The model, as its user named it.
    report : mapping
        What `from_pretrained(..., output_loading_info=True)` gives beside the model; tied weights, and those that an
        architecture is known to do without, aren't in it.

    Raises
    ------
    ValueError
        Weights are missing, unexpected or of another shape; the message names them.
    """
    wrong = [(f"{_names(report['missing_keys'])} missing", bool(report["missing_keys"]))]
    wrong.append((f"{_names(report['unexpected_keys'])} unexpected", bool(report["unexpected_keys"])))
    shapes = [
        f"{name} of shape {tuple(given)} instead of {tuple(wanted)}"
        for name, given, wanted in sorted(report["mismatched_keys"])
    ]
    wrong.append((_names(shapes), bool(shapes)))
    said = "; ".join(words for words, counts in wrong if counts)
    if said:
        raise ValueError(
            f"model {what!r} isn't whole: {said}; get a checkpoint that has all weights of its model"
        )


def unread_tensors(model: Any, names: Collection[str]) -> list[str]:
    """Names of a GGUF file's tensors that transformers found no place for in the model, in order."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    kind = TENSOR_PROCESSORS.get(model.config.model_type, TensorProcessor)
    placed = get_gguf_hf_weights_map(model, kind(config=model.config.to_dict()))
    return sorted(set(names) - set(placed) - _NOT_WEIGHTS)


def check_extent(gguf: Path, reader: Any) -> None:
    """Refuse a GGUF file that goes on behind the last tensor of its header.

    A tensor count cut by one moves the start of the data, hence all weights; where the tensor that falls off is an
    untied `output.weight`, the rest is a whole tied model, and only the bytes left over tell.

    Parameters
    ----------
    gguf : Path
        The file.
    reader : gguf.GGUFReader
        Its header, with at least one tensor.

    Raises
    ------
    ValueError
        At least `reader.alignment` bytes, more than padding has, belong to no tensor.
    """
    last = max(reader.tensors, key=lambda tensor: int(tensor.data_offset))
    left = gguf.stat().st_size - int(last.data_offset) - int(last.n_bytes)
    if left >= reader.alignment:
        raise ValueError(
            f"model {str(gguf)!r} isn't whole: {left} bytes behind {last.name}, the last tensor that its header names; "
            "get a checkpoint that has all weights of its model"
        )


def _names(names: Collection[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
