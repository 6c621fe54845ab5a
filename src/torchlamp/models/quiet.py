"""Keep transformers' progress bars and advice out of the output while it loads or tokenises."""

import importlib
import logging as standard_logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torchlamp.steps import each

#: Draws its bar with tqdm itself, whatever the settings of transformers say.
_GGUF_LOADER = "transformers.modeling_gguf_pytorch_utils"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the block transformers and its hub client report errors only and draw no bars."""
    from transformers.utils import logging

    hub = standard_logging.getLogger("huggingface_hub")
    hub_level = hub.level
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub.setLevel(standard_logging.ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        hub.setLevel(hub_level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def quiet_gguf_loader(what: str) -> Iterator[None]:
    """Within the block the GGUF loader of transformers draws no bar; its tensors are steps of the work `what`."""
    try:
        loader = importlib.import_module(_GGUF_LOADER)
        drawing = loader.tqdm
    except (ImportError, AttributeError):
        yield
        return

    def counted(tensors: Iterable[Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
        return each(what, tensors)

    loader.tqdm = counted  # type: ignore[attr-defined]
    try:
        yield
    finally:
        loader.tqdm = drawing  # type: ignore[attr-defined]
