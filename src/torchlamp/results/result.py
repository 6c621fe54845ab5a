"""The result of an evaluation, and its JSON."""

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from torchlamp.extras import import_extra
from torchlamp.results.result_table import plain_table

Role = Literal["tested", "reference", "plain", "compared", "random-like"]
#: `policy` of the float32 run: the model as it is, its attention not replaced by anything.
REFERENCE_POLICY = "float32 (reference)"
#: Positions that share a figure of `recompute_rate_by_position`.
POSITION_BIN = 16


@dataclass(frozen=True, repr=False)
class Result:
    """Figures of one policy against the float32 reference, and of the baselines run beside it.

    In a REPL and in a notebook it shows itself as a table, a row a run.

    KL is KL(reference || tested) per token in nats, in float64. Means and rates are over all tokens of all
    windows; cross entropies, and what comes from them, over all tokens but the first of each window.
    """

    #: Name or path of the model.
    model: str
    #: Name of the text, or several joined by ", ".
    text: str
    #: Windows evaluated (those finished, if partial) and tokens in each.
    windows: int
    window_length: int
    #: Spelling of the policy; `REFERENCE_POLICY` for the float32 run.
    policy: str
    kl_mean: float
    #: From the windows' means if there are two windows or more, else as if tokens were independent.
    kl_standard_error: float
    #: As if tokens were independent: too small, and comparable with tools that report this one.
    kl_token_standard_error: float
    #: Keys "1", "5", "50", "95", "99", "99.9", "max".
    kl_percentiles: dict[str, float]
    #: Share of tokens after which the most probable next token differs, and its binomial standard error.
    flip_rate: float
    flip_standard_error: float
    #: exp of the mean over windows of the mean cross entropy.
    perplexity: float
    reference_perplexity: float
    #: ln(perplexity / reference_perplexity), and its standard error, formed as that of the KL.
    log_perplexity_ratio: float
    log_perplexity_ratio_standard_error: float
    #: Root mean square change of the correct token's probability.
    rms_delta_p: float
    #: Selected / eligible entries of all sites over all windows; per layer; and rows with at least one selected entry
    #: / all rows.
    recompute_rate: float
    recompute_rate_by_layer: list[float]
    rows_touched: float
    #: Wall time: of the whole evaluation in the tested policy's result, of the run alone in a comparison's.
    seconds: float
    #: The part of `seconds` spent in the model's forward passes.
    forward_seconds: float
    #: Seed of the random baselines.
    seed: int
    #: True if the evaluation was interrupted; the finished windows count.
    partial: bool
    #: SHA-256 of the evaluated tokens (int64, little endian, window after window).
    tokens_sha256: str
    #: Purpose of the run: "tested", or in `comparisons` "reference", "plain", "compared" (another policy on the same
    #: windows), "random-like".
    role: Role
    environment: dict[str, Any]
    #: Recompute rate of each site that ran under the policy; of the scores of each head, layer by layer; and of all
    #: sites' rows in each `POSITION_BIN` positions. Like all lists from here on, in 6 significant digits.
    recompute_rate_by_site: dict[str, float] = field(default_factory=dict)
    recompute_rate_by_head: list[list[float]] = field(default_factory=list)
    recompute_rate_by_position: list[float] = field(default_factory=list)
    #: Share of the eligible "entry", "row_block_16" (1 x 16 keys) and "tile_16x16" that hold a recomputed score;
    #: empty unless blocks were counted.
    block_rates: dict[str, float] = field(default_factory=dict)
    #: Shares of an online softmax's tiles of 64 keys x 16 queries with "0", "1" and "2+" recomputed sub-blocks of 16
    #: keys, of "sub_block"s recomputed, and of scores "saturated"; empty without an online softmax.
    tile_rates: dict[str, float] = field(default_factory=dict)
    #: Mean KL of each window in nats, and the share of its tokens that flip.
    kl_by_window: list[float] = field(default_factory=list)
    flip_by_window: list[float] = field(default_factory=list)
    #: ln(perplexity / reference_perplexity) of each window.
    log_perplexity_ratio_by_window: list[float] = field(default_factory=list)
    #: Which tokens of each window flip: a bit a token, the first one the highest bit of the first byte, in
    #: hexadecimal digits. `torchlamp.results.compare` reads them.
    flip_bits_by_window: list[str] = field(default_factory=list)
    #: Rounding noise of `kl_mean`: the standard deviation, over `kl_by_move` and the run itself, of its value on these
    #: windows when every number moves by a unit in the last place, as with other kernels. NaN if not measured.
    kl_noise: float = math.nan
    #: `kl_mean` of each repetition whose last bits were moved, in all digits.
    kl_by_move: list[float] = field(default_factory=list)
    #: Length of the model's vectors: "head", "hidden", "mlp", and "attention" (all heads'). Empty in older results.
    sizes: dict[str, int] = field(default_factory=dict)
    #: Hash of the calibration that transforms were fitted to; None: to each call's own operands.
    calibration: str | None = None
    #: Sums that didn't fit an integer register, of each site that has one.
    overflowed_by_site: dict[str, int] = field(default_factory=dict)
    comparisons: tuple["Result", ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Dictionaries, lists, strings and numbers; a comparison has the same keys but for `comparisons`."""
        record = asdict(self)
        record["comparisons"] = [c.to_dict() for c in self.comparisons]
        if self.role != "tested":
            del record["comparisons"]
        return record

    def to_json(self, indent: int | None = 2) -> str:
        """Strict JSON: figures that are not finite (a format that overflowed) are null."""
        return json.dumps(finite(self.to_dict()), indent=indent, allow_nan=False, ensure_ascii=False) + "\n"

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`: a row a run, the tested policy first, and a column for each figure that is a number.

        Raises
        ------
        ImportError
            pandas isn't installed; the message has the command.
        """
        pandas = import_extra("pandas", "study", "Result.to_pandas")
        scalar = [f.name for f in fields(self) if f.type in (str, int, float, bool, Role)]
        shown = ["role", "policy", *(name for name in scalar if name not in ("role", "policy"))]
        runs = (self, *self.comparisons)
        return pandas.DataFrame([{name: getattr(run, name) for name in shown} for run in runs], columns=shown)

    def __repr__(self) -> str:
        return str(plain_table(self))

    def _repr_html_(self) -> str:
        return plain_table(self).to_html()

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Result":
        """The inverse of `to_dict`; null becomes NaN, and keys that this version doesn't know are dropped.

        Raises
        ------
        ValueError
            A key is missing, or a value has another type than the field.
        """
        if not isinstance(record, dict):
            raise ValueError("this is no result of an evaluation: a JSON object is expected")
        known: dict[str, Any] = {f.name: f.type for f in fields(cls)}
        # Results of version 0.1.0 lack the later figures, which have defaults.
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        missing = [name for name in needed if name not in record]
        if missing:
            raise ValueError(f"this is no result of an evaluation: {', '.join(missing)} missing")
        values = {
            name: _read(name, known[name], value)
            for name, value in record.items()
            if name in known and name != "comparisons"
        }
        comparisons = record.get("comparisons", ())
        if not isinstance(comparisons, list | tuple):
            raise _no_result("comparisons", comparisons)
        return cls(**values, comparisons=tuple(cls.from_dict(c) for c in comparisons))

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """The inverse of `to_json`; figures written as null come back as NaN. ValueError if it is none."""
        try:
            return cls.from_dict(json.loads(text))
        except RecursionError:
            raise ValueError("this is no result of an evaluation: nested too deeply") from None


def _read(name: str, kind: Any, value: Any) -> Any:
    """The value of a field of this type as JSON holds it. ValueError, naming the field, for another type's value."""
    try:
        return _convert(kind, value)
    except TypeError:
        raise _no_result(name, value) from None


def _convert(kind: Any, value: Any) -> Any:
    """The value as a `kind`: a class, a union, a literal, or a list or dictionary of such. TypeError if it is none."""
    origin, inside = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if kind is float:
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError
        return float(value)
    if origin is list and isinstance(value, list):
        return [_convert(inside[0], v) for v in value]
    if origin is dict and isinstance(value, dict):
        return {k: _convert(inside[1], v) for k, v in value.items()}
    if origin is Literal and isinstance(value, str) and value in inside:
        return value
    if origin in (list, dict, Literal) or (type(value) is not kind and type(value) not in inside):
        raise TypeError
    return value


def _no_result(name: str, value: Any) -> ValueError:
    return ValueError(f"this is no result of an evaluation: its {name} is {value!r:.60}")


def finite(value: Any) -> Any:
    """The same dictionaries and lists with None instead of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
