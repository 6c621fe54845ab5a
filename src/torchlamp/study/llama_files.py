"""A packaged model with the weights it has now, in llama.cpp: as a float32 GGUF file, and quantised from there."""

import ctypes
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlamp.study.packaged import PACKAGED

#: Spelled as llama.cpp spells its file types.
QUANTISATIONS = ("F32", "Q8_0", "Q4_0")


class LlamaFiles:
    """GGUF files of one model in a folder; each is made when it is first asked for."""

    def __init__(self, name: str, model: Any, folder: Path) -> None:
        self.folder = folder
        export(name, model, self._path("F32"))

    def decoder(self, quantisation: str, length: int) -> "LlamaDecoder":
        """A decoder of up to `length` tokens.

        Raises
        ------
        ValueError
            Not one of `QUANTISATIONS`.
        OSError
            llama.cpp can't quantise or read the file.
        """
        if quantisation not in QUANTISATIONS:
            raise ValueError(f"quantisation {quantisation!r}: allowed are {', '.join(QUANTISATIONS)}")
        path = self._path(quantisation)
        if not path.exists():
            _quantise(self._path("F32"), path, quantisation)
        return LlamaDecoder(path, length)

    def _path(self, quantisation: str) -> Path:
        return self.folder / f"{quantisation}.gguf"


@contextmanager
def llama_files(name: str, model: Any) -> Iterator[LlamaFiles | None]:
    """Files of a packaged model's current weights within the block; None without the package llama-cpp-python."""
    if find_spec("llama_cpp") is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="torchlamp-") as folder:
        yield LlamaFiles(name, model, Path(folder))


class LlamaDecoder:
    """A GGUF file in llama.cpp, with torch's number of threads; keys and values in float16, llama.cpp's default."""

    def __init__(self, path: Path, length: int) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        try:
            self._llama: Any = Llama(
                str(path),
                n_ctx=length,
                n_batch=512,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
        except ValueError as error:
            raise OSError(f"llama.cpp can't load {path.name}: {error}") from error

    def prefill(self, tokens: Tensor) -> None:
        """Read int64 (length,) tokens."""
        self._llama.reset()
        self._llama.eval(tokens.tolist())

    def step(self, token: int) -> Tensor:
        """Read one token more; float32 logits (vocabulary,)."""
        import llama_cpp

        self._llama.eval([token])
        size = self._llama.n_vocab()
        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, shape=(size,)).copy())

    def close(self) -> None:
        """Free the model."""
        self._llama.close()


@torch.no_grad()
def export(name: str, model: Any, path: Path) -> None:
    """Write a packaged model with the weights it has now as a float32 GGUF file.

    Settings and tokenizer are those of the packaged file; tensors are laid out as llama.cpp reads them.

    Parameters
    ----------
    name : str
        Of the packaged model that `model` was loaded from.
    model : transformers.PreTrainedModel
        Of the architectures Llama or Gemma 3.
    path : Path
        The file to write.
    """
    import gguf

    with PACKAGED[name].gguf() as packaged:
        fields = gguf.GGUFReader(packaged).fields
        architecture = str(fields["general.architecture"].contents())
        writer = gguf.GGUFWriter(path, architecture)
        for key, field in fields.items():
            if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
                continue
            kind = field.types[0]
            element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, element)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    config = model.config
    arch = next(a for a, label in gguf.MODEL_ARCH_NAMES.items() if label == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and tied:
            continue
        value = tensor.float()
        if architecture == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            value = _interleaved(value, heads)
        if architecture == "gemma3" and "norm" in key:
            value = value + 1
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves (transformers' rotary positions) to pairs (llama.cpp's)."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _quantise(source: Path, target: Path, quantisation: str) -> None:
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantisation}")
    parameters.nthread = torch.get_num_threads()
    # llama.cpp would keep the LM head of Q4_0 in 6 bits: its own choice, and left to it.
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))
    if status:
        raise OSError(f"llama.cpp can't quantise to {quantisation} (status {status})")
