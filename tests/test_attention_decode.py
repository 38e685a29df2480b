"""Decode attention on a GPU: proofs without one, and tests for where there is one."""

from importlib.util import find_spec

import gpu_proof
import pytest
import torch

LAYERS, LAYER = 2, 1


def truth(q, keys, values, scale, softcap, window):
    """One row in float64: q [Hq, D], keys and values [n, Hkv, D], its own the last."""
    share = q.shape[0] // keys.shape[1]
    k, v = (x.double().repeat_interleave(share, 1) for x in (keys, values))
    scores = torch.einsum("hd,nhd->hn", q.double(), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if window:
        scores[:, : max(0, len(keys) - window)] = float("-inf")
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), v)


class Forest:
    """Segments of random keys, as nodes of chains."""

    def __init__(self, segments, chains, heads, kv_heads, width, dtype, device="cpu"):
        """segments: (start, capacity, shared); chains: per row (segment, keys), the last with its
        own key, which is yet to be written."""
        from fastrl.kernels.attention.decode import Segment, Visit, Workspace, table

        g = torch.Generator().manual_seed(0)
        shapes = [(LAYERS, 2, kv_heads, capacity, width) for _, capacity, _ in segments]
        self.storage = [torch.randn(s, generator=g).to(dtype).to(device) for s in shapes]
        rows = len(chains)
        shapes = [(rows, h, width) for h in (heads, kv_heads, kv_heads)]
        self.q, self.k, self.v = (torch.randn(s, generator=g).to(dtype).to(device) for s in shapes)
        starts = [start for start, _, _ in segments]
        self.chains = chains
        self.positions = torch.tensor(
            [starts[chain[-1][0]] + chain[-1][1] - 1 for chain in chains], device=device
        )
        for storage in self.storage:
            used = max(n for chain in chains for s, n in chain if self.storage[s] is storage)
            storage[:, :, :, used:] = float("nan")  # never read
        for s, n in (chain[-1] for chain in chains):
            self.storage[s][:, :, :, n - 1 :] = float("nan")
        nodes = [
            Segment(x.data_ptr(), *segment)
            for x, segment in zip(self.storage, segments, strict=True)
        ]
        visits = [
            [Visit(row, s, -1 if i == len(chain) - 1 else n) for i, (s, n) in enumerate(chain)]
            for row, chain in enumerate(chains)
        ]
        self.table = table(nodes, visits, heads // kv_heads, rows)
        self.table = self.table._replace(values=self.table.values.to(device))
        self.workspace = Workspace.of(self.table.size, heads, width, device)
        for x in self.workspace:
            x.fill_(float("nan"))

    def run(self, **options):
        from fastrl.kernels.attention.decode import decode_attention

        options = {"scale": 0.3, **options}
        return decode_attention(
            *(self.q, self.k, self.v, self.positions, self.table, self.workspace, LAYER), **options
        )

    def want(self, scale=0.3, softcap=0.0, window=0):
        out = []
        for row, chain in enumerate(self.chains):
            parts = [self.storage[s][LAYER, :, :, :n] for s, n in chain]
            keys, values = torch.cat(parts, 2).transpose(1, 2)
            keys[-1], values[-1] = self.k[row], self.v[row]
            out.append(truth(self.q[row], keys, values, scale, softcap, window))
        return torch.stack(out)


# Two prompts of which one is long, own nodes, a fork within a prompt, a row that has forked from
# another's own node and goes on in its own.
SEGMENTS = [(0, 300, True), (0, 9, True), (300, 64, False), (300, 64, False), (9, 64, False)]
SEGMENTS += [(73, 64, False), (300, 64, False), (280, 64, False), (310, 64, False)]
CHAINS = [
    [(0, 300), (2, 40)],
    [(0, 300), (3, 1)],
    [(1, 9), (4, 64), (5, 3)],
    [(0, 300), (6, 64)],
    [(0, 280), (7, 5)],
    [(0, 300), (2, 10), (8, 2)],
]


def check_decode(dtype, heads, kv_heads, width, device="cpu", **options):
    forest = Forest(SEGMENTS, CHAINS, heads, kv_heads, width, dtype, device)
    got, want = forest.run(**options), forest.want(**options)
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error < {torch.float32: 5e-7, torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]
    for row, chain in enumerate(CHAINS):  # what was written stays
        s, n = chain[-1]
        assert torch.equal(forest.storage[s][LAYER, 0, :, n - 1], forest.k[row])
        assert torch.equal(forest.storage[s][LAYER, 1, :, n - 1], forest.v[row])
    return got


def check_alone(dtype, heads=4, kv_heads=2, width=32, device="cpu", **options):
    """A row has the same bits whoever else reads its segments."""
    whole = check_decode(dtype, heads, kv_heads, width, device, **options)
    forest = Forest(SEGMENTS, CHAINS, heads, kv_heads, width, dtype, device)
    forest.run(**options)
    for rows in ([0], [1, 3], [2], [4, 5]):
        from fastrl.kernels.attention.decode import Segment, Visit, Workspace, table

        nodes = [Segment(x.data_ptr(), *s) for x, s in zip(forest.storage, SEGMENTS, strict=True)]
        chains = [CHAINS[r] for r in rows]
        visits = [
            [Visit(i, s, -1 if j == len(c) - 1 else n) for j, (s, n) in enumerate(c)]
            for i, c in enumerate(chains)
        ]
        part = Forest.__new__(Forest)
        part.q, part.k, part.v, part.positions = (
            x[rows] for x in (forest.q, forest.k, forest.v, forest.positions)
        )
        # With rows of padding, which write nowhere and come out as zeros.
        part.table = table(nodes, visits, heads // kv_heads, len(rows) + 2)
        part.table = part.table._replace(values=part.table.values.to(device))
        part.workspace = Workspace.of(part.table.size, heads, width, device)
        part.q, part.k, part.v, part.positions = (
            torch.cat([x, x[:1].expand(2, *x.shape[1:])])
            for x in (part.q, part.k, part.v, part.positions)
        )
        got = part.run(**options)
        assert not got[len(rows) :].any()
        if device == "cpu":  # numpy's products give a row other bits at another place
            torch.testing.assert_close(got[: len(rows)], whole[rows], rtol=1e-2, atol=1e-2)
        else:
            assert torch.equal(got[: len(rows)], whole[rows])


def check_interpreted():
    torch.set_num_threads(1)
    gpu_proof.round_bf16_when_interpreted()
    check_decode(torch.float32, 2, 1, 20, window=70, softcap=2.0)
    check_decode(torch.bfloat16, 14, 2, 64)
    check_decode(torch.float16, 16, 1, 32, window=7)
    check_decode(torch.bfloat16, 3, 3, 80)
    check_alone(torch.bfloat16)
    check_alone(torch.float16, window=290)


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_triton_interpreted():
    code = "from test_attention_decode import *; check_interpreted()"
    gpu_proof.run_python(code, TRITON_INTERPRET="1")


TYPES = {
    **dict.fromkeys(("table", "positions"), "*i64"),
    **dict.fromkeys(("tops", "totals", "parts"), "*fp32"),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
}


def triton_cost(name, capability, dtype, width, *, shared=True, softcap=False, window=False):
    from fastrl.kernels.attention import decode, triton_decode

    kernel = getattr(triton_decode, name)
    wide = decode.padded(width)
    constants = {
        **{"D": width, "WIDTH": wide, "SHARE": 4, "SPLIT": decode.SPLIT, "P": decode.MERGED},
        **{"FIELD": (triton_decode.SHARED if shared else triton_decode.OWN).value, "WIDE": False},
        **{"M": decode.SHARED_ROWS if shared else 16, "N": decode.KEYS[max(64, wide)]},
        **{"SOFTCAP": softcap, "WINDOW": window},
    }
    warps = decode.warps(constants["M"], wide, 4 if dtype == "fp32" else 2)
    constants = {n: x for n, x in constants.items() if n in kernel.arg_names}
    types = dict.fromkeys(kernel.arg_names, "i32") | TYPES
    types |= dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}")
    if name == "_decode_kernel":
        types["out"] = "*fp32"
    arguments = [n for n in kernel.arg_names if n not in constants]
    cost = gpu_proof.compile_triton(
        kernel,
        {n: types[n] for n in arguments},
        constants,
        capability=capability,
        num_warps=warps if name == "_decode_kernel" else 1,
        num_stages=2,
        aligned=tuple(n for n in arguments if types[n][0] == "*" or n in ("size", "q_stride")),
    )
    print(name, capability, dtype, width, shared, cost.registers, cost.shared)
    return cost


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_compiles_without_spills(capability):
    cost = triton_cost("_decode_kernel", capability, "bf16", 128)
    cost.check(shared=99 * 1024, wgmma=capability == 90)
    triton_cost("_decode_kernel", capability, "bf16", 128, shared=False).check()
    triton_cost("_write_kernel", capability, "bf16", 128).check()
    triton_cost("_merge_kernel", capability, "bf16", 128).check()


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_compiles_for_every_head_size(capability):
    every = {"softcap": True, "window": True}
    for width in (64, 80, 128, 256):
        for shared in (True, False):
            cost = triton_cost("_decode_kernel", capability, "fp16", width, shared=shared, **every)
            cost.check(shared=99 * 1024, wgmma=capability == 90 and shared)
    for width in (64, 128):
        triton_cost("_decode_kernel", capability, "fp32", width, **every).check(local=256)


# ---- on a GPU ------------------------------------------------------------------------------------


@gpu_proof.needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu(dtype):
    for heads, kv_heads, width in ((14, 2, 64), (16, 1, 128), (8, 4, 256), (3, 3, 20)):
        for options in ({}, {"window": 290, "softcap": 2.0}):
            check_decode(dtype, heads, kv_heads, width, "cuda", **options)
            check_alone(dtype, heads, kv_heads, width, "cuda", **options)
