"""Every engine that `torchlamp bench engines` compares, on one model: how each is made, and what it needs.

An engine reads prompts and takes one token at a time, as `torchlamp.bench.decoders` does; each runs in a process of its
own (`torchlamp.bench.engine_process`).
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from torchlamp.bench import llama_cpp
from torchlamp.bench.decoders import ExactDecoder, TransformersDecoder, dynamic_int8
from torchlamp.bench.ik_llama import IkLlama
from torchlamp.bench.llama_files import LlamaDecoder

REFERENCE = "torch float32"


@dataclass(frozen=True)
class Spec:
    """What an engine's process is told."""

    #: A folder that `from_pretrained` reads, or a hub name.
    model: str
    #: The same weights as a float32 GGUF file, where llama.cpp knows the type.
    gguf: str | None
    #: Folder of quantised files, which are made when they are first asked for.
    folder: str
    #: int64 (windows, length) tokens, as a file of `torch.save`; and the reference's logits.
    windows: str
    reference: str
    #: Tokens before the timed steps, and how many steps.
    contexts: tuple[int, ...]
    steps: int
    #: How often each prompt is read.
    prompts: int
    threads: int

    @property
    def length(self) -> int:
        """The most tokens that an engine holds."""
        return max(self.contexts) + self.steps + 1


class Reads(Protocol):
    """An engine with a model."""

    def prefill(self, tokens: Tensor) -> None:
        """Forget everything, read int64 (length,) tokens and compute the last one's logits."""

    def step(self, token: int) -> Tensor:
        """Read one token more; float32 logits (vocabulary,)."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (length, vocabulary) of int64 (length,) tokens."""

    def close(self) -> None:
        """Free the model."""


@dataclass(frozen=True)
class Engine:
    """One row: its name, how it is made, and the modules that it needs with the command that installs them."""

    label: str
    make: Callable[[Spec], Reads]
    modules: tuple[str, ...] = ()
    install: str = ""
    #: Its first load makes a cache on disk, which later ones read: a load before the measured one.
    loads_twice: bool = False
    #: Reads the GGUF file.
    reads_gguf: bool = False

    def missing(self) -> str | None:
        """The first module that isn't installed."""
        return next((name for name in self.modules if not _installed(name)), None)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def _load(spec: Spec, dtype: str) -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(spec.model, dtype=getattr(torch, dtype))
    return model.eval()


def _torch(dtype: str, spec: Spec) -> Reads:
    return TransformersDecoder(_load(spec, dtype))


def _dynamic_int8(spec: Spec) -> Reads:
    return TransformersDecoder(dynamic_int8(_load(spec, "float32")))


def _torchao(bits: int, spec: Spec) -> Reads:
    """Weights alone in 8 or 4 bits, as torchao does it on processors: activations in bfloat16."""
    from torchao import quantization  # type: ignore[import-not-found, unused-ignore]

    model = _load(spec, "bfloat16")
    if bits == 8:
        config = quantization.Int8WeightOnlyConfig()
    else:  # its form for processors is a prototype
        from torchao.prototype.quantization import int4  # type: ignore[import-not-found, unused-ignore]

        config = int4.PrototypeInt4WeightOnlyConfig(group_size=32)
    quantization.quantize_(model, config)
    return TransformersDecoder(model)


def _cached(backend: str, bits: int, spec: Spec) -> Reads:
    from transformers.cache_utils import QuantizedCache

    model = _load(spec, "float32")
    windows = set(getattr(model.config, "layer_types", None) or []) - {"full_attention"}
    if windows:
        raise ValueError("transformers' QuantizedCache takes models without sliding windows alone")
    return TransformersDecoder(model, lambda: QuantizedCache(backend, model.config, nbits=bits))


def _llama(quantisation: str, spec: Spec) -> Reads:
    return LlamaDecoder(quantised(quantisation, spec), spec.length)


def _ik(quantisation: str, spec: Spec) -> Reads:
    return IkLlama(quantised(quantisation, spec), spec.length, spec.threads)


def quantised(quantisation: str, spec: Spec) -> Path:
    """The quantised GGUF file, made of the float32 one where it isn't there yet."""
    if spec.gguf is None:
        raise ValueError("llama.cpp has no such type of model, or this one can't be written as GGUF")
    path = Path(spec.folder) / f"{quantisation}.gguf"
    if not path.exists():
        llama_cpp.quantise(Path(spec.gguf), path, quantisation, spec.threads)
    return path


def _ours(precision: str, spec: Spec) -> Reads:
    from torchlamp.huggingface.prepare import prepared
    from torchlamp.models.load import load

    model, _ = load(spec.model, precision=precision)
    found = prepared(model)
    return TransformersDecoder(model, found.cache if "scores" in found.policy.sites else None)


def _exact(spec: Spec) -> Reads:
    return ExactDecoder(_load(spec, "float32"))


_LLAMA = {"modules": ("llama_cpp",), "install": "pip install 'torchlamp[bench]'", "reads_gguf": True}
_AO = {"modules": ("torchao",), "install": "pip install torchao"}
_BENCH = "pip install 'torchlamp[bench]'"

#: In the order of the table; the reference is the first.
ENGINES: tuple[Engine, ...] = (
    Engine(REFERENCE, partial(_torch, "float32")),
    Engine("torch bfloat16", partial(_torch, "bfloat16")),
    Engine("torch float16", partial(_torch, "float16")),
    Engine("torch dynamic int8", _dynamic_int8),
    Engine("torchao int8 weights", partial(_torchao, 8), **_AO),  # type: ignore[arg-type]
    Engine("torchao int4 weights", partial(_torchao, 4), **_AO),  # type: ignore[arg-type]
    Engine("transformers cache, hqq 8 bits", partial(_cached, "hqq", 8), ("hqq",), _BENCH),
    Engine("transformers cache, quanto 4 bits", partial(_cached, "quanto", 4), ("optimum.quanto",), _BENCH),
    *(
        Engine(f"llama.cpp {name}", partial(_llama, name), **_LLAMA)  # type: ignore[arg-type]
        for name in llama_cpp.QUANTISATIONS
    ),
    *(
        Engine(
            f"ik_llama.cpp {name}",
            partial(_ik, name),
            # Its files are quantised by llama.cpp.
            ("ik_llama_cpp", "llama_cpp"),
            "pip install ik-llama-cpp-python 'torchlamp[bench]'",
            reads_gguf=True,
        )
        for name in ("Q8_0", "Q4_0")
    ),
    Engine("torchlamp default", partial(_ours, "default"), loads_twice=True),
    Engine("torchlamp 8 bits", partial(_ours, "fast"), loads_twice=True),
    Engine("torchlamp exact", _exact),
)

#: Engines that can't run beside this package, and why.
ELSEWHERE = {
    "OpenVINO": "optimum-intel 2.2 needs transformers < 5.6: run pip install 'optimum-intel[openvino]' in an "
    "environment of its own",
}
