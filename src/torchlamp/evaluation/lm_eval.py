"""lm-evaluation-harness: the model "lamp", a Hugging Face model that runs under a policy.

Importing this module registers it. The package also declares it in the entry-point group ``lm_eval.models``, which
releases of the harness after 0.4.13 read; with those before it, `main` (``torchlamp lm-eval``) registers it first and
then runs the harness's own command line.
"""

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import nn
from tqdm import tqdm

import torchlamp
from torchlamp.huggingface.lookahead import lookahead
from torchlamp.policy.policy import Policy

#: Logged where the harness logs, and shown as its own lines are.
logger = logging.getLogger("lm_eval.torchlamp")

#: Arguments of the harness's own model "hf" that mean the same here.
PASSED_ON = frozenset(
    {
        "add_bos_token", "batch_size", "chat_template_args", "enable_thinking", "logits_cache", "max_batch_size",
        "max_length", "prefix_token_id", "think_end_token", "truncation",
    }
)  # fmt: skip


@register_model("lamp")
class LampLM(HFLM):  # type: ignore[misc]
    """A model of `torchlamp.load` under a policy, for the tasks of lm-evaluation-harness.

    Requests of different lengths never share a batch, so that no padding is computed: log-likelihoods and
    recompute rates don't depend on the batch size.

    Parameters
    ----------
    pretrained : str or PreTrainedModel
        As for `torchlamp.load`: ``smollm2-135m``, ``gemma3-270m``, a .gguf file, a folder, a hub name. Or a
        float32 model, and then `tokenizer` is needed; it runs under the policy until `close`.
    accumulate, rule : str
        Of the attention scores; ``ps4`` and ``strict:0.1`` if they are left out. The harness turns
        ``rule=none`` into None, which here is the rule `none`.
    policy : str
        Instead of the two: accumulator and rule per site. Where the harness splits arguments at commas, write
        a semicolon for a comma: ``policy=scores=ps4+strict:0.1;values=ps7+none``, ``rule=sink-recent:4;16``.
    seed : int
        Of the random rules.
    tokenizer : transformers tokenizer
        Only beside a model that is already loaded.
    device : str or None
        Where the model runs; CUDA is passed over where there is none. None: where the model is, and that is
        the CPU if it is loaded here.
    **arguments
        Arguments of the harness's model "hf": those in `PASSED_ON`, and `dtype` if it is float32.

    Raises
    ------
    ValueError
        An unknown policy, or both spellings; an argument that this model doesn't take; batch size "auto".
    OSError
        There is no such model.
    """

    def __init__(
        self,
        pretrained: Any,
        accumulate: str = "",
        rule: str | None = "",
        policy: str | None = None,
        seed: int = 0,
        tokenizer: Any = None,
        device: str | None = None,
        **arguments: Any,
    ) -> None:
        self.policy = _policy(policy, accumulate, rule)
        self.seed = _seed(seed)
        model, tokenizer, name = _model(pretrained, tokenizer)
        # The harness asks for CUDA wherever nothing else is asked for.
        if device is not None and (torch.cuda.is_available() or not str(device).startswith("cuda")):
            model.to(device)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **_checked(arguments))
        self.pretrained = name
        self._rates: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self._stack = ExitStack()
        self.statistics = self._stack.enter_context(lookahead(model, self.policy, seed=self.seed))

    def close(self) -> None:
        """Take the policy off the model, which then runs as it did before."""
        self._stack.close()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one; counted by task."""
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text; counted by task."""
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of prompts; counted by task."""
        return self._by_task(super().generate_until, requests, disable_tqdm)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into the block "config" of its results: also "lamp", with recompute rates."""
        rates = {task: selected / max(eligible, 1) for task, (selected, eligible) in self._rates.items()}
        logger.info("policy %s: %s", self.policy, self.statistics)
        return {
            "model_num_parameters": self._model.num_parameters(),
            "model_dtype": str(self._model.dtype),
            "lamp": {
                "policy": str(self.policy),
                "recompute_rate": self.statistics.recompute_rate,
                "recompute_rate_by_site": self.statistics.rates,
                "recompute_rate_by_task": rates,
                "recompute_rate_by_layer": self.statistics.by_layer,
                "rows_touched": self.statistics.rows_touched,
                "eligible": self.statistics.eligible,
                "selected": self.statistics.selected,
                "seed": self.seed,
                "torchlamp_version": torchlamp.__version__,
            },
        }

    def _by_task(
        self, method: Callable[..., list[Any]], requests: Sequence[Any], disable_tqdm: bool
    ) -> list[Any]:
        """Run the requests of one task after those of another, and note what each selected."""
        tasks: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            tasks[str(request.task_name)].append(place)
        answers: dict[int, Any] = {}
        for task, places in tasks.items():
            selected, eligible = self.statistics.selected, self.statistics.eligible
            found = method([requests[place] for place in places], disable_tqdm=disable_tqdm)
            answers.update(zip(places, found, strict=True))
            self._rates[task][0] += self.statistics.selected - selected
            self._rates[task][1] += self.statistics.eligible - eligible
        return [answers[place] for place in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """As the parent's, for one length after the other, the longest first."""
        lengths: dict[int, list[int]] = defaultdict(list)
        for place, (_, context, continuation) in enumerate(requests):
            lengths[min(len(context) + len(continuation), self.max_length + 1)].append(place)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for length in sorted(lengths, reverse=True):
                places = lengths[length]
                found = super()._loglikelihood_tokens(
                    [requests[place] for place in places], disable_tqdm=True, override_bs=override_bs
                )
                answers.update(zip(places, found, strict=True))
                bar.update(len(places))
        return [answers[place] for place in range(len(requests))]


def main(arguments: Sequence[str]) -> None:
    """Run the harness's command line, ``lm_eval ARGUMENTS``, with the model "lamp" in its registry."""
    from lm_eval.__main__ import cli_evaluate

    # The harness reads, and completes, the process's own arguments.
    own, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = own


def _policy(policy: str | None, accumulate: str, rule: str | None) -> Policy:
    if policy is None:
        return Policy(_commas(accumulate or "ps4"), _commas("strict:0.1" if rule == "" else rule or "none"))
    if accumulate != "" or rule != "":
        raise ValueError(
            f"policy {policy!r} already names accumulator and rule: leave out accumulate and rule"
        )
    return Policy.parse(_commas(policy))


def _seed(seed: Any) -> int:
    """A seed of random rules. ValueError unless it is a whole number of 0 or more."""
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed={seed!r}: a whole number of 0 or more is expected")
    return seed


def _commas(spelling: Any) -> str:
    # A number, as `rule=0.1` gives one, is refused by name further on.
    return str(spelling).replace(";", ",")


def _model(pretrained: Any, tokenizer: Any) -> tuple[Any, Any, str]:
    """The model, its tokenizer, and the name it has in results."""
    if isinstance(pretrained, nn.Module):
        if tokenizer is None:
            raise ValueError("a model that is already loaded needs its tokenizer: pass tokenizer=...")
        return pretrained, tokenizer, str(getattr(pretrained, "name_or_path", ""))
    if tokenizer is not None:
        raise ValueError(f"tokenizer {str(tokenizer)!r}: model {pretrained!r} brings its own, leave it out")
    return *torchlamp.load(pretrained), pretrained


def _checked(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments for the parent class."""
    arguments = dict(arguments)
    dtype = str(arguments.pop("dtype", "float32")).removeprefix("torch.")
    if dtype not in ("float32", "auto"):
        raise ValueError(f"dtype {dtype!r}: rounding is simulated from float32, leave dtype out")
    unknown = sorted(arguments.keys() - PASSED_ON)
    if unknown:
        raise ValueError(
            f"unknown model argument {unknown[0]!r}: model 'lamp' takes pretrained, accumulate, rule, policy, "
            f"seed, device, {', '.join(sorted(PASSED_ON))}"
        )
    if not str(arguments.get("batch_size", 1)).isdecimal():
        raise ValueError(
            f"batch size {arguments['batch_size']!r}: it is found by trial runs, which would be counted in the "
            "recompute rate; give a number"
        )
    return arguments
