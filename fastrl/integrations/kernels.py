"""What the frameworks share: when they keep their own function, and the entropy of logits."""

import torch
from torch import Tensor

from fastrl.integrations.patching import Declined
from fastrl.kernels import IMPLEMENTATIONS, logprob_from_logits, native
from fastrl.kernels.checks import FLOATS


def need_kernel(op: str, *tensors: Tensor) -> None:
    """Raise `Declined` where only the reference could run `op` on these tensors."""
    device = tensors[0].device
    for tensor in tensors:
        if tensor.dtype not in FLOATS:
            raise Declined(f"{op} has no kernel for {tensor.dtype}")
    fast = [i for i in native.FAST.get(device.type, ()) if i in IMPLEMENTATIONS[op]]
    if not fast:
        raise Declined(f"{op} has no kernel for tensors on {device.type} yet")
    reasons = [native.unavailable(i, device) for i in fast]
    if None not in reasons:
        raise Declined(f"{op} has no kernel here: {reasons[0]}")


def entropy_of_logits(logits: Tensor) -> Tensor:
    """Entropy `[...]` float32 of `softmax(logits)`, in nats, of logits `[..., V]`."""
    need_kernel("logprob_from_logits", logits)
    anything = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    entropy = logprob_from_logits(logits, anything, entropy=True).entropy
    assert entropy is not None
    return entropy
