"""`fastrl.patch("trl")` on the installed TRL: its functions, and its trainers run for real."""

import importlib
import math
import sys
import warnings

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")

import trl_runs
from peft import LoraConfig, get_peft_model
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

import fastrl
from fastrl.integrations import PatchError
from fastrl.integrations.trl import rollout_func
from fastrl.integrations.trl.lm_head import STATISTICS
from fastrl.kernels import native
from fastrl.models import completion_logprobs

HAS_KERNELS = native.unavailable("cpu", torch.device("cpu")) is None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="without kernels TRL keeps its own")
original_chunked = ChunkedLogProbFunction.apply


@pytest.fixture
def patched():
    with fastrl.patch("trl") as patch, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs as without fastrl")
        yield patch


def test_what_is_replaced():
    importlib.import_module("trl.experimental.cpo.cpo_trainer")
    functions = (
        "ChunkedLogProbFunction.apply",
        "utils.selective_log_softmax",
        "utils.entropy_from_logits",
        "utils.selective_log_softmax_and_entropy",
        "GRPOTrainer._get_per_token_logps_and_entropies",
        "RLOOTrainer._get_per_token_logps_and_entropies",
        "DPOTrainer._compute_loss",
        "cpo_trainer.selective_log_softmax",
    )
    before = utils.selective_log_softmax
    with fastrl.patch("trl") as patch:
        for name in functions:
            assert any(r.endswith(name) for r in patch.replaced), name
        late = importlib.import_module("trl.experimental.orpo.orpo_trainer")
        assert late.selective_log_softmax is utils.selective_log_softmax is not before
    cpo = sys.modules["trl.experimental.cpo.cpo_trainer"]
    assert before is utils.selective_log_softmax is cpo.selective_log_softmax
    assert before is late.selective_log_softmax
    assert "apply" not in vars(ChunkedLogProbFunction)


def test_a_renamed_function_raises(monkeypatch):
    monkeypatch.delattr(utils, "entropy_from_logits")
    before = utils.selective_log_softmax
    with pytest.raises(PatchError, match=r"trl\.trainer\.utils\.entropy_from_logits is not in trl"):
        fastrl.patch("trl")
    assert utils.selective_log_softmax is before


@needs_kernels
def test_chunked_by_hand(patched):
    # logits log 1, log 2, log 1: p = 1/4, 1/2, 1/4
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(2)], [0.0]])
    out = ChunkedLogProbFunction.apply(hidden, weight, None, torch.tensor([1, 0]), 1.0, 2)
    logprob, entropy, log_sum_sq_probs, mean_logits, is_top1 = out
    assert logprob.tolist() == pytest.approx([math.log(1 / 2), math.log(1 / 4)], abs=1e-6)
    assert entropy.tolist() == pytest.approx([1.5 * math.log(2)] * 2, abs=1e-6)
    assert log_sum_sq_probs.tolist() == pytest.approx([math.log(3 / 8)] * 2, abs=1e-6)
    assert mean_logits.tolist() == pytest.approx([math.log(2) / 3] * 2, abs=1e-6)
    assert is_top1.tolist() == [True, False]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunked_against_the_original(patched, dtype, softcap):
    g = torch.Generator().manual_seed(1)
    hidden, weight, bias = (
        torch.randn(shape, generator=g).to(dtype).requires_grad_()
        for shape in ((333, 32), (1003, 32), (1003,))
    )
    with torch.no_grad():
        weight[700] = weight[7]  # a tie, which the first of the two wins
        bias[[7, 700]] = 30.0 * hidden[0].float().norm().to(dtype)
        targets = torch.randint(1003, (333,), generator=g)
        targets[:2], targets[2::3] = torch.tensor([7, 700]), 7
    rest = (targets, 0.7, 257, softcap, 0.5)
    # The original rounds logits of up to 180 to bf16, which has 8 bits.
    tolerance = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 1.0}
    calls = ((), ("log_probs",), ("log_probs", "entropy"), STATISTICS)
    for outputs in calls:
        want = original_chunked(hidden, weight, bias, *rest, outputs)
        got = ChunkedLogProbFunction.apply(hidden, weight, bias, *rest, outputs)
        for a, b in zip(want, got, strict=True):
            assert (a is None) == (b is None)
            if a is None:
                continue
            assert a.requires_grad == b.requires_grad
            if a.dtype == torch.bool:
                assert (a == b).float().mean() > 0.99
            else:
                torch.testing.assert_close(a, b, check_dtype=False, **tolerance)
    assert got[4][:3].tolist() == [True, False, True]
    leaves, up = (hidden, weight, bias), torch.randn(2, 333, generator=g)
    theirs, ours = (torch.autograd.grad((out[:2]), leaves, (up[0], up[1])) for out in (want, got))
    for a, b in zip(theirs, ours, strict=True):
        assert a.dtype == b.dtype
        limit = (1e-4 if dtype == torch.float32 else 3e-2) * a.abs().max()
        assert (a.float() - b.float()).abs().max() <= limit


@needs_kernels
def test_logits_by_hand(patched):
    logits = torch.tensor([[1.0, 2.0, 1.0], [5.0, 5.0, 5.0]]).log().requires_grad_()
    index = torch.tensor([1, 2])
    half, third, entropy = math.log(1 / 2), math.log(1 / 3), [1.5 * math.log(2), math.log(3)]
    got = utils.selective_log_softmax(logits, index)
    assert got.tolist() == pytest.approx([half, third], abs=1e-6)
    (grad,) = torch.autograd.grad(got[0], logits)
    assert grad[0].tolist() == pytest.approx([-0.25, 0.5, -0.25], abs=1e-6)
    hot = utils.selective_log_softmax(logits, index, temperature=0.5)  # 1, 4, 1
    assert hot.tolist() == pytest.approx([math.log(4 / 6), third], abs=1e-6)
    two = utils.selective_log_softmax(logits, torch.tensor([[1, 0], [0, 1]]))
    assert two.flatten().tolist() == pytest.approx([half, 2 * half, third, third], abs=1e-6)
    masked = utils.selective_log_softmax(logits, index, row_mask=torch.tensor([0, 1]))
    assert masked.tolist() == pytest.approx([0.0, third], abs=1e-6)
    assert utils.entropy_from_logits(logits).tolist() == pytest.approx(entropy, abs=1e-6)
    both = utils.selective_log_softmax_and_entropy(logits, index, False)
    assert both[0].requires_grad and not both[1].requires_grad
    assert both[0].tolist() == pytest.approx([half, third], abs=1e-6)
    assert both[1].tolist() == pytest.approx(entropy, abs=1e-6)


@needs_kernels
def test_logits_in_16_bits_stay_float32(patched):
    logits = torch.randn(2, 5, 999, dtype=torch.bfloat16, requires_grad=True)
    index = torch.randint(999, (2, 5))
    got = utils.selective_log_softmax(logits, index)
    want = logits.double().log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_other_devices_and_dtypes_are_declined():
    logits, index = torch.randn(3, 7, dtype=torch.float64), torch.tensor([0, 3, 6])
    want = utils.selective_log_softmax(logits, index)
    with fastrl.patch("trl"), pytest.warns(RuntimeWarning, match=r"no kernel for torch\.float64"):
        assert torch.equal(utils.selective_log_softmax(logits, index), want)


def close(want, got):
    assert len(want) == len(got)
    for (loss, norm), (ours, our_norm) in zip(want, got, strict=True):
        assert ours == pytest.approx(loss, abs=1e-4)
        assert our_norm == pytest.approx(norm, rel=1e-3)


@needs_kernels
@pytest.mark.parametrize(
    "kind, options",
    [
        ("grpo", {}),
        ("rloo", {}),
        # old log-probs of micro-batches that hold parts of several groups; no reference model
        (
            "grpo",
            {
                "beta": 0.0,
                "num_iterations": 2,
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 2,
                "temperature": 0.7,
                "gradient_checkpointing": False,
                "mask_truncated_completions": True,
            },
        ),
    ],
)
def test_sampling_trainers(tmp_path, kind, options):
    want = trl_runs.losses(trl_runs.sampler(kind, tmp_path / "a", **options))
    with fastrl.patch("trl"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs as without fastrl")
        got = trl_runs.losses(trl_runs.sampler(kind, tmp_path / "b", **options))
    assert any(abs(norm) > 1e-3 for _, norm in want)
    close(want, got)


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [
        {"use_weighting": True},
        {"loss_type": ["ipo", "sft"], "ld_alpha": 0.5, "gradient_checkpointing": False},
        # prompts cut short, so that those of several pairs are the same
        {"max_length": 6, "truncation_mode": "keep_end", "gradient_accumulation_steps": 2},
        {"precompute_ref_log_probs": True},
    ],
)
def test_dpo(tmp_path, options):
    want = trl_runs.losses(trl_runs.preferences(tmp_path / "a", **options))
    with fastrl.patch("trl"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs as without fastrl")
        got = trl_runs.losses(trl_runs.preferences(tmp_path / "b", **options))
    assert want[-1][0] < want[0][0]
    close(want, got)


def adapted(folder, **lora):
    """The tiny model with adapters, for trainers whose reference is the model without them."""
    torch.manual_seed(0)
    model = trl_runs.on_disk(folder, trl_runs.character_tokenizer(trl_runs.ALPHABET))
    config = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **lora)
    return get_peft_model(model, config)


@needs_kernels
def test_dpo_of_adapters(tmp_path):
    want = trl_runs.losses(trl_runs.preferences(tmp_path / "a", model=adapted(tmp_path)))
    with fastrl.patch("trl"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs as without fastrl")
        got = trl_runs.losses(trl_runs.preferences(tmp_path / "b", model=adapted(tmp_path)))
    assert all(norm > 1e-3 for _, norm in want)
    close(want, got)


def pairs(trainer):
    """The inputs of a batch: prompts of 2, 5 and 5 tokens, completions of 1 to 3."""
    rows = [([5, 6], [7, 8, 9], [9]), ([6] * 5, [7], [8, 8]), ([6] * 5, [5, 5], [9, 7])]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return trainer.data_collator([dict(zip(names, row, strict=True)) for row in rows])


@needs_kernels
def test_prompts_of_pairs_are_computed_once(tmp_path, patched):
    trainer = trl_runs.preferences(tmp_path)
    trainer.model.train()
    inputs, seen = pairs(trainer), []
    want = patched.replaced["trl.trainer.dpo_trainer.DPOTrainer._compute_loss"].original(
        trainer, trainer.model, inputs, False
    )
    trainer._compute_loss(trainer.model, inputs, False)  # compares
    for model in (trainer.model, trainer.ref_model):
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda *a: seen.append(a[2].shape[:-1].numel()))
    got = trainer._compute_loss(trainer.model, inputs, False)
    # 2 tokens, and of each completion all but the last; 5 for two pairs of one prompt
    assert seen == [2 + (2 + 0) + 5 + (0 + 1 + 1 + 1)] * 2
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert got.requires_grad
    assert len(trainer._metrics["train"]["logps/chosen"]) == 3  # not those of the comparison
    assert all("forward" not in vars(m.model) for m in (trainer.model, trainer.ref_model))


@needs_kernels
def test_a_pair_that_shares_wrongly_is_found(tmp_path, patched, monkeypatch):
    from fastrl.integrations.trl import prompts

    real = prompts.pack_groups

    def swapped(*rows, **options):
        packed = real(*rows, **options)
        return packed._replace(input_ids=packed.input_ids.roll(1))

    monkeypatch.setattr(prompts, "pack_groups", swapped)
    trainer = trl_runs.preferences(tmp_path)
    trainer.model.train()
    with pytest.raises(PatchError, match=r"DPOTrainer\._compute_loss: fastrl's output \d differs"):
        trainer._compute_loss(trainer.model, pairs(trainer), False)
    assert not trainer._metrics["train"]


@needs_kernels
def test_pairs_that_cannot_share_run_as_before(tmp_path):
    trainer = trl_runs.preferences(tmp_path)
    inputs = pairs(trainer)
    left = {name: x.flip(1) for name, x in inputs.items()}
    gaps = inputs | {"completion_mask": inputs["completion_mask"].clone()}
    gaps["completion_mask"][0, 3] = 0
    wrapped = torch.nn.DataParallel(trainer.model)
    for model, given, why in (
        (trainer.model, left, "padded on the left"),
        (trainer.model, gaps, "not a prompt and a completion"),
        (wrapped, inputs, "wrapped in DataParallel"),
    ):
        want = trainer._compute_loss(model, given, False)
        with fastrl.patch("trl"), pytest.warns(RuntimeWarning, match=why):
            got = trainer._compute_loss(model, given, False)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.fixture
def trainer(tmp_path):
    return trl_runs.sampler("grpo", tmp_path)


def batch(tokenizer):
    """Two prompts of different lengths, padded on the left, their completions shuffled."""
    g = torch.Generator().manual_seed(3)
    prompts = [tokenizer(p)["input_ids"] for p in ("12+3=", "4=")]
    of = [0, 1, 1, 0, 0, 1]
    width = max(map(len, prompts))
    ids = torch.full((6, width + 4), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, (p, length) in enumerate(zip(of, (4, 2, 0, 1, 3, 4), strict=True)):
        ids[row, width - len(prompts[p]) : width] = torch.tensor(prompts[p])
        mask[row, width - len(prompts[p]) : width + length] = 1
    ids[:, width:] = torch.randint(5, 15, (6, 4), generator=g)
    return ids, mask, 4


@needs_kernels
@pytest.mark.parametrize("batch_size", [None, 4])
def test_shared_prompts_of_a_shuffled_batch(trainer, patched, batch_size):
    arguments = (trainer.model, *batch(trainer.processing_class), batch_size, True)
    name = "trl.trainer.grpo_trainer.GRPOTrainer._get_per_token_logps_and_entropies"
    want = patched.replaced[name].original(trainer, *arguments)
    got = trainer._get_per_token_logps_and_entropies(*arguments)
    mask = arguments[2][:, -4:] != 0
    assert want[2] is got[2] is None
    for a, b in zip(want[:2], got[:2], strict=True):
        assert b.dtype == torch.float32 and b.requires_grad
        torch.testing.assert_close(b[mask], a[mask], rtol=0, atol=2e-5)
        assert not b[~mask].any()


@needs_kernels
def test_shared_prompts_are_computed_once(trainer, patched):
    seen = []
    embedding = trainer.model.get_input_embeddings()
    arguments = (trainer.model, *batch(trainer.processing_class))
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(*arguments)  # compares
        embedding.register_forward_hook(lambda *a: seen.append(a[2].shape[:-1].numel()))
        trainer._get_per_token_logps_and_entropies(*arguments)
    # 5 and 2 tokens of prompts, and of each completion all but the last token
    assert seen == [5 + (3 + 0 + 2) + 2 + (1 + 0 + 3)]


@needs_kernels
def test_a_model_that_shares_wrongly_is_found(trainer, patched, monkeypatch):
    from fastrl import models

    real = models.group_logprobs

    def off(*args, **kwargs):
        out = real(*args, **kwargs)
        return out._replace(logprob=out.logprob * 1.01)

    monkeypatch.setattr(models, "group_logprobs", off)
    with pytest.raises(PatchError, match=r"_get_per_token_logps_and_entropies: fastrl's output 0"):
        trainer._get_per_token_logps_and_entropies(trainer.model, *batch(trainer.processing_class))


@needs_kernels
def test_what_cannot_share_runs_as_before(trainer):
    ids, mask, keep = batch(trainer.processing_class)
    wrapped = torch.nn.DataParallel(trainer.model)
    want = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, keep)[0]
    with fastrl.patch("trl"):
        with pytest.warns(RuntimeWarning, match="wrapped in DataParallel"):
            got = trainer._get_per_token_logps_and_entropies(wrapped, ids, mask, keep)[0]
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
        with pytest.warns(RuntimeWarning, match="images, or token types"):
            trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, keep, token_type_ids=None, num_images=[0] * 6
            )
        with warnings.catch_warnings():  # one row has nothing to share
            warnings.filterwarnings("error", message=".*runs as without fastrl")
            trainer._get_per_token_logps_and_entropies(trainer.model, ids[:1], mask[:1], keep)


@needs_kernels
def test_lora_with_dropout_and_autocast(tmp_path, patched):
    model = adapted(tmp_path, lora_dropout=0.3)
    trainer = trl_runs.sampler("grpo", tmp_path, 1, model=model, bf16=True, beta=0.0)
    ((loss, norm),) = trl_runs.losses(trainer)
    assert math.isfinite(loss) and norm > 0


@needs_kernels
@pytest.mark.parametrize("scheme, error", [(None, 1e-4), ("int8", 0.1)])
def test_rollout_func(tmp_path, scheme, error):
    seen = []

    def spy(prompts, trainer):
        out = sample(prompts, trainer)
        seen.append((prompts, out))
        model, ids = trainer.model, [torch.tensor(c) for c in out["completion_ids"]]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([[len(c)] for c in ids])
        with torch.no_grad():
            want = completion_logprobs(model, out["prompt_ids"], padded, mask, temperature=0.8)
        flat = torch.tensor([x for row in out["logprobs"] for x in row])
        torch.testing.assert_close(flat, want.logprob[mask], rtol=0, atol=error)
        return out

    sample = rollout_func(max_rows=8, scheme=scheme)
    trainer = trl_runs.sampler("grpo", tmp_path, 2, rollout=spy, temperature=0.8)
    losses = trl_runs.losses(trainer)
    assert all(norm > 0 for _, norm in losses)
    assert len(seen) == 2
    for prompts, out in seen:
        assert len(prompts) == 16 and 1 < len(set(prompts)) <= 4
        tokenizer = trainer.processing_class
        assert out["prompt_ids"] == [tokenizer(p)["input_ids"] for p in prompts]
        assert all(1 <= len(c) <= 6 for c in out["completion_ids"])
        assert len({tuple(c) for c in out["completion_ids"]}) > 4  # a group's differ
    assert seen[0][1]["completion_ids"] != seen[1][1]["completion_ids"]


def test_rollout_func_refuses_what_it_cannot_do(trainer):
    sample = rollout_func()
    trainer.args.repetition_penalty = 1.1
    with pytest.raises(ValueError, match=r"repetition_penalty=1\.1 is not supported"):
        sample(["1="], trainer)
    trainer.args.repetition_penalty = 1.0
    trainer.args.generation_kwargs = {"num_beams": 2}
    with pytest.raises(ValueError, match="generation_kwargs="):
        sample(["1="], trainer)


def test_attn_implementation_does_not_generate(model):
    import fastrl.models  # noqa: F401  registers it

    model.set_attn_implementation("fastrl")
    ids = torch.tensor([[3, 4, 5]])
    assert model(ids, use_cache=False).logits.shape[:2] == (1, 3)
    with pytest.raises(ValueError, match="takes no KV cache, got 1 queries for 4 keys; generate"):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    model.set_attn_implementation("sdpa")
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 6)
