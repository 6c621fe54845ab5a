"""GGUF files into ordinary float32 models, and such models to and from a folder that loads quickly."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from torchlamp.models.complete import check_complete, check_extent, unread_tensors

#: Changes when `save` writes something else than before, or `convert` checks more; part of the cache's key.
FORMAT = 3
_TOKENIZER, _TOKENIZER_OPTIONS, _WEIGHTS = "tokenizer.json", "tokenizer_options.json", "model.safetensors"


def convert(gguf: Path) -> tuple[Any, Any]:
    """Dequantise a GGUF file into a float32 transformers model in eval mode, with its tokenizer.

    Raises
    ------
    ValueError
        The file is no GGUF file, transformers can't read its architecture, or its weights aren't those of the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _header_read_once() as readers:
        with _readable(gguf):
            model, report = AutoModelForCausalLM.from_pretrained(
                **source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
        unread = unread_tensors(model, {tensor.name for reader in readers for tensor in reader.tensors})
        check_complete(str(gguf), {**report, "unexpected_keys": {*report["unexpected_keys"], *unread}})
        check_extent(gguf, readers[0])
        with _readable(gguf):
            tokenizer = AutoTokenizer.from_pretrained(**source)
    # The weights are dense by now; the mark of a quantised model would only forbid saving and casting.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            setattr(model, attribute, False if attribute == "is_quantized" else None)
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        model = model.float()
    return model.eval(), tokenizer


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write what `read` needs. OSError if that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Tied weights are stored once, under the first name; loading ties them again.
    weights: dict[tuple[int, tuple[int, ...], tuple[int, ...]], tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        weights.setdefault((tensor.data_ptr(), tuple(tensor.shape), tensor.stride()), (name, tensor))
    try:
        save_file(
            {n: t.contiguous() for n, t in weights.values()}, folder / _WEIGHTS, metadata={"format": "pt"}
        )
    except SafetensorError as error:
        raise OSError(str(error)) from error
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)

    # Compact, and read back by the tokenizers library alone: a 262k vocabulary loads in a third of the time.
    (folder / _TOKENIZER).write_text(tokenizer.backend_tokenizer.to_str(pretty=False), encoding="utf-8")
    options = {
        **tokenizer.special_tokens_map,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "model_max_length": tokenizer.model_max_length,
        "model_input_names": tokenizer.model_input_names,
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
        "chat_template": tokenizer.chat_template,
    }
    (folder / _TOKENIZER_OPTIONS).write_text(json.dumps(options), encoding="utf-8")


def read(folder: Path) -> tuple[Any, Any]:
    """Model (float32, eval mode) and tokenizer from a folder that `save` wrote."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    options = json.loads((folder / _TOKENIZER_OPTIONS).read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / _TOKENIZER), **options)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_complete(str(folder), report)
    return model.eval(), tokenizer


@contextmanager
def _readable(gguf: Path) -> Iterator[None]:
    """ValueError for whatever stops transformers from reading a file."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{str(gguf)!r} can't be loaded: {first_line(error)}") from error
    except Exception as error:  # the GGUF readers raise whatever a malformed file leads them to
        raise ValueError(
            f"{str(gguf)!r} can't be loaded as a GGUF language model by transformers: {first_line(error)}"
        ) from error


@contextmanager
def _header_read_once() -> Iterator[list[Any]]:
    """Share one reader: transformers opens the file several times, and a 262k vocabulary takes seconds to read.

    Yields the readers made so far.
    """
    import gguf

    kind = gguf.GGUFReader
    made: list[Any] = []

    @functools.cache
    def read_once(*args: Any) -> Any:
        made.append(kind(*args))
        return made[-1]

    gguf.GGUFReader = read_once
    try:
        yield made
    finally:
        gguf.GGUFReader = kind


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
