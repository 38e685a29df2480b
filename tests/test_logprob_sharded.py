"""linear_logprob and models on two processes, with weights sharded as DTensors and by FSDP2."""

import pytest
import torch
import torch.distributed as dist

from fastrl.kernels import linear_logprob, linear_sample, native

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
IMPLS = [i for i in ("reference", "cpu") if native.unavailable(i, torch.device("cpu")) is None]
every_impl = pytest.mark.parametrize("impl", IMPLS)


def distance(x, y):
    return ((x.double() - y.double()).norm() / y.norm()).item()


def data_parallel(impl, v=1009, dtype=torch.float32):
    """A weight sharded unevenly, what each rank computes from it, and the mean gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, target = torch.randn(2, 37, 64), torch.randint(v, (2, 37))
    weight, bias = torch.randn(v, 64).to(dtype), torch.randn(v)
    leaves = [x.clone().requires_grad_() for x in (weight, bias)]
    loss = 0.0
    for i in range(2):
        out = linear_logprob(hidden[i], leaves[0], target[i], bias=leaves[1], impl=impl)
        loss = loss + out.logprob.sum() / 2
    mesh = init_device_mesh("cpu", (2,))
    sharded = [distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (weight, bias)]
    return hidden, sharded, target, torch.autograd.grad(loss, leaves)


def _sharded_weight(rank, impl, dtype):
    from torch.distributed.tensor import Replicate, Shard

    hidden, (weight, bias), target, want = data_parallel(impl, dtype=dtype)
    x = hidden[rank].requires_grad_()
    plain = linear_logprob(
        x, weight.full_tensor(), target[rank], bias=bias.full_tensor(), entropy=True, impl=impl
    )
    of_hidden = torch.autograd.grad(plain.logprob.sum(), x)[0]
    for placement in (Shard(0), Replicate()):
        w, b = (y.detach().redistribute(placements=[placement]) for y in (weight, bias))
        w, b = w.requires_grad_(), b.requires_grad_()
        out = linear_logprob(x, w, target[rank], bias=b, entropy=True, impl=impl)
        assert all(torch.equal(p, q) for p, q in zip(out, plain, strict=True))
        got = torch.autograd.grad(out.logprob.sum(), [x, w, b])
        assert torch.equal(got[0], of_hidden)
        for gradient, source, mean in zip(got[1:], (w, b), want, strict=True):
            assert gradient.placements == source.placements and gradient.dtype == source.dtype
            assert gradient.to_local().shape == source.to_local().shape
            tolerance = 1e-5 if gradient.dtype == torch.float32 else 1e-2
            assert distance(gradient.full_tensor(), mean) < tolerance
    frozen = [(weight.detach(), bias.detach())]
    frozen += [tuple(y.full_tensor() for y in frozen[0])]
    of_hidden = [
        torch.autograd.grad(linear_logprob(x, w, target[rank], bias=b, impl=impl).logprob.sum(), x)[
            0
        ]
        for w, b in frozen
    ]
    assert torch.equal(*of_hidden)
    # Gathered and computed in another dtype than it is kept in.
    cast = linear_logprob(hidden[rank].bfloat16(), weight.bfloat16(), target[rank], impl=impl)
    cast.logprob.sum().backward()
    assert weight.grad.dtype == dtype and weight.grad.placements == weight.placements


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharded_weight_gets_the_mean_gradient_sharded(ranks, impl, dtype):
    ranks.run(_sharded_weight, impl, dtype)


def _nothing_gathered_is_kept(rank, impl):
    from torch.multiprocessing.reductions import StorageWeakRef

    from fastrl.kernels.logprob import parallel

    hidden, (weight, bias), target, _ = data_parallel(impl)
    x, gathered = hidden[rank].requires_grad_(), []

    def spy(hidden, weight, target, **options):
        gathered.append(StorageWeakRef(weight.untyped_storage()))
        return linear_logprob(hidden, weight, target, **options)

    out = parallel.sharded(spy, x, weight, target[rank], bias=bias, impl=impl)
    assert gathered[0].expired()
    out.logprob.sum().backward()
    # The same without forgetting, to see that this would be noticed.
    out = spy(x, parallel.whole("weight", weight), target[rank], impl=impl)
    assert not gathered[1].expired()
    # What is gathered again must be what the forward saw.
    out = linear_logprob(x, weight, target[rank], impl=impl)
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logprob.sum().backward()


@every_impl
def test_only_the_shard_is_kept_for_the_backward(ranks, impl):
    ranks.run(_nothing_gathered_is_kept, impl)


def _dtensor_errors(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard

    hidden, weight, target = torch.randn(37, 64), torch.randn(1009, 64), torch.randint(1009, (37,))
    mesh = init_device_mesh("cpu", (2,))

    def raises(message, hidden=hidden, weight=weight, placed=None, mesh=mesh, **options):
        if placed is not None:
            weight = DTensor.from_local(weight, mesh, placed)
        with pytest.raises(ValueError, match=message):
            linear_logprob(hidden, weight, target, **options)

    raises("must be Shard", placed=[Partial()])
    raises(
        r"must be Shard\(0\) or Replicate", weight=weight[:, :32].contiguous(), placed=[Shard(1)]
    )
    wide = init_device_mesh("cpu", (1, 2))
    raises(r"mesh of shape \(1, 2\)", placed=[Shard(0), Shard(0)], mesh=wide)
    raises("hidden is a DTensor", hidden=DTensor.from_local(hidden, mesh, [Shard(0)]))
    raises("weight is a DTensor; with tp_group", placed=[Shard(0)], tp_group=dist.group.WORLD)


def test_other_placements_are_refused(ranks):
    ranks.run(_dtensor_errors)


def _sampling(rank):
    hidden, (weight, bias), _, _ = data_parallel("reference")
    rows = torch.arange(37)
    options = {"seeds": rows, "positions": rows, "temperature": 0.7, "top_p": 0.9}
    got = linear_sample(hidden[rank], weight, bias=bias, **options)
    want = linear_sample(hidden[rank], weight.full_tensor(), bias=bias.full_tensor(), **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_sampling_with_a_sharded_weight(ranks):
    ranks.run(_sampling)


def _fsdp_model(rank, tied, wrapped, reshard):
    """Log-probs and gradients of a model under FSDP2 against those from its own logits."""
    from torch.distributed.fsdp import fully_shard

    from fastrl import models

    prompts = [[[5, 6, 7], [8, 9]], [[4, 4, 4, 4], [3]]][rank]
    ids = torch.randint(3, 14, (2, 4), generator=torch.Generator().manual_seed(rank))
    mask = torch.arange(4) < torch.tensor([[4], [2 + rank]])

    def build():
        model = models.build_model(
            models.character_tokenizer("0123456789+-= "),
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            intermediate_size=64,
            context_length=32,
            tie_embeddings=tied,
            vocab_size=None,
            seed=0,
        ).eval()
        for part in (*(f"model.layers.{i}" for i in range(2)), *wrapped):
            fully_shard(model.get_submodule(part), reshard_after_forward=reshard)
        return model

    model, want = build(), torch.zeros(2, 4)
    for i, prompt in enumerate(prompts):
        n = int(mask[i].sum())
        row = torch.tensor([prompt + ids[i, :n].tolist()])
        logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
        want[i, :n] = torch.log_softmax(logits, -1).gather(-1, ids[i, :n, None]).squeeze(-1)
    want.sum().backward()
    expected = {name: p.grad.full_tensor() for name, p in model.named_parameters()}

    for function in (
        lambda model: models.completion_logprobs(model, prompts, ids, mask),
        lambda model: models.group_logprobs(model, (prompts, ids, mask)),
    ):
        model = build()
        models.verify_lm_head(model)
        out = function(model)
        torch.testing.assert_close(out.logprob, want, rtol=1e-5, atol=1e-5)
        out.logprob.sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(
                p.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-5, msg=name
            )
    return type(model.lm_head.weight).__name__


@pytest.mark.parametrize("reshard", [None, True])
@pytest.mark.parametrize(
    ("tied", "wrapped"),
    [(False, ["lm_head", ""]), (False, ["lm_head", "model"]), (False, [""]), (True, [""])],
)
def test_models_under_fsdp2(ranks, tied, wrapped, reshard):
    """The head in a group of its own, the backbone too, or what is no layer in the model's own."""
    assert ranks.run(_fsdp_model, tied, wrapped, reshard) == ["DTensor"] * 2
