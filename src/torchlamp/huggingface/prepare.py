"""Real low-bit decoding of a transformers model: one call prepares it, one undoes that."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from torchlamp.arithmetic.transforms import Transform
from torchlamp.huggingface.copies import Copies
from torchlamp.huggingface.decode_forwards import check_attention, check_head, check_mlp, check_rows
from torchlamp.huggingface.decode_plan import DecodePlan, Memory, mlp_name
from torchlamp.huggingface.draft_length import Acceptance
from torchlamp.huggingface.exact import exact_generate
from torchlamp.huggingface.exact_plan import ExactPlan
from torchlamp.huggingface.file_weights import FileWeights
from torchlamp.huggingface.interface import check_interface, check_no_policy, check_not_prepared
from torchlamp.huggingface.lookahead_cache import LookaheadCache, can_rotate, check_cache
from torchlamp.huggingface.site_forwards import Forward
from torchlamp.huggingface.sites import Sites
from torchlamp.huggingface.weight_versions import WeightVersions
from torchlamp.huggingface.wide_model import WideModel
from torchlamp.kernels import native
from torchlamp.kernels.full_rows import FULL
from torchlamp.policy.decodable import Settings, settings
from torchlamp.policy.policy import Policy, SitePolicy
from torchlamp.policy.precision import Precision
from torchlamp.policy.sites import SITES
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


#: Words for them.
NAMED = {"default": DEFAULT, "fast": FAST}


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
    #: The policy as it was asked for, before sites and transforms were left out.
    asked: Policy
    #: Dtype of the cache's copies in full.
    full: str = "float16"
    #: Under ``exact=True``: how many of the drafted tokens float32 confirmed.
    acceptance: Acceptance | None = None
    _plan: DecodePlan | ExactPlan | None = None
    _weights: WeightVersions | None = None

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        exact = "" if self.acceptance is None else f"; exact: {self.acceptance}"
        return f"<Prepared {kind} under {str(self.policy)!r}: {self.memory}; {self.statistics}{exact}>"

    def cache(self) -> LookaheadCache:
        """An empty look-ahead cache with the policy's formats and thresholds, for calls of the model itself.

        Raises
        ------
        ValueError
            The policy leaves the attention in full precision, weights were changed since the model was prepared, or
            the model is exact: its own calls are float32's.
        """
        if self.acceptance is not None:
            raise ValueError(
                "exact: calls of the model itself run in float32: use transformers' DynamicCache"
            )
        if self._weights is not None:
            self._weights.check(self.model)
        if "scores" not in self.settings:
            raise ValueError(
                f"policy '{self.policy}' leaves out scores and values: use transformers' DynamicCache"
            )
        cache = LookaheadCache(
            self.model.config,
            scores=self.policy.sites["scores"],
            values=self.policy.sites["values"],
            full=self.full,
            center=self.settings["scores"].center,
            hadamard=self.settings["scores"].hadamard,
            statistics=self.statistics,
        )
        if isinstance(self._plan, DecodePlan) and self._plan.wide.weights is not None:
            cache.after = self._plan.wide.weights.settle
        return cache

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


def prepared(model: nn.Module) -> Prepared:
    """What `prepare` or ``load(precision=...)`` made of a model: its policy, statistics, memory, cache and `undo`.

        >>> model, tokenizer = torchlamp.load("smollm2-135m", precision="default")
        >>> torchlamp.prepared(model).statistics

    Raises
    ------
    ValueError
        The model isn't prepared.
    """
    found = prepared_or_none(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} isn't prepared: call torchlamp.prepare(model, policy), or load it with precision="
        )
    return found


def prepared_or_none(model: nn.Module) -> Prepared | None:
    """`prepared`, or None for a model that isn't."""
    exact = exact_generate(model)
    if exact is not None and isinstance(exact.prepared, Prepared):
        return exact.prepared
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, Forward) and isinstance(forward.prepared, Prepared):
            return forward.prepared
    return None


def decoding_policy(policy: str | Policy | None) -> Policy:
    """The policy that a word of `NAMED`, a text or None (`DEFAULT`) means. ValueError for one that can't be read."""
    if isinstance(policy, str):
        policy = NAMED.get(policy, policy)
    return Policy.parse(DEFAULT if policy is None else policy)


@torch.no_grad()
def prepare(
    model: nn.Module,
    policy: str | Policy | None = None,
    *,
    top: int = 1,
    full: str = "float16",
    center: bool | None = None,
    hadamard: bool | None = None,
    resident: bool = True,
    exact: bool = False,
) -> Prepared:
    """Prepare a model for low-bit decoding.

    Steps of a few tokens then read low-bit copies of weights, keys and values, and full precision where the policy's
    rules look ahead to a difference; longer ones (the prompt) read low-bit weights alike, and their attention is in
    float32.
    ``model.generate`` uses a look-ahead cache of its own accord; calls of the model itself take `Prepared.cache`.
    The weights are copied at once and must not be changed before `undo`; `generate` and `Prepared.cache` refuse those
    that were. ``model.save_pretrained`` writes the model's own weights, in their own dtype. A bfloat16 or float16 model
    keeps its weights as they are and computes in float32 on them: no float32 copy of a matrix is made, and its numbers
    are those of the same model loaded in float32.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A float32, bfloat16 or float16 decoder on the CPU, of any of the families in docs/families.md.
    policy : str or Policy, optional
        For example ``"scores=int8.center.hadamard+running:0.01, values=int8+topz:0.01, qkv=int12"``; sites that aren't
        named are read in full precision. Without one, or as ``"default"``, `DEFAULT`; ``"fast"`` is `FAST`. These two
        are taken less the sites and transforms that the model's architecture doesn't allow.
    top : int
        So many largest logits are provably those of the full-precision head.
    full : str
        ``"float16"`` or ``"float32"`` for what is copied in full: keys and values, and columns of the down projections.
    center, hadamard : bool, optional
        Apply the transform at `scores`, or don't, whatever the policy names; None leaves it to the policy.
    resident : bool
        False leaves the full-precision weights in the file that they were read from (Linux): they take memory while
        they are read, row by row where the look-ahead asks and module by module in prompts, and are let go again.
    exact : bool
        True has ``model.generate`` give float32's own text, token for token: low bits draft, under the policy, and
        a float32 pass over several tokens confirms; samples have float32's distribution. Calls of the model itself
        are float32's. A half-precision model is widened for as long as it is prepared.

    Returns
    -------
    Prepared
        With ``statistics``, ``memory``, ``cache()`` and ``undo()``, and ``acceptance`` where it is exact; also a
        context manager.

    Raises
    ------
    TypeError
        Not a transformers model, weights of another dtype, or half-precision weights of a module whose formula isn't
        known.
    ValueError
        A policy that can't be read or that no kernel runs, an architecture that a site doesn't know, a model that is
        prepared already, or, not to be resident, weights that lie in no file or were changed, or that are to be exact.
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
    other = [name for name, p in model.named_parameters() if p.is_floating_point() and p.dtype not in FULL]
    if other:
        raise TypeError(
            f"{other[0]} is {model.get_parameter(other[0]).dtype}: low-bit copies are made of float32, bfloat16 and "
            "float16 weights; load the model with dtype=torch.float32"
        )
    if not exact:
        return prepare_from(Copies(), model, policy, top, full, center, hadamard, resident)
    if not resident:
        raise ValueError("exact=True reads all weights at every check: leave out resident=False")
    return _prepare_exact(model, policy, top, full, center, hadamard)


def _prepare_exact(
    model: PreTrainedModel,
    policy: str | Policy | None,
    top: int,
    full: str,
    center: bool | None,
    hadamard: bool | None,
) -> Prepared:
    """The model with a `generate` that drafts by a prepared copy on the same weights."""
    check_not_prepared(model)
    check_no_policy(model)
    plan = ExactPlan(model)
    try:
        draft = prepare_from(Copies(), plan.copy, policy, top, full, center, hadamard)
        both = plan.put(draft)
    except BaseException:
        plan.undo()
        raise
    prepared = replace(draft, model=model, acceptance=both.acceptance, _plan=plan)
    plan.generate.prepared = prepared
    return prepared


@torch.no_grad()
def prepare_from(
    copies: Copies,
    model: PreTrainedModel,
    policy: str | Policy | None,
    top: int = 1,
    full: str = "float16",
    center: bool | None = None,
    hadamard: bool | None = None,
    resident: bool = True,
) -> Prepared:
    """`prepare` for a model of a kind that it takes, with copies that may have been kept.

    Raises
    ------
    TypeError, ValueError
        As `prepare`; ValueError for kept copies that aren't those of the model under the policy.
    """
    check_not_prepared(model)
    check_no_policy(model)
    if not Sites(model).layers:
        check_interface(model)  # of the two that are missing, what a reader of the model's name understands
    parsed = decoding_policy(policy)
    wide = WideModel(model, None if resident else FileWeights(model))
    try:
        prepared = _prepared(model, parsed, wide, copies, top, full, center, hadamard)
        if wide.weights is not None:
            wide.weights.settle()
        return prepared
    except BaseException:
        wide.undo()
        raise


def _prepared(
    model: PreTrainedModel,
    policy: Policy,
    wide: WideModel,
    copies: Copies,
    top: int,
    full: str,
    center: bool | None,
    hadamard: bool | None,
) -> Prepared:
    asked = policy
    if policy in (Policy.parse(DEFAULT), Policy.parse(FAST)):
        policy = _possible(model, policy, wide, copies)
    policy = _with_transforms(policy, center=center, hadamard=hadamard)
    told = settings(policy)
    sizes = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    memory = Memory(sum(sizes.values()), resident=wide.weights is None)
    prepared = Prepared(model, policy, Statistics(), memory, told, asked, full)
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
    prepared._plan = DecodePlan(model, told, prepared.statistics, memory, copies, wide, full, top)
    for forward in prepared._plan.forwards.values():
        forward.prepared = prepared
    prepared._weights = WeightVersions(model)
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


def _possible(model: PreTrainedModel, policy: Policy, wide: WideModel, copies: Copies) -> Policy:
    """The policy without the attention, rotation, MLPs and LM head that the model or the kernels don't allow."""
    sites = Sites(model)

    def without(policy: Policy, check: Callable[[], object], *names: str) -> Policy:
        try:
            check()
        except ValueError as reason:
            if set(policy.sites) <= set(names):
                raise ValueError(
                    f"nothing of {type(model).__name__} can be read in low bits: "
                    f"{' and '.join(names)} can't, since {reason}"
                ) from reason
            logger.warning("%s: read in full precision, since %s", " and ".join(names), reason)
            return policy.without(*names)
        return policy

    def in_layers(check: Callable[[nn.Module], object]) -> None:
        if not sites.layers:
            raise ValueError(
                f"{type(model).__name__}: no list of decoder layers found, each with an attention"
            )
        for layer in sites.layers:
            check(layer)

    policy = without(policy, lambda: check_interface(model), "scores", "values")
    if "scores" in policy.sites:
        policy = without(policy, lambda: check_cache(model.config), "scores", "values")
    if "scores" in policy.sites:
        policy = without(policy, lambda: in_layers(partial(check_attention, sites)), "scores", "values")
    if "scores" in policy.sites and not can_rotate(model.config):
        logger.warning("scores: keys aren't rotated, since the head size is no power of two")
        policy = _with_transforms(policy, hadamard=False)
    for name in ("qkv", "attention_out"):
        policy = without(policy, lambda site=SITES[name]: in_layers(partial(check_rows, sites, site)), name)  # type: ignore[misc]
    known = copies.has(mlp_name(0))
    policy = without(
        policy,
        lambda: in_layers(partial(check_mlp, sites, given=wide.forwards, known=known)),
        "mlp_up",
        "mlp_down",
    )
    return without(policy, lambda: check_head(sites), "lm_head")
