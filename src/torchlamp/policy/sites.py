"""The sites of a transformer, one record each: a new site is one more."""

from torchlamp.policy.site import Kernel, Look, Place, Site
from torchlamp.rules.condition import Output
from torchlamp.rules.running import Running
from torchlamp.rules.topz import TopZ

_ALL_BITS = (4, 8, 12)
#: The up projections of gated MLPs; the gate comes first, or both halves are one module.
GATED = (("gate_proj", "up_proj"), ("gate_up_proj",), ("w1", "w3"))
#: Projections of one input; DeepSeek's are to latent vectors.
_QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("qkv_proj",),
    ("c_attn",),
    ("query_key_value",),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_proj", "kv_a_proj_with_mqa"),
)

_RECORDS = (
    Site(
        "scores",
        "query-key products into the softmax",
        Place("attention"),
        sums=Look("attention", ("softmax", "attention", "blocks")),
        stored=Look("attention", ("softmax", "attention")),
        length="head",
        kernel=Kernel("attention", (4, 8), Running(0.001), ("center", "hadamard")),
        partner="values",
    ),
    Site(
        "values",
        "values weighted by the softmax",
        Place("attention"),
        # Probabilities come out of a softmax, key by key: they have no basis but the keys', and no scale but 1.
        sums=Look("values", ("elementwise",), ("center", "sort")),
        # A key's value is chosen by what the softmax in front of it says.
        stored=Look("stored values", ("softmax",), ()),
        length="window",
        kernel=Kernel(None, (4, 8), TopZ(0.003)),
    ),
    Site(
        "qkv",
        "projections to queries, keys and values",
        Place("attention", _QKV),
        sums=Look("heads", ("elementwise",)),
        stored=Look("heads", ("elementwise",)),
        kernel=Kernel("rows", _ALL_BITS),
    ),
    Site(
        "attention_out",
        "output projection of the attention",
        Place("attention", (("o_proj",), ("c_proj",), ("dense",), ("out_proj",)), last=True),
        sums=Look("stream", ("elementwise",)),
        stored=Look("stream", ("elementwise",)),
        length="attention",
        kernel=Kernel("rows", _ALL_BITS),
    ),
    Site(
        "mlp_up",
        "up projection and gate into the activation",
        Place("mlp", (*GATED, ("c_fc",), ("fc1",), ("fc_in",), ("dense_h_to_4h",), ("up_proj",))),
        sums=Look("activation", ("elementwise",)),
        stored=Look("neurons", ("elementwise",)),
        kernel=Kernel("mlp", _ALL_BITS, Output(0.0006)),
        partner="mlp_down",
    ),
    Site(
        "mlp_down",
        "down projection of the MLP",
        Place(
            "mlp",
            (("down_proj",), ("c_proj",), ("fc2",), ("fc_out",), ("dense_4h_to_h",), ("w2",)),
            last=True,
        ),
        sums=Look("stream", ("elementwise",)),
        stored=Look("columns", ("elementwise",)),
        length="mlp",
        kernel=Kernel(None, _ALL_BITS, Output(0.0006)),
    ),
    Site(
        "norm",
        "residual sum into the norm",
        Place("layer"),
        # One rounding for each number: there is no sum to order, and no second operand.
        sums=Look("norm", (), ("center",)),
    ),
    Site(
        "lm_head",
        "output embedding into the softmax over tokens",
        Place("output"),
        sums=Look("vocabulary", ("softmax",)),
        stored=Look("top", ("softmax",)),
        kernel=Kernel("head", _ALL_BITS, Running(1e-05)),
    ),
)
#: By name, in the order of the forward pass; policies are printed in this order, too.
SITES: dict[str, Site] = {site.name: site for site in _RECORDS}
