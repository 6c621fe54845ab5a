"""Whether modules of a model still do what their classes in torch and transformers say, and nothing else.

A native call for a whole MLP, layer or model runs none of the modules inside it: it may stand in their place only where
nobody could tell. `PlainModules` looks for all that PyTorch lets a user change: hooks of any kind, a forward of the
instance's own, another class, another child, a forward that somebody has put into the class.
"""

import sys
from collections.abc import Collection, Iterable, Mapping
from itertools import chain, repeat
from typing import Any

from torch import nn
from torch.nn.modules import module as _torch

#: Packages whose classes are taken at their word.
_TRUSTED = ("torch", "transformers")


class PlainModules:
    """The modules below one module, as they are now.

    `hold` is cheap enough for each decoded token: it goes over precomputed tuples of dictionaries in C. A copy of a
    model makes its own tuples when it is first asked; children and classes are those that the original was made with.

    Parameters
    ----------
    root : torch.nn.Module
        Its own hooks and instance's forward don't count: whoever calls it runs them.
    forwards : mapping from module to forward, optional
        The forwards that modules below have been given by the caller; every other module must run its class's.
    called : collection of torch.nn.Module, optional
        Children that the caller calls as modules, with all that hangs on them: only what is inside the others counts.
    captures : bool
        Whether transformers' own hooks, which collect hidden states when they are asked for, count. They stay on the
        modules once they have been needed.
    """

    def __init__(
        self,
        root: nn.Module,
        forwards: Mapping[nn.Module, Any] | None = None,
        *,
        called: Collection[nn.Module] = (),
        captures: bool = True,
    ) -> None:
        self.root, self.captures = root, captures
        outside = {module for child in called for module in child.modules()}
        self._modules = [module for module in list(root.modules())[1:] if module not in outside]
        self._classes = [type(module) for module in [root, *self._modules]]
        self._parents = [module for module in [root, *self._modules] if module._modules]
        self._children = [child for parent in self._parents for child in parent._modules.values()]
        given = forwards or {}
        self._forwards = [given.get(module) for module in self._modules]
        #: The classes and what they call forward; a class that somebody has patched before isn't known.
        self._functions = {kind: kind.forward for kind in self._classes}
        self.known = all(is_known(kind) for kind in self._functions)
        self._watched: tuple[Any, ...] | None = None

    def hold(self) -> bool:
        """Whether every module below does just what its class says, or what the caller has made of it."""
        if not self.known or _torch._global_forward_hooks or _torch._global_forward_pre_hooks:
            return False
        if self._watched is None:
            self._watched = self._watch()
        hooks, owners, parents = self._watched
        return (
            not (
                any(hooks)
                and (self.captures or not all(map(_captures, chain.from_iterable(map(dict.values, hooks)))))
            )
            and list(map(dict.get, owners, repeat("forward"))) == self._forwards
            and list(chain.from_iterable(map(dict.values, parents))) == self._children
            and [type(self.root), *map(type, self._modules)] == self._classes
            and all(kind.forward is function for kind, function in self._functions.items())
        )

    def _watch(self) -> tuple[Any, ...]:
        hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in self._modules]
        owners = tuple(vars(module) for module in self._modules)
        return tuple(chain.from_iterable(hooks)), owners, tuple(parent._modules for parent in self._parents)

    def __getstate__(self) -> dict[str, Any]:
        # A copied module has dictionaries of its own.
        return {**vars(self), "_watched": None}


def is_known(kind: type[nn.Module]) -> bool:
    """Whether a class is one of torch's or transformers', by identity, and its forward is the one written there."""
    return _is_trusted(kind.__module__) and _found(kind) is kind and _is_trusted(kind.forward.__module__)


def is_one_of(kind: type, names: Iterable[str], family: str) -> bool:
    """Whether a class is, by identity, one of these of transformers' modelling file of a family (``"llama"``)."""
    file = f"transformers.models.{family}.modeling_{family}"
    return kind.__module__ == file and kind.__name__ in names and _found(kind) is kind


def _found(kind: type) -> Any:
    return getattr(sys.modules.get(kind.__module__), kind.__qualname__, None)


def _is_trusted(name: str) -> bool:
    return name.partition(".")[0] in _TRUSTED and not name.startswith("transformers_modules")


def _captures(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
