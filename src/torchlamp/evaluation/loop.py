"""The loop of an evaluation: every window through every run, each compared with the window's reference."""

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchlamp.evaluation.aggregate import mean_and_error
from torchlamp.evaluation.metrics import Comparer, Reference, TokenMetrics
from torchlamp.evaluation.noise import moved
from torchlamp.evaluation.runs import EvaluationRun
from torchlamp.huggingface.lookahead import lookahead
from torchlamp.huggingface.widening import widened
from torchlamp.policy.policy import Policy
from torchlamp.results.result import Role
from torchlamp.simulation.calibration import Calibration
from torchlamp.simulation.statistics import Statistics


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


class References:
    """The float32 reference of each window of a model, kept in memory as far as `budget` bytes go.

    Only logits count: length x vocabulary x 4 bytes a window. Windows that no longer fit are computed anew
    whenever they are asked for.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Runs with its own attention.
    windows : Tensor
        int64 (n, length).
    budget : int
        Bytes.
    """

    def __init__(self, model: Any, windows: Tensor, budget: int = 0) -> None:
        self.model, self.windows = model, windows
        self.comparer = Comparer()
        self._left = budget
        self._kept: dict[int, Reference] = {}

    def get(self, index: int) -> tuple[Reference, float]:
        """The reference of a window, and the seconds of its forward pass (0 if it was kept)."""
        if index in self._kept:
            return self._kept[index], 0.0
        tokens = self.windows[index].to(self.model.device)
        logits, forward = timed_forward(self.model, tokens)
        reference = self.comparer.reference(logits, tokens)
        size = reference.logits.numel() * reference.logits.element_size()
        if size <= self._left:
            self._left -= size
            self._kept[index] = reference
        return reference, forward


def timed_forward(model: Any, tokens: Tensor) -> tuple[Tensor, float]:
    """Logits, float32 (length, vocabulary), of one window of tokens (length,), and the seconds they took."""
    start = time.perf_counter()
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    return logits, time.perf_counter() - start


@dataclass(frozen=True)
class Step:
    """A run's part of a window."""

    run: EvaluationRun
    metrics: TokenMetrics
    statistics: Statistics | None
    #: In all, and in the forward pass; without those of the passes of `noise`.
    seconds: float
    forward_seconds: float
    #: The window's mean KL in each pass whose last bits are moved.
    noise: list[float] = field(default_factory=list)


class Loop:
    """Runs over windows; `window` adds to `finished` at its very end, so an interrupted window leaves nothing.

    Parameters
    ----------
    references : References
        Of the model and the windows to run.
    runs : sequence of EvaluationRun
        In the order of each window; one without a policy stands for the reference itself.
    seed : int
        Of the random rules; window i starts from seed + i.
    layers : sequence of int, optional
        Only these layers run under the policies.
    blocks : bool
        Count blocks that hold a recomputed score.
    calibration : Calibration, optional
        Statistics that the policies' transforms are fitted to.
    noise : int
        Passes of each policy whose last bits are moved at random, of each window.
    progress : callable, optional
        Called with a `Progress` after every forward pass.
    """

    def __init__(
        self,
        references: References,
        runs: Sequence[EvaluationRun],
        seed: int,
        *,
        layers: Sequence[int] | None = None,
        blocks: bool = False,
        calibration: Calibration | None = None,
        noise: int = 0,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._references, self._runs, self._seed, self._noise = references, runs, seed, noise
        self._layers, self._blocks, self._calibration = layers, blocks, calibration
        self._progress, self._start = progress, time.perf_counter()
        self._passes = 0
        self._total = len(references.windows)
        self.finished: list[list[Step]] = []

    def check(self) -> None:
        """Raise what `lookahead` raises for a policy that can't run on this model, before any time is spent."""
        for run in self._runs:
            if run.policy is not None:
                with self._lookahead(run.policy, 0):
                    pass

    def _lookahead(self, policy: Policy, index: int) -> AbstractContextManager[Statistics]:
        model, seed = self._references.model, self._seed + index
        return lookahead(
            model, policy, seed=seed, layers=self._layers, blocks=self._blocks, calibration=self._calibration
        )

    def run_all(self) -> None:
        """Every window, in order."""
        for index in range(self._total):
            self.window(index)

    def collect(self) -> int:
        """Add the finished windows to their runs, and count them."""
        for steps in self.finished:
            for step in steps:
                step.run.add(step.metrics, step.statistics, step.seconds, step.forward_seconds)
                step.run.noise.append(step.noise)
        return len(self.finished)

    def window(self, index: int) -> None:
        """One window through every run."""
        model = self._references.model
        tokens = self._references.windows[index].to(model.device)
        done: list[Step] = []
        reference: Reference | None = None
        for run in self._runs:
            if done:
                self._report(done)
            start = time.perf_counter()
            statistics: Statistics | None = None
            forward = 0.0
            if reference is None:
                reference, forward = self._references.get(index)
            if run.policy is None:
                metrics = _no_difference(reference)
            else:
                with self._lookahead(run.policy, index) as statistics:
                    logits, seconds = timed_forward(model, tokens)
                forward += seconds
                metrics = self._references.comparer.compare(reference, logits)
                del logits
            step = Step(run, metrics, statistics, time.perf_counter() - start, forward)
            done.append(step)
            self._passes += 1
            for number in range(0 if run.policy is None else self._noise):
                self._report(done)
                step.noise.append(self._moved_kl(run, index, number, reference))
                self._passes += 1
        self.finished.append(done)
        self._report(done)

    def _moved_kl(self, run: EvaluationRun, index: int, number: int, reference: Reference) -> float:
        """The mean KL of a window whose last bits are moved at random, for the `number`-th time."""
        assert run.policy is not None
        model = self._references.model
        tokens = self._references.windows[index].to(model.device)
        # Draws of its own for each window and pass. torch's generator on the CPU reads 32 bits of a seed.
        seed = zlib.crc32(f"{self._seed} {index} {number}".encode())
        generator = torch.Generator().manual_seed(seed)
        with self._lookahead(run.policy, index), moved(model, generator):
            logits, _ = timed_forward(model, tokens)
        return float(self._references.comparer.compare(reference, logits).kl.mean())

    def _report(self, done: list[Step]) -> None:
        """Tell the callback about the last of `done`, the window's steps so far."""
        if self._progress is None:
            return
        steps = [step for window in self.finished for step in window]
        if not self.finished or self.finished[-1] is not done:
            steps += done
        kl = [step.metrics.kl for step in steps if step.run.role == "tested"]
        mean, error = mean_and_error(kl) if kl else (float("nan"), float("nan"))
        elapsed = time.perf_counter() - self._start
        total = self._total * sum(1 if run.policy is None else 1 + self._noise for run in self._runs)
        self._progress(
            Progress(
                windows=len(self.finished),
                total_windows=self._total,
                passes=self._passes,
                total_passes=total,
                role=done[-1].run.role,
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


@contextmanager
def inference_in_eval_mode(model: Any) -> Iterator[None]:
    """Within the block the model is in eval mode and float32, and no gradients are kept; all is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with widened(model), torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
