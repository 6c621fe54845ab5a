"""The computation of a sweep's points, in this process or in a Ray actor: it keeps a model and its references."""

import gc
import time
from typing import Any

import torch
from torch import Tensor

from torchlamp.data.datasets import text_by_name
from torchlamp.data.text import check_context, cut_windows
from torchlamp.evaluation.calibration import find_threshold
from torchlamp.evaluation.evaluate import evaluate_against
from torchlamp.evaluation.loop import References, inference_in_eval_mode, timed_forward
from torchlamp.huggingface.lookahead import lookahead
from torchlamp.models.load import load
from torchlamp.policy.policy import Policy
from torchlamp.sweep.folder import Outcome
from torchlamp.sweep.memory import free_memory
from torchlamp.sweep.points import HOLE, SHUFFLED, Group, Point, digest
from torchlamp.sweep.policies import threshold_range, typical_threshold


class Worker:
    """Computes points one by one; consecutive points of one group share model, windows and reference logits.

    Parameters
    ----------
    memory : int, optional
        Bytes for reference logits; by default half of what is free when a group begins, shared between `sharers`.
    threads : int, optional
        Torch's threads; None leaves its choice.
    sharers : int
        Workers on this machine.
    """

    def __init__(self, memory: int | None = None, threads: int | None = None, sharers: int = 1) -> None:
        self._memory, self._sharers = memory, sharers
        self._model: tuple[str, Any, Any] | None = None
        self._broken: tuple[str, str] | None = None
        self._group: Group | None = None
        self._references: References | None = None
        if threads is not None:
            torch.set_num_threads(threads)

    def compute(self, point: Point, found: str | None = None) -> Outcome:
        """Compute a point.

        Parameters
        ----------
        point : Point
            Its policy, text and windows say everything that is computed.
        found : str, optional
            The policy that an earlier calibration of this point found.

        Returns
        -------
        Outcome
            With an error in one line if anything but Ctrl-C stopped it.
        """
        start = time.perf_counter()
        result: dict[str, Any] | None = None
        error: str | None = None
        calibration: dict[str, Any] | None = None
        try:
            references = self._prepare(point)
            policy = point.policy
            if point.target_rate is not None:
                if found is None:
                    calibration = self._calibrate(point)
                    found = str(calibration["policy"])
                policy = found
            result = evaluate_against(
                references, policy, seed=point.seed, layers=point.layers, blocks=True, model_name=point.model,
                text=point.text,
            ).to_dict()  # fmt: skip
        except Exception as stop:
            error = one_line(stop)
        return Outcome(point, result, error, time.perf_counter() - start, calibration)

    def _prepare(self, point: Point) -> References:
        """The references of a point's group; what an earlier group left is dropped first."""
        if self._group == point.group and self._references is not None:
            return self._references
        self._references = None
        model, tokenizer = self._load(point.model)
        check_context(model, point.window_length)
        text = text_by_name(point.text, tokenizer, point.windows * point.window_length)
        windows = cut_windows(tokenizer, [text], point.windows, point.window_length)
        if point.group.shuffle is not None:
            windows = shuffled(windows, point.group.shuffle)
        budget = self._memory if self._memory is not None else free_memory() // (2 * self._sharers)
        self._group, self._references = point.group, References(model, windows, budget)
        return self._references

    def _load(self, name: str) -> tuple[Any, Any]:
        # A model that can't be loaded is not tried again for each of its points.
        if self._broken is not None and self._broken[0] == name:
            raise RuntimeError(self._broken[1])
        if self._model is None or self._model[0] != name:
            self._model = None
            gc.collect()
            try:
                self._model = (name, *load(name))
            except Exception as error:
                self._broken = (name, one_line(error))
                raise
        return self._model[1:]

    def _calibrate(self, point: Point) -> dict[str, Any]:
        """Find the threshold of a point's target rate; only forward passes under the policy are needed."""
        about = point.calibration
        assert about is not None
        assert point.target_rate is not None
        model, tokenizer = self._load(point.model)
        count = about.start + about.windows
        text = text_by_name(about.text, tokenizer, count * point.window_length)
        windows = cut_windows(tokenizer, [text], count, point.window_length)[about.start :]
        if point.tokens == SHUFFLED:
            windows = shuffled(windows, point.seed)

        def rate(threshold: float) -> float:
            selected = eligible = 0
            with inference_in_eval_mode(model):
                for index, tokens in enumerate(windows):
                    policy = _filled(point.policy, threshold)
                    seed = point.seed + index
                    with lookahead(model, policy, seed=seed, layers=point.layers) as statistics:
                        timed_forward(model, tokens.to(model.device))
                    selected, eligible = selected + statistics.selected, eligible + statistics.eligible
            return selected / max(eligible, 1)

        found = find_threshold(
            rate,
            point.target_rate,
            threshold_range(point.policy),
            typical_threshold(point.policy),
            about.tolerance,
        )
        return {
            "key": calibration_key(point),
            "calibration": calibrated(point),
            "policy": _filled(point.policy, found.threshold),
            "rate": found.rate,
            "tries": found.tries,
        }


def calibrated(point: Point) -> dict[str, Any]:
    """Everything that a point's calibration depends on."""
    record = point.to_dict()
    return {name: value for name, value in record.items() if name not in ("text", "windows")}


def calibration_key(point: Point) -> str:
    """Identifies a calibration, which points may share."""
    return digest(calibrated(point))


def shuffled(windows: Tensor, seed: int) -> Tensor:
    """All tokens of all windows in an order drawn with the seed: the same for every policy."""
    order = torch.randperm(windows.numel(), generator=torch.Generator().manual_seed(seed))
    return windows.flatten()[order].view(windows.shape)


def one_line(error: BaseException) -> str:
    """An error's first line; the kind is named unless it is one whose message is written for users."""
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        message
        if isinstance(error, ValueError | TypeError | OSError)
        else f"{type(error).__name__}: {message}"
    )


def _filled(template: str, threshold: float) -> str:
    """The policy with a threshold in its holes, as policies are spelled."""
    return str(Policy.parse(template.replace(HOLE, repr(threshold).replace("e+", "e"))))
