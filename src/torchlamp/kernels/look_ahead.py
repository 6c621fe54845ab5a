"""What an error of a stored operand's score does to a softmax; `native/lowbit/look_ahead.hpp` is the kernels' form."""

import torch
from torch import Tensor

#: Errors beyond a nat aren't small: z then counts as what it might be so many standard deviations higher.
_FAR, _DEVIATIONS = 1.0, 4.0
_MIN_PROBABILITY, _MAX_EXPONENT = 2.0**-126, 87.0


def softmax_gain(z: Tensor, r: Tensor, slope: Tensor | None = None) -> Tensor:
    """Change of the probabilities per unit of an error of the expected size r: the weight of `running` is gain times r.

    To first order an error r_j moves the probabilities by 2 z_j (1 - z_j) s_j r_j in the 1-norm. That says nothing once
    r_j exceeds a nat, as with 4 bits it can: there z_j counts as what it might be four standard deviations higher, and
    1 - z_j and s_j as 1 (docs/decoding.md).

    Parameters
    ----------
    z, r : Tensor
        float32, one shape: probabilities and standard deviations of the scores' errors.
    slope : Tensor, optional
        s, the derivative of a softcap; 1 if not given.

    Returns
    -------
    float32, the same shape: 2 z (1 - z) s where r <= 1, 2 min(1, z e^(4 r)) elsewhere.
    """
    gain = (1 - z) * z * 2
    if slope is not None:
        gain = gain * slope
    far = r > _FAR
    if not bool(far.any()):
        return gain
    raised = z.clamp(min=_MIN_PROBABILITY) * torch.exp((_DEVIATIONS * r).clamp(max=_MAX_EXPONENT))
    return torch.where(far, 2 * raised.clamp(max=1), gain)
