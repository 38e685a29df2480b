"""Attention of groups that share their prompt: argument checks, choice of implementation."""

import torch
from torch import Tensor

from fastrl.kernels.attention import flash, library, reference
from fastrl.kernels.attention.layout import GroupLayout
from fastrl.kernels.checks import FLOATS
from fastrl.kernels.native import choose

# Implementations besides the reference; see fastrl.kernels.native.choose.
HAS: tuple[str, ...] = ("cpu", "triton", "flash")


def _check(q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be [T, heads, D], got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and q {q.dtype}; they must be the same")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} and q on {q.device}; use one")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[2] == 0:
        raise ValueError(f"q must have a head size D of at least 1, got shape {tuple(q.shape)}")
    if (k.shape[0], k.shape[2]) != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"k must be [T={q.shape[0]}, Hkv, D={q.shape[2]}] as q is {tuple(q.shape)}, "
            f"got {tuple(k.shape)}"
        )
    if k.shape[1] < 1 or q.shape[1] < 1 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"q's heads must be a multiple of k's, got {q.shape[1]} and {k.shape[1]}")
    for name, tensor in zip(layout._fields, layout, strict=True):
        if tensor.dtype != torch.int32 or tensor.dim() != 1:
            raise ValueError(
                f"layout.{name} must be one-dimensional int32, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if tensor.device != q.device:
            raise ValueError(
                f"layout.{name} is on {tensor.device} and q on {q.device}; use layout.to(q.device)"
            )


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: GroupLayout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of completions to the prompt they share and, causally, to themselves.

    `s_ij = scale * q_i . k_j`, then `softcap * tanh(s_ij / softcap)`; `out_i = sum_j
    softmax_j(s_ij) v_j` over the keys j that token i sees: those of its prompt and of its own
    segment up to itself, and with a window those at positions p_i - window + 1 to p_i, where a
    completion's positions start at its prompt's length.

    q `[T, Hq, D]`, k and v `[T, Hkv, D]` in one of bf16, fp16, float32, float64 (the last for the
    reference alone), packed as `layout` says; Hq is a multiple of Hkv, and query head h reads
    key head `h // (Hq / Hkv)`. scale is `D ** -0.5` unless given. Returns out `[T, Hq, D]` in
    the dtype of q, and with `return_lse` also the logsumexp of s_i, `[T, Hq]` float32 in nats;
    both differentiable. Under autocast the inputs are cast, as torch's own attention does.
    Raises `ValueError` for shapes, dtypes, layouts or values that do not fit and for an
    unavailable `impl`; on a GPU the contents of a layout are not read back, and wrong ones go
    unnoticed. There heads of more than 256 run on the reference.

    `impl="flash"` is flash-attn's kernels where installed and PyTorch's otherwise, on a CPU too:
    the two parts as two calls, merged by logsumexp in float32 (Hydragen, arXiv:2402.05099). It has
    no window, a softcap with flash-attn alone, on a GPU no float32, and reads the layout back. A
    GPU's results are rounded once more than those of the other kernels.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        wanted = torch.get_autocast_dtype(device)
        q, k, v = (x if x.dtype == torch.float64 else x.to(wanted) for x in (q, k, v))
    _check(q, k, v, layout)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale={scale} must be positive, or None for D ** -0.5")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive, or None for no cap")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1, or None for no window")
    too_wide = q.is_cuda and q.shape[2] > library.WIDEST
    if impl == "auto" and (q.dtype == torch.float64 or too_wide):
        impl = "reference"  # float64 is for the truth; no kernel computes in it
    has = HAS
    if impl in ("auto", "flash") and (refusal := flash.refusal(q, softcap, window)) is not None:
        if impl == "flash":
            raise ValueError(f"impl='flash' {refusal}; another impl does it")
        has = tuple(i for i in HAS if i != "flash")
    chosen = choose("shared_prefix_attention", impl, q.device, has)
    with torch.autocast(device, enabled=False):
        if chosen == "reference":
            if not torch.compiler.is_compiling():
                layout.check(len(q))
            out, lse = reference.shared_prefix_attention(
                q, k, v, layout, scale=scale, softcap=softcap, window=window
            )
        else:
            if q.dtype not in FLOATS:
                raise ValueError(
                    f"q must be float32, bfloat16 or float16 for a kernel, got {q.dtype}; "
                    "impl='reference' takes float64"
                )
            differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
            settings = (scale, softcap or 0.0, window or 0, chosen, differentiated)
            out, lse, _ = torch.ops.fastrl.shared_prefix_attention(q, k, v, *layout, *settings)
    return (out, lse) if return_lse else out
