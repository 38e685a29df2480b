"""shared_prefix_attention against torch's attention on the replicated and on the packed batch.

A group is a prompt of P tokens and G completions of C / 2 to C tokens. "replicated" is what a
trainer does without sharing: G rows of prompt and completion, padded on the right to the longest,
causal, so that torch takes its flash kernel. "masked" is the packed sequence with a dense mask.
The arithmetic floor is 4 Hq D operations for each pair of a query and a key it sees, and 10 for
the backward, which computes the scores again.
"""

import itertools
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.bench.race import BOTH, Race, Variant, Work, relative, within
from fastrl.kernels import IMPLEMENTATIONS, GroupLayout, native, shared_prefix_attention


class Model(NamedTuple):
    heads: int
    kv_heads: int
    width: int


MODELS = {"0.5B": Model(14, 2, 64), "8B": Model(32, 8, 128)}
TINY = {"P": 40, "G": 3, "C": 16}
WRONG = 0.02  # no rounding of 16-bit results is so large


class Case(NamedTuple):
    """A group, packed, and where its tokens are in the replicated batch."""

    layout: GroupLayout
    inputs: tuple[Tensor, ...]  # q, k, v, upstream gradient; [T, heads, D]
    rows: Tensor  # [G, P + C] packed tokens
    kept: Tensor  # [G, P + C], each packed token once


# A variant gives its leaves, a function of them, and what brings its rows to the packed tokens.
def ours(case, impl="auto"):
    def function(q, k, v):
        return shared_prefix_attention(q, k, v, case.layout, impl=impl)

    return case.inputs, function, lambda x: x


def replicated(case):
    *inputs, upstream = (x[case.rows].transpose(1, 2).contiguous() for x in case.inputs)
    upstream = upstream * case.kept[:, None, :, None]

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def gather(x):
        x = x.transpose(1, 2)
        packed = x.new_zeros(len(case.inputs[0]), *x.shape[2:], dtype=torch.float32)
        return packed.index_add_(0, case.rows.flatten(), x.flatten(0, 1).float())

    return (*inputs, upstream), function, gather


def masked(case):
    mask = case.layout.mask()

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    leaves = tuple(x.transpose(0, 1).unsqueeze(0).contiguous() for x in case.inputs)
    return leaves, function, lambda x: x.squeeze(0).transpose(0, 1)


class Attention(Race):
    op = "attention"
    about = "a prompt of P and G completions of up to C tokens"
    defaults = {"model": "0.5B", "P": 512, "G": 16, "C": 64, "dtype": "bfloat16"}
    grids = {
        "quick": [{"P": 256, "G": 8}],
        "default": [{}, {"dtype": "float32"}, {"model": "8B", "P": 256, "G": 8}],
        "long": [
            {"G": 32, "C": 256},
            {"P": 1024, "C": 256},
            {"P": 4096, "G": 8},
            {"model": "8B", "P": 1024, "G": 8, "C": 256},
        ],
        "full": [  # needs 16 GB and an hour
            {"model": m, "P": p, "G": g, "C": c}
            for m, p, g, c in itertools.product(MODELS, (512, 1024, 4096), (8, 16, 32), (64, 256))
        ],
    }

    def variants(self, device):
        fast = [
            impl
            for impl in native.FAST[device.type]
            if impl in IMPLEMENTATIONS["shared_prefix_attention"]
            and native.unavailable(impl, device) is None
        ]
        return {
            **({"fastrl": Variant(ours)} if fast else {}),
            **{f"fastrl {i}": Variant(partial(ours, impl=i)) for i in fast[1:]},
            "replicated prompt": Variant(replicated, "torch"),
            "dense mask": Variant(masked, "torch"),
        }

    def draw(self, shape, device):
        model, p, g, c = MODELS[shape["model"]], shape["P"], shape["G"], shape["C"]
        random = torch.Generator().manual_seed(0)
        lengths = self.lengths(shape)
        layout = GroupLayout.from_lengths([p], [lengths.tolist()])
        tokens = int(layout.offsets[-1])
        heads = (model.heads, model.kv_heads, model.kv_heads, model.heads)
        inputs = (torch.randn(tokens, h, model.width, generator=random) for h in heads)
        column = torch.arange(p + c)
        starts = layout.offsets[1:-1, None] - p
        rows = torch.where(column < p, column, starts + column).clamp(max=tokens - 1)
        kept = (column < p + lengths[:, None]) & ((column >= p) | (torch.arange(g)[:, None] == 0))
        return Case(
            layout.to(device),
            tuple(x.to(device, getattr(torch, shape["dtype"])) for x in inputs),
            rows.long().to(device),
            kept.to(device),
        )

    def lengths(self, shape):
        random = torch.Generator().manual_seed(1)
        lengths = torch.randint(shape["C"] // 2, shape["C"] + 1, (shape["G"],), generator=random)
        lengths[0] = shape["C"]
        return lengths

    def before(self, variant, inputs, mode):
        """Leaves, laid out as the variant wants them."""
        (*leaves, upstream), function, gather = variant.function(inputs)
        return [x.detach().requires_grad_() for x in leaves], upstream, function, gather

    def call(self, variant, inputs, mode):
        leaves, upstream, function, _ = inputs

        def both():
            out = function(*leaves)
            return out, *torch.autograd.grad(out, leaves, upstream)

        return both if mode == BOTH else torch.no_grad()(partial(function, *leaves))

    def gate(self, variant, inputs, shape):
        """On a group small enough for a dense float64 reference."""
        case = self.draw(shape | TINY, inputs.rows.device)
        prepared = self.before(variant, case, BOTH)
        _, *got = self.call(variant, prepared, BOTH)()
        exact = [x.double().requires_grad_() for x in case.inputs[:3]]
        want = shared_prefix_attention(*exact, case.layout, impl="reference")
        wanted = torch.autograd.grad(want, exact, case.inputs[3].double())
        pairs = zip(("grad q", "grad k", "grad v"), got, wanted, strict=True)
        return within({name: relative(prepared[3](x), y) for name, x, y in pairs}, WRONG)

    def small(self, shape):
        return shape | TINY

    def work(self, shape, mode):
        model, p = MODELS[shape["model"]], shape["P"]
        lengths = self.lengths(shape).double()
        pairs = p * (p + 1) / 2 + (lengths * p + lengths * (lengths + 1) / 2).sum().item()
        forward = 4 * model.heads * model.width * pairs
        itemsize = 4 if shape["dtype"] == "float32" else 2
        tokens = p + lengths.sum().item()
        values = tokens * model.width * 2 * (model.heads + model.kv_heads)
        both = mode == BOTH
        return Work(forward * (3.5 if both else 1), values * itemsize * (3 if both else 1),
                    shape["dtype"])  # fmt: skip


RACE = Attention()
