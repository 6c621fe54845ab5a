"""`load`: a language model and its tokenizer by short name, GGUF file, folder, or hub name."""

import contextlib
import difflib
import gc
import hashlib
import importlib
import logging
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torchlamp.models import cache, conversion
from torchlamp.models.complete import check_complete
from torchlamp.models.fingerprint import fingerprint
from torchlamp.models.gguf_header import check_not_cut, read_header
from torchlamp.models.hub import hub_resolves
from torchlamp.models.memory import is_out_of_memory
from torchlamp.models.need import Need, need, weights_in
from torchlamp.models.packaged import PACKAGED
from torchlamp.models.quiet import quiet_gguf_loader, quiet_transformers
from torchlamp.policy.policy import Policy
from torchlamp.steps import work

logger = logging.getLogger("torchlamp.models")
#: A tokenizer's folder has at least one of them.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "merges.txt",
)  # fmt: skip


def load(name: str, *, dtype: str = "float32", precision: str | Policy | None = None) -> tuple[Any, Any]:
    """Load a decoder language model in eval mode, and its tokenizer.

    Models from GGUF files are dequantised: that float32 model is the reference of every study. The conversion
    takes up to a minute and is kept in the cache folder (``$TORCHLAMP_CACHE``, else
    ``$XDG_CACHE_HOME/torchlamp``, else ``~/.cache/torchlamp``); a damaged copy is found and made anew, and
    without a writable folder nothing is kept.

    Parameters
    ----------
    name : str
        ``smollm2-135m`` or ``gemma3-270m`` (from Python packages), the path of a ``.gguf`` file, the path of
        a folder that `save_pretrained` wrote, or a name on the Hugging Face hub such as ``gpt2``.

    dtype : str
        ``"float32"``, or ``"auto"``: a bfloat16 or float16 checkpoint of a folder or the hub stays as it is, half the
        memory; `lookahead` and `evaluate` widen it exactly while they run. GGUF files are float32 in any case.
    precision : str or Policy, optional
        A policy of `prepare`, or ``"default"`` or ``"fast"`` for its own two: the model is returned prepared, its
        full-precision weights left in their file (dtype ``"auto"``), its low-bit copies from the cache folder, made
        and kept there at the first time. `torchlamp.prepared` gives the policy, statistics and ``undo()``.

    Returns
    -------
    tuple
        The transformers model on the CPU, and its tokenizer.

    Raises
    ------
    OSError
        The package, file or folder is missing or damaged, or the hub can't be reached; says what to run.
    ValueError
        What is there is no causal language model that transformers can load, or weights are missing, unexpected or of
        another shape; another dtype; a precision that `prepare` refuses.
    TypeError
        `name` is no string.
    MemoryError
        The model doesn't fit into the memory that is free; or, told from the headers of its files before anything is
        loaded, into the memory that the machine has.
    """
    if isinstance(name, Path):
        name = str(name)
    if not isinstance(name, str):
        raise TypeError(f"a model is named by a string, got {type(name).__name__}: {name!r}")
    if dtype not in ("float32", "auto"):
        raise ValueError(f"dtype={dtype!r}: allowed are 'float32' and 'auto', which keeps the checkpoint's")
    _check_fits(name, dtype, precision)
    try:
        with _collector_paused():
            if precision is None:
                model, tokenizer = _load(name, dtype)
            else:
                from torchlamp.models.load_prepared import load_prepared

                model, tokenizer = load_prepared(
                    name, precision, partial(_weights_folder, name), partial(_load, name, "auto")
                )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"model {name!r} doesn't fit into the memory that is free ({conversion.first_line(error)}): close other "
            "programs, or take a smaller model"
        ) from error
    # Results are named after what was asked for, not after a folder of the cache.
    model.name_or_path = model.config._name_or_path = name
    return model, tokenizer


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep the garbage collector out: loading makes millions of objects that stay, and a fifth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def memory_need(
    name: str, *, dtype: str = "float32", precision: str | Policy | None = None, context: int = 0
) -> Need:
    """What a model will need in memory, from the headers of its files; nothing is loaded.

    Parameters
    ----------
    name, dtype, precision
        As for `load`. The first load of a GGUF file needs it in float32, whatever the precision.
    context : int
        Tokens whose keys and values are counted.

    Raises
    ------
    OSError, ValueError
        As for `load`; a model of the hub that isn't on this machine, and one without safetensors files.
    """
    folder = _weights_folder(name)
    if folder is None and (name in PACKAGED or name.endswith(".gguf")):
        source = PACKAGED[name].gguf() if name in PACKAGED else nullcontext(Path(name).expanduser())
        with source as path:
            header = read_header(path)
            if header is None:
                raise ValueError(f"{str(path)!r} is no GGUF file")
            config = partial(_config_of, str(path.parent), gguf_file=path.name)
            return need(name, config, (header.numbers, 4 * header.numbers), precision, context)
    found = None if folder is None else weights_in(folder)
    if folder is None or found is None:
        raise OSError(
            f"model {name!r}: no safetensors files on this machine whose headers would say what it needs"
        )
    numbers, size = found
    if precision is None and dtype == "float32":
        size = 4 * numbers
    return need(
        name, partial(_config_of, str(folder)), (numbers, size), precision, context, precision is not None
    )


def _check_fits(name: str, dtype: str, precision: str | Policy | None) -> None:
    """MemoryError for a model that is larger than the machine's memory; whoever loads it finds all other errors."""
    if name in PACKAGED:
        return
    try:
        # The exact sizes of copies take a moment, and matter only where those of float32 wouldn't fit.
        found = memory_need(name)
        if not found.fits:
            found = memory_need(name, dtype=dtype, precision=precision)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return
    found.check()


def _config_of(source: str, **options: str) -> Any:
    from transformers import AutoConfig

    with quiet_transformers():
        return AutoConfig.from_pretrained(source, local_files_only=True, **options)


def _load(name: str, dtype: str, trusted: Collection[str] = ()) -> tuple[Any, Any]:
    """`load`; of a converted copy, files named in `trusted` aren't hashed."""
    if name in PACKAGED:
        return _from_gguf(cache_entry(name), PACKAGED[name].gguf(), trusted)
    path = Path(name).expanduser()
    _check_path(name, path)
    if name.endswith(".gguf"):
        return _from_gguf(cache_entry(name), nullcontext(path), trusted)
    if name and path.is_dir():
        return _pretrained(str(path), name, dtype)
    return _pretrained(name, name, dtype)


def _weights_folder(name: str) -> Path | None:
    """The folder that a model's weights are read from; None: there is none yet.

    Raises
    ------
    OSError
        The package, file or folder that the name names isn't there.
    """
    path = Path(name).expanduser()
    if name in PACKAGED or name.endswith(".gguf"):
        if name not in PACKAGED:
            _check_path(name, path)
        entry = cache_entry(name)
        return entry if entry.is_dir() else None
    if name and path.is_dir():
        _check_path(name, path)
        return path
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json") if name.count("/") < 2 else None
    return Path(found).parent if isinstance(found, str) else None


def check_name(name: str) -> None:
    """Find out, without loading it, that a model isn't there; a hub name of the right form passes.

    Raises
    ------
    OSError
        The package isn't installed, or there is no such file or folder.
    ValueError
        A slip in the name of a packaged model; the nearest one is suggested.
    """
    if name in PACKAGED:
        PACKAGED[name].identity()
        return
    path = Path(name).expanduser()
    _check_path(name, path)
    if not path.exists() and (hint := _hint(name)):
        raise ValueError(f"unknown model {name!r}: {hint}{_allowed()}")


def _check_path(name: str, path: Path) -> None:
    """FileNotFoundError if a name that can only be a file or folder is none that holds a model."""
    if name.endswith(".gguf"):
        if not path.is_file():
            raise FileNotFoundError(f"no file {name!r}: give the path of an existing .gguf file")
    elif name and path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"folder {name!r} holds no transformers model: it has no config.json")
    elif name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or not name:
        raise FileNotFoundError(f"no model folder or .gguf file {name!r}; {_allowed()}")


def layer_count(name: str) -> int:
    """Layers of a model, from its configuration alone where that is at hand; else the model is loaded.

    Raises
    ------
    OSError, ValueError
        As for `load`.
    """
    config = _config_at_hand(name)
    if config is None:
        config = load(name)[0].config
    return int(config.get_text_config().num_hidden_layers)


def context_length(name: str) -> int | None:
    """Tokens that a model can read; nothing is loaded, converted or fetched.

    None where that isn't known: the configuration doesn't say it, or the model is one of the hub that isn't here yet.

    Raises
    ------
    OSError, ValueError
        As for `load`.
    """
    if name in PACKAGED:
        return PACKAGED[name].context_length
    config = _config_at_hand(name)
    if config is not None:
        found = getattr(config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) else None
    path = Path(name).expanduser()
    header = read_header(path) if name.endswith(".gguf") and path.is_file() else None
    return None if header is None else header.context_length


def _config_at_hand(name: str) -> Any:
    """The transformers configuration in a model's folder, converted copy or copy of the hub's; None: not there yet."""
    from transformers import AutoConfig

    is_gguf = name in PACKAGED or name.endswith(".gguf")
    folder = cache_entry(name) if is_gguf else Path(name).expanduser()
    is_there = (folder / "config.json").is_file()
    if not is_there and (is_gguf or folder.exists()):
        return None
    with quiet_transformers():
        try:
            return AutoConfig.from_pretrained(str(folder) if is_there else name, local_files_only=True)
        except (OSError, ValueError):
            if is_there:
                raise
            return None  # a name of the hub, from which nothing was fetched before


def cache_entry(name: str) -> Path:
    """Where the converted copy of a packaged model or GGUF file is kept, whether it exists or not.

    Raises
    ------
    FileNotFoundError
        The package or the file isn't there.
    """
    if name in PACKAGED:
        stem, content = name, PACKAGED[name].identity()
    else:
        path = Path(name).expanduser()
        stem, content = path.stem, fingerprint(path)
    key = hashlib.sha256(f"{conversion.FORMAT} {version('transformers')} {content}".encode()).hexdigest()
    return cache.cache_folder() / f"{stem}-{key[:16]}"


def _from_gguf(
    entry: Path, source: AbstractContextManager[Path], trusted: Collection[str] = ()
) -> tuple[Any, Any]:
    if (ready := _from_cache(entry, trusted)) is not None:
        return ready
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(cache.locked(entry))
        except OSError as error:
            return _convert_unkept(source, error)
        # Whoever held the lock before may have just written it.
        if entry.exists() and cache.find_problem(entry) is None and (ready := _from_cache(entry)) is not None:
            return ready
        if (unkept := _fill(entry, source)) is not None:
            return unkept
    if (ready := _from_cache(entry)) is not None:
        return ready
    raise OSError(f"the converted model just written to {entry} can't be read back; check that disk")


def _fill(entry: Path, source: AbstractContextManager[Path]) -> tuple[Any, Any] | None:
    """Convert and store; gives the converted model only if it couldn't be stored."""
    with source as gguf:
        converted = _convert(gguf)
    try:
        with work("writing the converted copy"):
            cache.store(entry, lambda folder: conversion.save(*converted, folder))
    except OSError as error:
        _say_unkept(error)
        return converted
    return None


def _from_cache(entry: Path, trusted: Collection[str] = ()) -> tuple[Any, Any] | None:
    """The converted model, or None if there is none or it is damaged, which is then said.

    Full memory is no damage: MemoryError, or what the reader raises for it.
    """
    if not entry.exists():
        return None
    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(cache.find_problem, entry, trusted)
        # This import takes a second or two, and the check runs beside it.
        importlib.import_module("transformers.modeling_utils")
        problem = check.result()
    if problem is None:
        try:
            with quiet_transformers():
                found = conversion.read(entry)
            cache.note_use(entry)
            return found
        except Exception as error:
            if is_out_of_memory(error):
                raise
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
    logger.warning("the cached model in %s is damaged (%s); converting it again", entry, problem)
    return None


def _convert(gguf: Path) -> tuple[Any, Any]:
    check_not_cut(gguf)
    logger.info("converting %s to float32, once: this can take a minute", gguf.name)
    with quiet_transformers(), quiet_gguf_loader(f"converting {gguf.name}"), work(f"reading {gguf.name}"):
        return conversion.convert(gguf)


def _convert_unkept(source: AbstractContextManager[Path], reason: OSError) -> tuple[Any, Any]:
    _say_unkept(reason)
    with source as gguf:
        return _convert(gguf)


def _say_unkept(reason: OSError) -> None:
    logger.warning(
        "the converted model can't be kept in %s (%s): every load will convert it again; "
        "set TORCHLAMP_CACHE to a writable folder",
        cache.cache_folder(),
        reason,
    )


def _pretrained(source: str, name: str, dtype: str = "float32") -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The hub client would try for a minute before it says that there is no network.
    local = Path(source).is_dir() or not hub_resolves()
    if Path(source).is_dir():
        _check_tokenizer(Path(source), name)
    with quiet_transformers(), work(f"loading {name}" if local else f"loading {name} from the hub"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
            model, report = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                local_files_only=local,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except OSError as error:
            if Path(source).is_dir():
                raise OSError(
                    f"folder {name!r} holds no complete transformers model: {conversion.first_line(error)}"
                ) from error
            reason = (
                "no network, and no copy from before" if local else f"it said: {conversion.first_line(error)}"
            )
            raise OSError(
                f"model {name!r} is no packaged model, file or folder, and the hub gave none ({reason}); "
                f"{_hint(name)}{_allowed()}"
            ) from error
        except SafetensorError as error:
            raise OSError(
                f"the weights of model {name!r} are cut or damaged ({conversion.first_line(error)}): get them again"
            ) from error
        except MemoryError:
            raise
        except (
            Exception
        ) as error:  # transformers raises whatever a strange configuration or tokenizer leads it to
            raise ValueError(f"model {name!r} can't be loaded: {_reason(error)}") from error
    check_complete(name, report)
    return model.eval(), tokenizer


def _check_tokenizer(folder: Path, name: str) -> None:
    """FileNotFoundError for a folder in which no tokenizer was saved: transformers would name what it tried instead."""
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"folder {name!r} holds no tokenizer ({', '.join(_TOKENIZER_FILES[:2])}, ...): write it there with "
            "tokenizer.save_pretrained"
        )


def _hint(name: str) -> str:
    """The packaged model that was meant, if a name is nearly its own."""
    near = difflib.get_close_matches(name.lower(), PACKAGED, n=1, cutoff=0.8)
    return f"did you mean {near[0]!r}? " if near else ""


def _reason(error: Exception) -> str:
    """An error's words in one line, its class before them unless it is one whose words are written for users."""
    words = " ".join(str(error).split()[:60]) or type(error).__name__
    return words if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: {words}"


def _allowed() -> str:
    return f"use {' or '.join(PACKAGED)}, a .gguf file, a folder, or a hub name such as 'gpt2'"
