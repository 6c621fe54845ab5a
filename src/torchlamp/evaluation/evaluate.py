"""`evaluate`: a policy against the float32 model on windows of text, with the baselines beside it."""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from torchlamp.data.text import check_context
from torchlamp.evaluation.aggregate import aggregate
from torchlamp.evaluation.environment import environment
from torchlamp.evaluation.loop import Loop, Progress, References, inference_in_eval_mode
from torchlamp.evaluation.runs import EvaluationRun, plan_runs, rounded
from torchlamp.evaluation.sizes import model_sizes
from torchlamp.huggingface.lookahead import check_untouched
from torchlamp.kernels import native
from torchlamp.policy.policy import Policy
from torchlamp.results.flip_bits import pack_bits
from torchlamp.results.result import REFERENCE_POLICY, Result
from torchlamp.simulation.calibration import Calibration

logger = logging.getLogger("torchlamp.evaluate")
#: Repetitions whose spread is known to 2 %; more are a slip of the keyboard.
MAX_NOISE = 1000


def evaluate(
    model: Any,
    windows: Tensor,
    policy: str | Policy,
    *,
    baselines: bool = True,
    compare: Sequence[str | Policy] = (),
    seed: int = 0,
    layers: Sequence[int] | None = None,
    blocks: bool = False,
    calibration: Calibration | None = None,
    noise: int = 0,
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
        A float32, bfloat16 or float16 decoder; runs in eval mode and float32, and is what it was afterwards.
    windows : Tensor
        int64 (n, length), length >= 2, on any device; `torchlamp.data.text.cut_windows` cuts them from text.
    policy : str or Policy
        For example ``"ps4+strict:0.1"``.
    baselines : bool
        Also run plain low precision and random-like, and list them and the reference in `comparisons`; one that
        would repeat another policy is left out.
    compare : sequence of str or Policy
        More policies to run on the same windows against the same references; each is a `Result` of its own in
        `comparisons`, with the role "compared".
    seed : int
        Of the random baselines, 0 or more.
    layers : sequence of int, optional
        Only these layers run under the policies, the others in float32.
    blocks : bool
        Also count the blocks that hold a recomputed score (`Result.block_rates`).
    calibration : Calibration, optional
        Statistics that transforms are fitted to, from `torchlamp.calibrate` on another text; results carry its hash.
    noise : int
        Repeat every run this often, each time with last bits moved at random (`torchlamp.evaluation.noise`), and give
        the spread of its KL: `Result.kl_noise`. Takes as many forward passes more.
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
        unknown policy; a model without the attention interface, with a policy attached, or prepared for decoding.
    TypeError
        A wrong type or dtype.
    """
    policy = Policy.parse(policy)
    others = [Policy.parse(other) for other in compare]
    _check(model, windows, seed)
    check_noise(noise)
    start = time.perf_counter()
    runs = plan_runs(policy, baselines, others)
    reference = EvaluationRun("reference", None)
    # A budget of 0: only the reference logits of the current window are kept.
    loop = Loop(
        References(model, windows),
        [reference, *runs],
        seed,
        layers=layers,
        blocks=blocks,
        calibration=calibration,
        noise=noise,
        progress=progress,
    )
    loop.check()
    native.warn_if_absent("the simulation")
    interrupted = False
    try:
        with inference_in_eval_mode(model):
            loop.run_all()
    # torch reports full memory as a RuntimeError
    except (KeyboardInterrupt, MemoryError, RuntimeError) as stop:
        if not loop.finished:
            raise
        interrupted = True
        if not isinstance(stop, KeyboardInterrupt):
            reason = (str(stop).strip() or type(stop).__name__).splitlines()[0]
            logger.warning("stopped by an error (%s); the finished windows are kept", reason)
    shared = _shared(model, windows[: loop.collect()], seed, model_name, text) | {
        "partial": interrupted,
        "calibration": None if calibration is None else calibration.hash,
    }
    _warn(runs[0])
    beside = [reference, *runs[1:]] if baselines else runs[1:]
    whole = {
        "comparisons": tuple(_result(run, shared) for run in beside),
        "seconds": time.perf_counter() - start,
        "forward_seconds": sum(run.forward_seconds for run in [reference, *runs]),
    }
    return _result(runs[0], shared | whole)


def evaluate_against(
    references: References,
    policy: str | Policy,
    *,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    blocks: bool = False,
    model_name: str | None = None,
    text: str = "unnamed",
) -> Result:
    """One policy alone, against references that several policies share: what a point of a sweep is.

    Its figures are those of `evaluate` with ``baselines=False``. Unlike there, nothing is kept of an evaluation
    that doesn't reach its end: any error, and KeyboardInterrupt, is raised.

    Parameters
    ----------
    references : References
        Of the model and the windows; fills itself while it is used.
    policy, seed, layers, blocks, model_name, text
        As for `evaluate`.

    Returns
    -------
    Result
        `seconds` and `forward_seconds` include the reference's forward passes where they were needed.

    Raises
    ------
    ValueError, TypeError
        As for `evaluate`.
    """
    model, windows = references.model, references.windows
    _check(model, windows, seed)
    start = time.perf_counter()
    run = EvaluationRun("tested", Policy.parse(policy))
    loop = Loop(references, [run], seed, layers=layers, blocks=blocks)
    loop.check()
    with inference_in_eval_mode(model):
        loop.run_all()
    loop.collect()
    _warn(run)
    shared = _shared(model, windows, seed, model_name, text)
    return _result(run, shared | {"partial": False, "seconds": time.perf_counter() - start})


def _warn(run: EvaluationRun) -> None:
    if run.warning is not None:
        logger.warning("policy %s: %s", run.policy, run.warning)


def _shared(model: Any, windows: Tensor, seed: int, model_name: str | None, text: str) -> dict[str, Any]:
    """What the results of all runs over these windows have in common."""
    return {
        "model": model_name or getattr(model, "name_or_path", "") or type(model).__name__,
        "text": text,
        "windows": len(windows),
        "window_length": windows.shape[1],
        "seed": seed,
        "tokens_sha256": hashlib.sha256(windows.contiguous().cpu().numpy().tobytes()).hexdigest(),
        "sizes": model_sizes(model),
        "environment": environment() | {"device": str(model.device)},
    }


def _result(run: EvaluationRun, shared: dict[str, Any]) -> Result:
    figures, moved = aggregate(run.windows), run.kl_by_move
    own: dict[str, Any] = {
        "policy": REFERENCE_POLICY if run.policy is None else str(run.policy),
        "role": run.role,
        "recompute_rate": run.recompute_rate,
        "recompute_rate_by_layer": run.recompute_rate_by_layer,
        "rows_touched": run.rows_touched,
        "recompute_rate_by_site": run.recompute_rate_by_site,
        "recompute_rate_by_head": run.recompute_rate_by_head,
        "recompute_rate_by_position": run.recompute_rate_by_position,
        "block_rates": run.block_rates,
        "tile_rates": run.tile_rates,
        "kl_by_window": [rounded(float(w.kl.mean())) for w in run.windows],
        "flip_by_window": [rounded(float(w.flips.double().mean())) for w in run.windows],
        "log_perplexity_ratio_by_window": [
            rounded(float((w.cross_entropy - w.reference_cross_entropy).mean())) for w in run.windows
        ],
        "overflowed_by_site": {site: count for site, (count, _) in run.overflow.items()},
        "flip_bits_by_window": [pack_bits(w.flips.tolist()) for w in run.windows],
        "kl_by_move": moved,
        "seconds": run.seconds,
        "forward_seconds": run.forward_seconds,
    }
    if moved:
        own["kl_noise"] = float(torch.tensor([figures.kl_mean, *moved], dtype=torch.float64).std())
    return Result(**(own | asdict(figures) | shared))


def check_noise(noise: int) -> None:
    """TypeError or ValueError for a number of repetitions that can't be meant."""
    if not isinstance(noise, int) or isinstance(noise, bool):
        raise TypeError(f"noise {noise!r}: give a number of repetitions, 0 for none")
    if not 0 <= noise <= MAX_NOISE:
        raise ValueError(f"noise {noise}: give 0 to {MAX_NOISE} repetitions")


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
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"the model has dtype {model.dtype}: the reference is float32, load it with dtype=torch.float32"
        )
    check_untouched(model)
    check_context(model, windows.shape[1])
    vocabulary = model.get_input_embeddings().num_embeddings
    lowest, highest = int(windows.min()), int(windows.max())
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"windows holds token {wrong}: the model's vocabulary is 0 to {vocabulary - 1}")
