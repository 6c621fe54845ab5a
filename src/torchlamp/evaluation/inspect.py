"""`torchlamp inspect`: which scores of a short text a policy recomputes, recorded while the model runs under it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchlamp.data.text import check_context
from torchlamp.evaluation.loop import inference_in_eval_mode
from torchlamp.evaluation.metrics import Comparer
from torchlamp.huggingface.lookahead import check_untouched, lookahead
from torchlamp.models.quiet import quiet_transformers
from torchlamp.policy.policy import Policy
from torchlamp.simulation.attention_call import Observation
from torchlamp.steps import work

#: Tokens of a text at most: beyond these neither the map nor the page's size serves a reader.
MAX_TOKENS = 256


@dataclass(frozen=True)
class Layer:
    """What the look-ahead of a layer saw and chose; tensors (heads, queries, keys), on the CPU.

    Attributes
    ----------
    visible, chosen : Tensor
        bool: the keys that a query sees, and the scores recomputed in float32.
    probabilities : Tensor
        float32: the softmax of the low-precision scores, 0 where not visible.
    scores, exact : Tensor
        float32: the low-precision scores, scaled, and the same in float32; NaN where not visible.
    """

    visible: Tensor
    chosen: Tensor
    probabilities: Tensor
    scores: Tensor
    exact: Tensor


@dataclass(frozen=True)
class Inspection:
    """A text under a policy."""

    policy: str
    #: The pieces of the text, special tokens included.
    tokens: list[str]
    #: In running order; layers that ran without a policy for the scores are missing.
    layers: dict[int, Layer]
    #: float64 (tokens,): KL(reference || tested) of the next-token distributions, in nats.
    kl: Tensor
    recompute_rate: float


def inspect(model: Any, tokenizer: Any, text: str, policy: str | Policy, *, seed: int = 0) -> Inspection:
    """Run a text once in float32 and once under a policy, and record every layer's look-ahead.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A float32, bfloat16 or float16 decoder.
    tokenizer : transformers tokenizer
        Its own.
    text : str
        At most `MAX_TOKENS` tokens.
    policy : str or Policy
        With the site `scores`.
    seed : int
        Of random rules.

    Raises
    ------
    ValueError
        An empty or too long text, a policy without the site `scores`, a model that is no reference: a policy is
        attached to it, or it is prepared for decoding.
    """
    policy = Policy.parse(policy)
    if "scores" not in policy.sites:
        raise ValueError(
            f"policy {str(policy)!r} leaves the scores in float32: inspect shows the site 'scores'"
        )
    with quiet_transformers():
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(torch.int64)
    length = ids.shape[-1]
    if length == 0:
        raise ValueError("the text is empty: give at least one word")
    if length > MAX_TOKENS:
        raise ValueError(
            f"the text has {length} tokens: inspect shows at most {MAX_TOKENS}, give a shorter one"
        )
    check_untouched(model)
    check_context(model, length, "number of tokens")
    ids = ids.to(model.device)
    layers = int(model.config.get_text_config().num_hidden_layers)
    with inference_in_eval_mode(model), work("inspecting layers", layers) as say:
        recorder = _Recorder(length, say)
        reference = model(input_ids=ids, use_cache=False).logits[0]
        with lookahead(model, policy, seed=seed, observe=recorder.observe) as statistics:
            tested = model(input_ids=ids, use_cache=False).logits[0]
    comparer = Comparer()
    kl = comparer.compare(comparer.reference(reference, ids[0]), tested).kl.clamp_min(0)
    return Inspection(
        policy=str(policy),
        tokens=[tokenizer.decode([token]) for token in ids[0].tolist()],
        layers=dict(sorted(recorder.layers.items())),
        kl=kl,
        recompute_rate=statistics.rates["scores"],
    )


class _Recorder:
    """Puts the tiles of each layer together; `say` is told how many layers have begun."""

    def __init__(self, length: int, say: Callable[[int], None]) -> None:
        self.length, self.say = length, say
        self.layers: dict[int, Layer] = {}

    def observe(self, layer: int, seen: Observation) -> None:
        heads = seen.chosen.shape[1]
        if layer not in self.layers:
            shape = (heads, self.length, self.length)
            false, nan = torch.zeros(shape, dtype=torch.bool), torch.full(shape, torch.nan)
            self.layers[layer] = Layer(false, false.clone(), torch.zeros(shape), nan, nan.clone())
            self.say(len(self.layers))
        own, tile = self.layers[layer], seen.tile
        rows = slice(seen.rows.start, seen.rows.stop)
        keys = slice(seen.first_key, seen.first_key + seen.chosen.shape[-1])
        visible = tile.visible[0].cpu()
        own.visible[:, rows, keys] = visible
        own.chosen[:, rows, keys] = seen.chosen[0].cpu()
        own.probabilities[:, rows, keys] = (
            tile.probabilities[0].float().cpu().where(visible, torch.tensor(0.0))
        )
        for target, values in ((own.scores, tile.scores), (own.exact, seen.exact)):
            target[:, rows, keys] = values[0].float().cpu().where(visible, torch.tensor(torch.nan))
