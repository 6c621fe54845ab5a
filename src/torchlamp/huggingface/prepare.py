"""Real low-bit decoding of a transformers model: one call prepares it, one undoes that."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from torchlamp.arithmetic.transforms import Transform
from torchlamp.huggingface.decode_forwards import check_head, check_mlp
from torchlamp.huggingface.decode_plan import DecodePlan, Memory
from torchlamp.huggingface.interface import check_interface, check_no_policy, check_not_prepared
from torchlamp.huggingface.lookahead_cache import LookaheadCache, can_rotate
from torchlamp.huggingface.sites import Sites
from torchlamp.kernels import native
from torchlamp.policy.decodable import Settings, settings
from torchlamp.policy.policy import Policy, SitePolicy
from torchlamp.policy.precision import Precision
from torchlamp.simulation.statistics import Statistics

logger = logging.getLogger("torchlamp.decoding")
#: What `prepare` does unless told otherwise; docs/decoding.md says what chose it.
DEFAULT = (
    "scores=int8.center.hadamard+running:0.001, values=int8+topz:0.003, qkv=int12, attention_out=int12, "
    "mlp_up=int12, mlp_down=int12, lm_head=int8+running:1e-05"
)
#: Eight bits everywhere, for those who would take Q8_0: as fast, and closer to float32.
FAST = (
    "scores=int8.center.hadamard+running:0.01, values=int8+topz:0.02, qkv=int12, attention_out=int8, "
    "mlp_up=int8, mlp_down=int8+output:0.0006, lm_head=int8+running:0.001"
)


@dataclass(repr=False)
class Prepared:
    """A model whose decoding reads low-bit copies; `undo`, or the end of a `with` block, gives it back as it was."""

    model: Any
    #: What really runs, keywords of `prepare` included.
    policy: Policy
    statistics: Statistics
    memory: Memory
    #: What the kernel of each named site is told.
    settings: dict[str, Settings]
    #: Dtype of the cache's copies in full.
    full: str = "float16"
    _plan: DecodePlan | None = None

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        return f"<Prepared {kind} under {str(self.policy)!r}: {self.memory}; {self.statistics}>"

    def cache(self) -> LookaheadCache:
        """An empty look-ahead cache with the policy's formats and thresholds, for calls of the model itself.

        Raises
        ------
        ValueError
            The policy leaves the attention in full precision.
        """
        if "scores" not in self.settings:
            raise ValueError(
                f"policy '{self.policy}' leaves out scores and values: use transformers' DynamicCache"
            )
        return LookaheadCache(
            self.model.config,
            scores=self.policy.sites["scores"],
            values=self.policy.sites["values"],
            full=self.full,
            center=self.settings["scores"].center,
            hadamard=self.settings["scores"].hadamard,
            statistics=self.statistics,
        )

    def undo(self) -> None:
        """Give the model its own attention, forwards and cache back; a second call does nothing."""
        if self._plan is not None:
            self._plan.undo()

    def __enter__(self) -> "Prepared":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


@torch.no_grad()
def prepare(
    model: nn.Module,
    policy: str | Policy | None = None,
    *,
    top: int = 1,
    full: str = "float16",
    center: bool | None = None,
    hadamard: bool | None = None,
) -> Prepared:
    """Prepare a model for low-bit decoding.

    Steps that decode one token of each sequence then read low-bit copies of weights, keys and values, and full
    precision where the policy's rules look ahead to a difference; longer steps (the prompt) run in float32 as before.
    ``model.generate`` uses a look-ahead cache of its own accord; calls of the model itself take `Prepared.cache`.
    The weights are copied at once and must not be changed before `undo`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A float32 decoder on the CPU, of an architecture whose modules bear the names of Llama's, Gemma's or Phi-3's.
    policy : str or Policy, optional
        For example ``"scores=int8.center.hadamard+running:0.01, values=int8+topz:0.01, qkv=int12"``; sites that aren't
        named are read in full precision. Without one, `DEFAULT`; it and `FAST` are taken less the sites and transforms
        that the model's architecture doesn't allow.
    top : int
        So many largest logits are provably those of the full-precision head.
    full : str
        ``"float16"`` or ``"float32"`` for what is copied in full: keys and values, and columns of the down projections.
    center, hadamard : bool, optional
        Apply the transform at `scores`, or don't, whatever the policy names; None leaves it to the policy.

    Returns
    -------
    Prepared
        With ``statistics``, ``memory``, ``cache()`` and ``undo()``; also a context manager.

    Raises
    ------
    TypeError
        Not a transformers model, or weights that aren't float32.
    ValueError
        A policy that can't be read or that no kernel runs, an architecture that a site doesn't know, or a model that is
        prepared already.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is no transformers model: pass a transformers.PreTrainedModel"
        )
    if model.device.type != "cpu":
        raise ValueError(
            f"the model is on {model.device}: low-bit decoding has kernels for the CPU, use .to('cpu')"
        )
    if top < 1:
        raise ValueError(f"top={top}: give at least 1")
    if model.dtype != torch.float32:
        raise TypeError(
            f"the model is {model.dtype}: low-bit copies are made of float32, load it with dtype=torch.float32"
        )
    check_not_prepared(model)
    check_no_policy(model)
    if not Sites(model).layers:
        check_interface(model)  # of the two that are missing, what a reader of the model's name understands
    parsed = Policy.parse(DEFAULT if policy is None else policy)
    if parsed in (Policy.parse(DEFAULT), Policy.parse(FAST)):
        parsed = _possible(model, parsed)
    parsed = _with_transforms(parsed, center=center, hadamard=hadamard)
    told = settings(parsed)
    sizes = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    prepared = Prepared(model, parsed, Statistics(), Memory(sum(sizes.values())), told, full)
    if "scores" in told:
        check_interface(model)
        if not told["scores"].center and center is None:
            logger.warning(
                "scores without .center: the first edition centred keys, and rotated them, of its own accord; "
                "write scores=int%d.center.hadamard for that",
                told["scores"].bits,
            )
        prepared.cache()  # refuses options that can't be
    native.warn_if_absent("low-bit decoding")
    prepared._plan = DecodePlan(model, told, prepared.statistics, prepared.memory, full, top)
    try:
        prepared._plan.put(prepared.cache if "scores" in told else None)
    except BaseException:
        prepared.undo()
        raise
    return prepared


def _with_transforms(policy: Policy, **wanted: bool | None) -> Policy:
    """The policy with these transforms of `scores` named (True) or not (False); None leaves them alone."""
    sites = policy.sites
    if "scores" not in sites:
        return policy
    precision = sites["scores"].precision
    kept = [t for t in precision.transforms if wanted.get(str(t)) is None]
    added = [Transform.parse(name) for name, value in wanted.items() if value]
    changed = Precision(precision.operand, precision.accumulator, (*kept, *added))
    return Policy(sites={**sites, "scores": SitePolicy(changed, sites["scores"].rule)})


def _possible(model: PreTrainedModel, policy: Policy) -> Policy:
    """The policy without the attention, rotation, MLPs and LM head that the model or the kernels don't allow."""
    sites = Sites(model)

    def without(policy: Policy, check: Callable[[], object], *names: str) -> Policy:
        try:
            check()
        except ValueError as reason:
            logger.warning("%s: read in full precision, since %s", " and ".join(names), reason)
            return policy.without(*names)
        return policy

    policy = without(policy, lambda: check_interface(model), "scores", "values")
    if "scores" in policy.sites and not can_rotate(model.config):
        logger.warning("scores: keys aren't rotated, since the head size is no power of two")
        policy = _with_transforms(policy, hadamard=False)
    policy = without(
        policy, lambda: [check_mlp(sites, layer) for layer in sites.layers], "mlp_up", "mlp_down"
    )
    return without(policy, lambda: check_head(sites), "lm_head")
