"""`fold`: static transforms put into a model's weights, so that plain narrow sums are the better ones."""

import copy
import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchlamp.arithmetic.transforms import TRANSFORMS, Transform
from torchlamp.huggingface.folding.parts import Gain, weight_of
from torchlamp.huggingface.folding.reasons import Anatomy
from torchlamp.huggingface.folding.stream import Stream, fold_readers
from torchlamp.huggingface.folding.sublayers import fold_neurons, fold_scores, fold_values
from torchlamp.huggingface.lookahead import check_untouched
from torchlamp.huggingface.sites import Sites
from torchlamp.policy.policy import Policy
from torchlamp.policy.sites import SITES
from torchlamp.simulation.calibration import Calibration

logger = logging.getLogger("torchlamp.fold")
#: Logits of a folded model may differ from the model's by this share of their largest magnitude: rounding only.
TOLERANCE = 1e-3
_CHECKED_TOKENS = 16


@torch.no_grad()
def fold(model: PreTrainedModel, policy: str | Policy, calibration: Calibration) -> PreTrainedModel:
    """A plain transformers model with the same float32 logits, in whose weights a policy's transforms are.

        >>> policy = "scores=ps4.sort, attention_out=ps5.center.sort, mlp_down=ps5.sort"
        >>> folded = torchlamp.fold(model, policy, torchlamp.calibrate(model, windows, policy))
        >>> torchlamp.evaluate(folded, other_windows, "scores=ps4, attention_out=ps5, mlp_down=ps5")

    Its sums run in the representative that rounds less under any kernel, torchlamp's or another's: run it under the
    policy without the transforms. What passes into weights depends on the model (docs/transforms.md 8); each transform
    that can't is named with the reason in a warning of one line, and may still be applied when the model runs. Heads
    and neurons may have other numbers than in `model`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder that `lookahead` takes; it isn't changed. Half-precision weights are widened in the result.
    policy : str or Policy
        The transforms named at each site are folded; accumulators and rules don't matter.
    calibration : Calibration
        Of this model and policy, from `torchlamp.calibrate`.

    Returns
    -------
    transformers.PreTrainedModel
        A float32 model of the same class, which can be saved and loaded as any other. It takes its own memory.

    Raises
    ------
    TypeError
        Not a transformers model, or no calibration.
    ValueError
        A policy without transforms or of which nothing can be folded; a calibration of another policy or model; a
        model that a policy is attached to or that is prepared; a model whose logits would change.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is no transformers model: pass a transformers.PreTrainedModel"
        )
    if not isinstance(calibration, Calibration):
        raise TypeError(
            f"calibration={calibration!r} is no Calibration: make one with torchlamp.calibrate(model, windows, policy)"
        )
    check_untouched(model)
    precisions = {site: part.precision for site, part in Policy.parse(policy).sites.items()}
    wanted = {site: known.transforms for site, known in precisions.items() if known.transforms}
    if not wanted:
        raise ValueError(f"policy '{policy}' names no transform: there is nothing to fold")
    folded = copy.deepcopy(model).float()
    anatomy = Anatomy(folded, Sites(folded))
    chosen, reasons = _choose(anatomy, wanted)
    if not chosen:
        raise ValueError(
            f"nothing of policy '{policy}' can be folded into {type(model).__name__}: {reasons[0]}"
        )
    for reason in reasons:
        logger.warning("not folded: %s", reason)
    promote = precisions["mlp_down"].sums.promote if "mlp_down" in precisions else 0
    _Folding(anatomy, calibration, chosen, promote).run()
    _check_same(model, folded)
    return folded


def _choose(
    anatomy: Anatomy, wanted: dict[str, tuple[Transform, ...]]
) -> tuple[dict[str, list[Transform]], list[str]]:
    """The transforms of each site that can be folded, and for each other one a line that says why not."""
    chosen: dict[str, list[Transform]] = {}
    reasons: list[str] = []
    for site, transforms in wanted.items():
        for transform in transforms:
            reason = anatomy.reason(site, transform.name)
            if reason is None:
                chosen.setdefault(site, []).append(transform)
            else:
                reasons.append(f"{transform} at {site}, since {reason}")
    return chosen, reasons


class _Folding:
    """One model being folded, in place: the stream's readers first, whose energies are those of the model as it was."""

    def __init__(
        self, anatomy: Anatomy, calibration: Calibration, chosen: dict[str, list[Transform]], promote: int
    ) -> None:
        self.anatomy, self.calibration, self.chosen = anatomy, calibration, chosen
        #: Of the down projection's accumulator, for the order of the neurons.
        self.promote = promote

    def run(self) -> None:
        """Fold every site."""
        self._stream()
        for number, layer in enumerate(self.anatomy.sites.layers):
            self._attention(number)
            if "mlp_down" in self.chosen:
                ups = self.anatomy.sites.modules(SITES["mlp_up"], layer)
                is_gated = self.anatomy.sites.is_gated(layer)
                down = self.anatomy.sites.modules(SITES["mlp_down"], layer)[0]
                (inputs,) = self.calibration.of("mlp_down", number, (1, weight_of(down).shape[1]))
                fold_neurons(ups, is_gated, down, self.chosen["mlp_down"], inputs, self.promote)

    def _stream(self) -> None:
        sort = TRANSFORMS["sort"]
        energies: list[Tensor] = []
        for site in ("qkv", "mlp_up", "lm_head"):
            for index, (norm, readers) in enumerate(
                self.anatomy.readers(site) if site in self.chosen else ()
            ):
                size = weight_of(readers[0]).shape[1]
                (inputs,) = self.calibration.of(site, -1 if site == "lm_head" else index, (1, size))
                gain = Gain.of(self.anatomy.sites, norm)
                others = [transform for transform in self.chosen[site] if transform != sort]
                own = fold_readers(gain, readers, others, inputs)
                if sort in self.chosen[site]:
                    energies.append(own)
        if energies:
            order = torch.stack(energies).sum(0).argsort(stable=True)
            Stream(self.anatomy.model, self.anatomy.sites).reorder(order)

    def _attention(self, number: int) -> None:
        if not self.chosen.keys() & {"scores", "attention_out"}:
            return
        attention = self.anatomy.attentions[number]
        if "scores" in self.chosen:
            left, right = self.calibration.of("scores", number, (attention.key_heads, attention.size))
            is_rotary = self.anatomy.positions == "halves"
            fold_scores(attention, self.chosen["scores"], left, right, is_rotary)
        if "attention_out" in self.chosen:
            transforms = self.chosen["attention_out"]
            if TRANSFORMS["center"] in transforms and attention.value.bias is None:
                _add_biases(self.anatomy, number)
            shape = (1, weight_of(attention.out).shape[1])
            (inputs,) = self.calibration.of("attention_out", number, shape)
            fold_values(attention, transforms, inputs)


def _add_biases(anatomy: Anatomy, number: int) -> None:
    """Give the projections of a layer the biases, zero, that its class has where the configuration asks for them."""
    anatomy.model.config.get_text_config().attention_bias = True
    layer = anatomy.sites.layers[number]
    modules = [
        module for site in ("qkv", "attention_out") for module in anatomy.sites.modules(SITES[site], layer)
    ]
    for module in modules:
        if module.bias is None:
            weight = weight_of(module)
            module.bias = nn.Parameter(weight.new_zeros(weight.shape[0]))


def _check_same(model: PreTrainedModel, folded: PreTrainedModel) -> None:
    """Refuse a result whose logits aren't the model's: something of the model isn't what its names say (ValueError)."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(_CHECKED_TOKENS, device=model.device) * 7919 + 3) % vocabulary
    logits = []
    for each in (model, folded):
        training = each.training
        each.eval()
        logits.append(each(input_ids=tokens[None], use_cache=False).logits.float())
        each.train(training)
    expected, found = logits
    difference, largest = (found - expected).abs().max(), expected.abs().max()
    if not bool(difference <= TOLERANCE * largest):
        raise ValueError(
            f"{type(model).__name__}: folding would change logits by {float(difference):.2g} of {float(largest):.2g}; "
            "something of this architecture isn't known, so it is left as it is: name fewer transforms"
        )
