"""The names of a transformer's sites: the places of a composition f(g(x)) that a policy can name."""

#: In the order of the forward pass; policies are printed in this order, too.
SITES = ("scores", "values", "qkv", "attention_out", "mlp_up", "mlp_down", "norm", "lm_head")
