"""What a model will need in memory, told from the headers of its files before anything of it is loaded."""

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchlamp.decoding.store_tensors import StoreOptions, allocate, whole_blocks
from torchlamp.huggingface.lookahead_cache import LookaheadCache
from torchlamp.huggingface.prepare import decoding_policy
from torchlamp.huggingface.sites import Sites
from torchlamp.kernels.constants import ROWS
from torchlamp.kernels.reference_lowbit import block_count, code_bytes, group_count
from torchlamp.models.memory import machine_memory
from torchlamp.policy.decodable import Settings, settings
from torchlamp.policy.policy import Policy
from torchlamp.policy.sites import SITES

#: Bytes of a number in a safetensors file.
_SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1}


@dataclass(frozen=True)
class Need:
    """Bytes that a model needs, by their kind.

    `full` are those of its weights, in memory or left in their file; `copies` the low-bit copies and what else is made
    of the weights; `cache` the keys and values of `context` tokens.
    """

    name: str
    weights: int
    full: int
    copies: int
    cache: int
    context: int
    #: Whether the full-precision weights stay in their file.
    in_file: bool
    machine: int

    @property
    def total(self) -> int:
        """Bytes that must be in memory."""
        return (0 if self.in_file else self.full) + self.copies + self.cache

    @property
    def fits(self) -> bool:
        """Whether the machine, or the container that the process is in, has so much at all."""
        return self.total <= self.machine

    def check(self) -> None:
        """MemoryError with the numbers, and what to do, if the model doesn't fit."""
        if not self.fits:
            parts = [f"{_words(self.full)} of weights"] if not self.in_file else []
            parts += [f"{_words(self.copies)} of low-bit copies"] if self.copies else []
            parts += [f"{_words(self.cache)} of cache for {self.context} tokens"] if self.cache else []
            instead = (
                "take a smaller model, or fewer bits"
                if self.in_file
                else 'take a smaller model, or leave its weights in their file: load(..., precision="fast")'
            )
            raise MemoryError(
                f"model {self.name!r} needs {_words(self.total)} ({', '.join(parts)}), and this machine has "
                f"{_words(self.machine)}: {instead}"
            )


def weights_in(folder: Path) -> tuple[int, int] | None:
    """Numbers and bytes of the weights in a folder, from the headers of its safetensors files; None: it has none."""
    numbers = size = 0
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        for entry in _header(path):
            count = math.prod(entry["shape"])
            numbers, size = numbers + count, size + count * _SIZES.get(entry["dtype"], 4)
    return (numbers, size) if files else None


def need(
    name: str,
    config: Callable[[], Any],
    found: tuple[int, int],
    policy: str | Policy | None = None,
    context: int = 0,
    in_file: bool = False,
) -> Need:
    """What a model needs.

    Parameters
    ----------
    name : str
        As its user names it.
    config : callable
        Gives its transformers configuration, where copies or a cache are asked for.
    found : tuple of int
        Numbers of its weights, and their bytes in full precision.
    policy : str or Policy, optional
        Of the low-bit copies, as for ``load(precision=...)``; None: the model is loaded as it is.
    context : int
        Tokens whose keys and values are counted.
    in_file : bool
        Whether the full-precision weights stay in their file.
    """
    numbers, size = found
    told = {} if policy is None else settings(decoding_policy(policy))
    model = _without_weights(config()) if told or context else None
    return Need(
        name,
        numbers,
        size,
        0 if model is None else sum(_copies(model, told)),
        0 if model is None else _cache(model, told, context),
        context,
        in_file,
        machine_memory(),
    )


def _without_weights(config: Any) -> Any:
    """The model's modules on torch's meta device, where tensors have shapes and no numbers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _copies(model: Any, told: dict[str, Settings]) -> Iterator[int]:
    """Bytes of each low-bit copy; sites that the architecture doesn't allow have none."""
    sites = Sites(model)
    for name, setting in told.items():
        site = SITES[name]
        if site.kernel is None or name in ("scores", "values"):
            continue
        for layer in sites.layers if site.place.in_layers else [None]:
            try:
                shapes = [sites.weights(module).matrix.shape for module in sites.modules(site, layer)]
            except ValueError:
                break
            for columns, rows in shapes:
                yield _matrix(rows, columns, setting.bits)
                # Columns of the down projection in full, transposed, for whoever reads them.
                reads = any(told[n].threshold < math.inf for n in ("mlp_up", "mlp_down") if n in told)
                if name == "mlp_down" and reads:
                    yield 2 * rows * columns


def _matrix(rows: int, columns: int, bits: int) -> int:
    """Codes, a bfloat16 scale for each row and 32 columns, and each row's error in float32."""
    return block_count(rows) * ROWS * (code_bytes(bits, columns) + 2 * group_count(columns) + 4)


def _cache(model: Any, told: dict[str, Settings], context: int) -> int:
    """Keys and values of so many tokens in all layers: low-bit and float16, or float32 without a policy of theirs."""
    config = model.config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    total = 0
    for layer in LookaheadCache(model.config).layers if context else ():
        window = layer.sliding_window
        slots = whole_blocks(context if window is None else min(context, window + max(window, layer.slack)))
        if "scores" not in told:
            total += 2 * 4 * heads * slots * size
            continue
        options = StoreOptions(told["scores"].bits, told["values"].bits)
        with torch.device("meta"):
            total += sum(t.nbytes for t in allocate(options, 1, heads, (size, size), slots).values())
    return total


def _header(path: Path) -> list[dict[str, Any]]:
    """Shapes and dtypes of a safetensors file. ValueError for another one."""
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size - 8:
                raise ValueError("its header goes on behind the end of the file")
            header = json.loads(file.read(length))
            return [entry for name, entry in header.items() if name != "__metadata__"]
        except (struct.error, ValueError, AttributeError) as error:
            raise ValueError(f"{str(path)!r} is no safetensors file: {error}") from error


def _words(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
