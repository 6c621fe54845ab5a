"""`evaluate`: a policy against the float32 model on windows of text, with the baselines beside it."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torchlamp.compositions.policy import Policy
from torchlamp.compositions.statistics import Statistics
from torchlamp.integrations.huggingface import lookahead
from torchlamp.study.aggregate import aggregate, mean_and_error
from torchlamp.study.environment import environment
from torchlamp.study.metrics import Comparer, Reference, TokenMetrics
from torchlamp.study.result import REFERENCE_POLICY, Result, Role
from torchlamp.study.runs import Run, plan_runs
from torchlamp.study.text import check_context

logger = logging.getLogger("torchlamp.evaluate")


@dataclass(frozen=True)
class Progress:
    """Where an evaluation stands: handed to the `progress` callback after every forward pass."""

    #: Finished windows, and all.
    windows: int
    total_windows: int
    #: Finished forward passes, and all.
    passes: int
    total_passes: int
    #: What ran last.
    role: Role
    #: Running KL of the tested policy over its windows so far, and its standard error; NaN before the first.
    kl_mean: float
    kl_standard_error: float
    #: Seconds since the start, and an estimate of those to come.
    elapsed: float
    remaining: float


def evaluate(
    model: Any,
    windows: Tensor,
    policy: str | Policy,
    *,
    baselines: bool = True,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    model_name: str | None = None,
    text: str = "unnamed",
) -> Result:
    """Compare a policy, plain low precision and a random control with the float32 model, window by window.

    Every window runs once in float32 with the model's own attention, then once under each policy. Only the
    reference logits of the current window are kept. The result doesn't depend on the order or number of the
    other windows: random choices start anew from `seed` and the window's index.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A float32 decoder; runs in eval mode, and keeps its mode afterwards.
    windows : Tensor
        int64 (n, length), length >= 2, on any device; `torchlamp.study.text.cut_windows` cuts them from text.
    policy : str or Policy
        For example ``"ps4+strict:0.1"``.
    baselines : bool
        Also run plain low precision and random-like, and list them and the reference in `comparisons`; one that
        would repeat the tested policy is left out.
    seed : int
        Of the random baselines, 0 or more.
    progress : callable, optional
        Called with a `Progress` (times in seconds) after every forward pass.
    model_name, text : str, optional
        Names of the model and the text for the result; by default the model's own name, and "unnamed".

    Returns
    -------
    Result
        KL in nats per token, rates and probabilities as fractions of 1, times in seconds: see `Result`. After a
        KeyboardInterrupt, or when the memory is full, it holds the windows finished until then, and ``partial`` is
        true; an error is logged.

    Raises
    ------
    KeyboardInterrupt
        Interrupted before the first window was finished.
    ValueError
        Windows of a wrong shape, longer than the model's context, or with tokens outside its vocabulary; an
        unknown policy; a model without the attention interface, or with "lamp" already switched on.
    TypeError
        A wrong type or dtype.
    """
    policy = Policy.parse(policy)
    _check(model, windows, seed)
    start = time.perf_counter()
    runs = plan_runs(policy, baselines)
    for run in runs:
        # Refuses what can't run on this model before any time is spent.
        with lookahead(model, str(run.policy)):
            pass
    reference = Run("reference", None)
    interrupted = False
    with _eval_mode(model), torch.inference_mode():
        evaluation = _Evaluation(model, [reference, *runs], len(windows), seed, progress, start)
        try:
            for index in range(len(windows)):
                evaluation.window(index, windows[index])
        # torch reports full memory as a RuntimeError
        except (KeyboardInterrupt, MemoryError, RuntimeError) as stop:
            if not evaluation.finished:
                raise
            interrupted = True
            if not isinstance(stop, KeyboardInterrupt):
                reason = (str(stop).strip() or type(stop).__name__).splitlines()[0]
                logger.warning("stopped by an error (%s); the finished windows are kept", reason)
    finished = len(evaluation.finished)
    for steps in evaluation.finished:
        for run, metrics, statistics, seconds, forward in steps:
            run.add(metrics, statistics, seconds, forward)
    shared = {
        "model": model_name or getattr(model, "name_or_path", "") or type(model).__name__,
        "text": text,
        "windows": finished,
        "window_length": windows.shape[1],
        "seed": seed,
        "partial": interrupted,
        "tokens_sha256": hashlib.sha256(windows[:finished].contiguous().cpu().numpy().tobytes()).hexdigest(),
        "environment": environment() | {"device": str(model.device)},
    }
    compared = [_result(run, shared) for run in [reference, *runs[1:]]] if baselines else []
    whole = {
        "comparisons": tuple(compared),
        "seconds": time.perf_counter() - start,
        "forward_seconds": sum(run.forward_seconds for run in [reference, *runs]),
    }
    return _result(runs[0], shared | whole)


#: A run's part of a window: metrics, counts, seconds in all and in the forward pass.
Step = tuple[Run, TokenMetrics, Statistics | None, float, float]


class _Evaluation:
    """The loop's state; `window` adds to `finished` at its very end, so an interrupted window leaves nothing."""

    def __init__(
        self,
        model: Any,
        runs: list[Run],
        total: int,
        seed: int,
        progress: Callable[[Progress], None] | None,
        start: float,
    ) -> None:
        self._model, self._runs, self._total, self._seed = model, runs, total, seed
        self._progress, self._start = progress, start
        self._comparer = Comparer()
        self._passes = 0
        self.finished: list[list[Step]] = []

    def window(self, index: int, tokens: Tensor) -> None:
        tokens = tokens.to(self._model.device)
        done: list[Step] = []
        for run in self._runs:
            if done:
                self._report(done)
            start = time.perf_counter()
            statistics: Statistics | None = None
            if run.policy is None:
                logits, forward = self._forward(tokens)
                reference = self._comparer.reference(logits, tokens)
                metrics = _no_difference(reference)
            else:
                with lookahead(self._model, run.policy, seed=self._seed + index) as statistics:
                    logits, forward = self._forward(tokens)
                metrics = self._comparer.compare(reference, logits)
            del logits
            done.append((run, metrics, statistics, time.perf_counter() - start, forward))
            self._passes += 1
        self.finished.append(done)
        self._report(done)

    def _forward(self, tokens: Tensor) -> tuple[Tensor, float]:
        start = time.perf_counter()
        logits = self._model(input_ids=tokens[None], use_cache=False).logits[0]
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        return logits, time.perf_counter() - start

    def _report(self, done: list[Step]) -> None:
        """Tell the callback about the last of `done`, the window's steps so far."""
        if self._progress is None:
            return
        steps = [step for window in self.finished for step in window]
        if not self.finished or self.finished[-1] is not done:
            steps += done
        kl = [metrics.kl for run, metrics, *_ in steps if run.role == "tested"]
        mean, error = mean_and_error(kl) if kl else (float("nan"), float("nan"))
        elapsed = time.perf_counter() - self._start
        total = self._total * len(self._runs)
        self._progress(
            Progress(
                windows=len(self.finished),
                total_windows=self._total,
                passes=self._passes,
                total_passes=total,
                role=done[-1][0].role,
                kl_mean=mean,
                kl_standard_error=error,
                elapsed=elapsed,
                remaining=elapsed / self._passes * (total - self._passes),
            )
        )


def _no_difference(reference: Reference) -> TokenMetrics:
    """The reference's figures against itself."""
    length, entropy = len(reference.tokens), reference.cross_entropy.cpu()
    return TokenMetrics(
        torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.bool), entropy, entropy
    )


def _result(run: Run, shared: dict[str, Any]) -> Result:
    own: dict[str, Any] = {
        "policy": REFERENCE_POLICY if run.policy is None else str(run.policy),
        "role": run.role,
        "recompute_rate": run.recompute_rate,
        "recompute_rate_by_layer": run.recompute_rate_by_layer,
        "rows_touched": run.rows_touched,
        "seconds": run.seconds,
        "forward_seconds": run.forward_seconds,
    }
    return Result(**(own | asdict(aggregate(run.windows)) | shared))


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check(model: Any, windows: Tensor, seed: int) -> None:
    if not isinstance(windows, Tensor):
        raise TypeError(
            f"windows is a {type(windows).__name__}: give an int64 tensor (n, length), see cut_windows"
        )
    if windows.dtype != torch.int64:
        raise TypeError(f"windows has dtype {windows.dtype}: give tokens as int64")
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            f"windows has shape {tuple(windows.shape)}: give (n, length) with n >= 1 and length >= 2"
        )
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed {seed!r}: give an integer")
    if seed < 0:
        raise ValueError(f"seed {seed}: give 0 or more")
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise TypeError(f"{type(model).__name__} is no transformers model: load one with torchlamp.load")
    if model.dtype != torch.float32:
        raise TypeError(
            f"the model has dtype {model.dtype}: the reference is float32, load it with dtype=torch.float32"
        )
    if model.config._attn_implementation == "lamp":
        raise ValueError(
            "the model already runs under 'lamp': call its set_attn_implementation('sdpa'), "
            "so that it can be the reference"
        )
    check_context(model, windows.shape[1])
    vocabulary = model.get_input_embeddings().num_embeddings
    lowest, highest = int(windows.min()), int(windows.max())
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"windows holds token {wrong}: the model's vocabulary is 0 to {vocabulary - 1}")
