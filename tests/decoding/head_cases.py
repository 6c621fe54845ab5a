"""LM heads and hidden states on which a low-bit argmax could go wrong."""

import torch

#: Sizes that are no multiples of a block, a group or a vector register, with their numbers of tokens.
SHAPES = [(1, 8), (7, 3), (16, 1), (50, 33), (131, 64), (300, 100)]


def _gaussian(tokens, columns, g):
    return torch.randn(tokens, columns, generator=g), torch.randn(4, columns, generator=g)


def _heavy(tokens, columns, g):
    """Rows of very different lengths, a few columns that outweigh all others: what trained heads look like."""
    w, x = _gaussian(tokens, columns, g)
    w *= torch.randn(tokens, 1, generator=g).exp()
    heavy = torch.randint(columns, (max(1, columns // 30),), generator=g)
    w[:, heavy] *= 100
    x[:, heavy] *= 300
    return w, x


def _integers(tokens, columns, g):
    w = torch.randint(-2, 3, (tokens, columns), generator=g).float()
    return w, torch.randint(-2, 3, (4, columns), generator=g).float()


def _duplicates(tokens, columns, g):
    w, x = _gaussian(tokens, columns, g)
    return w[torch.randint(max(1, tokens // 10), (tokens,), generator=g)], x


def _one_unit(tokens, columns, g):
    """Copies of one row, each with one number moved to the next float32 number."""
    w, x = _gaussian(1, columns, g)
    w = w.repeat(tokens, 1)
    places = torch.randint(columns, (tokens,), generator=g)
    up = torch.nextafter(w[0], torch.tensor(torch.inf))
    w[torch.arange(tokens), places] = up[places]
    return w, x


def _near(tokens, columns, g):
    """Rows that differ from each other by about what float32 sums lose."""
    w, x = _gaussian(1, columns, g)
    return w + 3e-7 * torch.randn(tokens, columns, generator=g), x


def _aligned(tokens, columns, g):
    """Long rows along the hidden state, all but equal, among short ones."""
    w, x = _gaussian(tokens, columns, g)
    few = max(1, tokens // 3)
    w[:few] = 20 * x[:1] + 1e-3 * w[:few]
    return w, x


def _cancelling(tokens, columns, g):
    """Large terms that cancel: each logit is a small remainder."""
    w, x = _gaussian(tokens, columns, g)
    half = columns // 2
    w[:, half : 2 * half] = -w[:, :half]
    x[:, half : 2 * half] = x[:, :half] * (1 + 1e-6)
    return 1e3 * w, x


def _on_the_grid(tokens, columns, g):
    """Codes without an error: only float32 separates the passes."""
    w = torch.randint(-127, 128, (tokens, columns), generator=g).float()
    w[:, ::32] = 127
    return w * 2.0**-9, torch.randint(-9, 10, (4, columns), generator=g).float()


def _zeros(tokens, columns, g):
    w, x = _gaussian(tokens, columns, g)
    x[:2] = 0
    w[::2] = 0
    return w, x


def _scaled(weight_scale, vector_scale):
    def case(tokens, columns, g):
        w, x = _gaussian(tokens, columns, g)
        return weight_scale * w.clamp(-3, 3), vector_scale * x.clamp(-3, 3)

    return case


def _spread(tokens, columns, g):
    """Numbers of every order of magnitude."""
    w, x = _gaussian(tokens, columns, g)
    return (
        w * torch.exp2(torch.randint(-30, 20, w.shape, generator=g).float()),
        x * torch.exp2(torch.randint(-30, 20, x.shape, generator=g).float()),
    )


CASES = {
    "gaussian": _gaussian,
    "heavy": _heavy,
    "integers": _integers,
    "duplicates": _duplicates,
    "one unit": _one_unit,
    "near": _near,
    "aligned": _aligned,
    "cancelling": _cancelling,
    "on the grid": _on_the_grid,
    "zeros": _zeros,
    "huge": _scaled(1e17, 1e17),
    "small": _scaled(1e-15, 1e-15),
    "underflow": _scaled(1e-20, 1e-20),
    "subnormal weights": _scaled(1e-43, 1e30),
    "subnormal vectors": _scaled(1e30, 1e-43),
    "overflow": _scaled(1e20, 1e20),
    "spread": _spread,
}


def case(kind, tokens, columns, seed=0):
    """A head float32 (tokens, columns) and hidden states (4, columns)."""
    g = torch.Generator().manual_seed(1000 * seed + 31 * tokens + columns)
    return CASES[kind](tokens, columns, g)
