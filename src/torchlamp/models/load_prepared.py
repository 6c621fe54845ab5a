"""A model that is prepared as it is loaded: its weights stay in their file, its low-bit copies come from the cache."""

import logging
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from torchlamp.huggingface.copies import Copies
from torchlamp.huggingface.file_weights import FileWeights
from torchlamp.huggingface.prepare import Prepared, decoding_policy, prepare_from
from torchlamp.huggingface.wide_forwards import narrow_modules
from torchlamp.models.kept_copies import KeptCopies, folder_fingerprint
from torchlamp.models.memory import is_out_of_memory
from torchlamp.policy.policy import Policy

logger = logging.getLogger("torchlamp.models")

#: Reads a model and its tokenizer; the files named in its argument needn't be hashed.
Reader = Callable[[Collection[str]], tuple[Any, Any]]


def load_prepared(
    name: str, policy: str | Policy, folder: Callable[[], Path | None], read: Reader
) -> tuple[Any, Any]:
    """A prepared model and its tokenizer.

    Parameters
    ----------
    name : str
        Of the model, as for `load`.
    policy : str or Policy
        As for `prepare`; or "default" or "fast".
    folder : callable
        Gives the folder that the weights are read from, as far as it is there already.
    read : callable
        Reads the model. It is told names of files whose content is vouched for: by copies that were made of it.

    Raises
    ------
    OSError, ValueError, TypeError
        As for `load` and `prepare`.
    """
    parsed = decoding_policy(policy)
    before = folder()
    where = name if before is None else str(before.absolute())
    kept = KeptCopies.of(name, where, str(parsed))
    weights = None if before is None else folder_fingerprint(before)
    tensors: dict[str, Tensor] | None = None
    if weights is not None and kept.fit(weights):
        with ThreadPoolExecutor(1) as pool:
            check = pool.submit(kept.find_problem)
            model, tokenizer = read(("model.safetensors",))
            tensors = _verified(kept, check.result())
        if tensors is not None:
            try:
                _prepare(model, parsed, Copies(tensors))
                return model, tokenizer
            except ValueError as reason:
                logger.warning(
                    "the low-bit copies in %s don't fit (%s); making them again", kept.entry, reason
                )
    # Copies are made of weights that were verified.
    model, tokenizer = read(())
    copies = Copies()
    first = _prepare(model, parsed, copies)
    after = folder()
    if after is not None:
        kept = KeptCopies.of(name, str(after.absolute()), str(parsed))
        whole = _keep(kept, folder_fingerprint(after), copies)
        if whole and (tensors := _verified(kept, None)) is not None:
            # Taken from there at once: the process takes no more memory than those that come after it.
            first.undo()
            again = prepare_from(Copies(tensors), model, first.policy, resident=first.memory.resident)
            again.asked = first.asked
    return model, tokenizer


def _prepare(model: Any, policy: Policy, copies: Copies) -> Prepared:
    """Prepare the model; its weights are left in their file where they lie in one."""
    try:
        narrow_modules(model)
    except TypeError as reason:
        logger.warning("weights are widened to float32 in memory: %s", reason)
        model.float()
    try:
        FileWeights(model)
        resident = False
    except ValueError as reason:
        logger.warning(
            "full-precision weights stay in memory: %s", str(reason).removeprefix("resident=False: ")
        )
        resident = True
    return prepare_from(copies, model, policy, resident=resident)


def _verified(kept: KeptCopies, problem: str | None) -> dict[str, Tensor] | None:
    """The copies on the disk; None if they are damaged, which is said."""
    if problem is None:
        try:
            return kept.read()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
    logger.warning("the low-bit copies in %s are damaged (%s); making them again", kept.entry, problem)
    return None


def _keep(kept: KeptCopies, weights: str, copies: Copies) -> bool:
    """Write copies; False, and a warning, if the disk doesn't take them."""
    try:
        kept.write(weights, copies.tensors)
        return True
    except OSError as error:
        if is_out_of_memory(error):
            raise
        logger.warning(
            "the low-bit copies can't be kept in %s (%s): every load will make them again; set TORCHLAMP_CACHE to a "
            "folder on a disk with room",
            kept.entry.parent,
            error,
        )
        return False
