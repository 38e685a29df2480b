"""The race of rollouts: what its figures mean, and whether its variants sample alike."""

import io

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fastrl import bench
from fastrl.bench import bench_rollout, child, report, rollout_models
from fastrl.bench.bench_rollout import BARE, FIRST, HEAD, WHOLE
from fastrl.bench.race import Variant
from fastrl.kernels import native
from fastrl.models import backbone
from fastrl.rollout.huggingface import HuggingFaceRows

CPU = torch.device("cpu")
RACE = bench.load("rollout")
SHAPE = RACE.complete({"layers": 2, "prompts": 2, "P": 5, "G": 3, "tokens": 67})
needs_native = pytest.mark.skipif(bool(native.why_missing), reason=str(native.why_missing))


@pytest.fixture(scope="module")
def case():
    return RACE.draw(SHAPE, CPU)


def test_parameters_are_counted():
    for name in rollout_models.MODELS:
        shape = RACE.complete({"model": name, "layers": 1})
        with torch.device("meta"):
            model = rollout_models.build(shape)
        layers, head, _ = rollout_models.weights(shape)
        matrices = [p.numel() for p in model.model.layers.parameters() if p.dim() == 2]
        assert sum(matrices) == layers and model.lm_head.weight.numel() == head


def bytes_of(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


@needs_native
def test_bytes_held_are_those_of_the_nodes(case):
    from fastrl.rollout.decoder import Decoder
    from fastrl.rollout.native import NativeRows

    rows = NativeRows(Decoder(case.model), 0)
    rows.add(case.prompts, [case.group] * len(case.prompts))
    for _ in range(SHAPE["tokens"] - 1):
        rows.step(torch.full((case.rows,), 3))
    nodes = {id(n): n.storage for branch in rows._branches for n in branch.nodes}
    assert RACE.held(RACE.variants(CPU)["fastrl"], case, SHAPE) == bytes_of(nodes.values())


def test_bytes_held_are_those_of_a_replicated_cache(case):
    rows = HuggingFaceRows(backbone(case.model), CPU)
    with torch.no_grad():
        rows.add(case.prompts, [case.group] * len(case.prompts))
        for _ in range(SHAPE["tokens"] - 1):
            rows.step(torch.full((case.rows,), 3))
    held = bytes_of(x for layer in rows._cache.layers for x in (layer.keys, layer.values))
    for name in ("HF, one prefill", "HF generate"):
        assert RACE.held(RACE.variants(CPU)[name], case, SHAPE) == held


def test_figures_by_hand(case):
    shape = RACE.complete({"prompts": 1, "P": 8, "G": 2, "tokens": 5})
    seconds = {FIRST: 2.0, BARE: 2.5, HEAD: 1.0, WHOLE: 6.0}  # of 1, 5, 5 and 5 tokens
    ours = RACE.figures(RACE.variants(CPU)["fastrl"], case, shape, seconds)
    # 0.2 s a draw; 4 steps in 4 s; 0.5 s a token without the prompt.
    assert [ours[f"{k} ms"] for k in ("prefill", "step", "attention", "products", "head")] == [
        pytest.approx(x) for x in (1800, 1000, 500, 300, 200)
    ]
    layers, head, size = rollout_models.weights(shape)
    # 8 positions of the prompt and half of 2 x 5; in each 4 layers of 2 x 2 heads of 32 floats.
    assert ours["GB/s"] == pytest.approx(((layers + head) * 4 + 13 * 4 * 128 * 4) / 1e9)
    assert size == 4
    del seconds[HEAD]
    other = RACE.figures(RACE.variants(CPU)["HF generate"], case, shape, seconds)
    assert other["products ms"] == pytest.approx(500) and "head ms" not in other


def test_figures_are_told_and_shown_and_a_mode_that_is_missing_is_not_timed(monkeypatch):
    scan = bench.load("scan")
    from fastrl.bench.bench_scan import inline_loop

    variants = {"a": Variant(inline_loop), "b": Variant(inline_loop, "eager", without=scan.modes)}
    monkeypatch.setattr(type(scan), "variants", lambda self, device: variants)
    monkeypatch.setattr(
        type(scan), "figures", lambda self, v, inputs, shape, best: {"modes": float(len(best))}
    )
    events = []
    task = {"op": "scan", "shape": {"B": 2, "T": 3}, "variants": ["a", "b"], "device": "cpu"}
    task |= {"memory": False, "seconds": 0.05, "rounds": 3, "pause": 0.0}
    child.race_at(task, lambda **event: events.append(event))
    assert all("b" not in e["times"] for e in events if "times" in e)
    told = {e["of"]: e["figures"]["modes"] for e in events if "figures" in e}
    assert told == {"a": len(scan.modes), "b": 0}
    shown = {name: {"peer": "eager", "figures": {"modes": n}} for name, n in told.items()}
    text = io.StringIO()
    report.show_figures(shown | {"c": {"peer": "eager"}}, Console(file=text, width=80))
    assert text.getvalue().split()[-4:] == ["a", f"{len(scan.modes)}", "b", "0"]


def test_what_is_compared_is_not_one_token_again_and_again():
    case = RACE.draw(RACE.complete(bench_rollout.GATE), CPU)
    tokens = bench_rollout.generate(case, case.prompts, case.tokens, temperature=0)
    assert len(tokens.unique()) >= 4


@pytest.mark.parametrize("name", ["fastrl", "fastrl, int8", "HF, one prefill", "HF generate"])
def test_greedy_tokens_are_generates(name, case):
    assert RACE.gate(RACE.variants(CPU)[name], case, SHAPE).wrong is None


def test_openvino_samples_the_same_greedy_tokens(case):
    pytest.importorskip("openvino_genai")
    variants = RACE.variants(CPU)
    assert RACE.gate(variants["OpenVINO"], case, SHAPE).wrong is None
    drawn = variants["OpenVINO"].function(case, case.prompts, 4)
    assert drawn.shape == (case.rows, 4) and drawn.min() >= 0 and drawn.max() < 17


def llamacpp(kind="llama.cpp"):
    for package in ("llama_cpp", "gguf"):
        pytest.importorskip(package)
    return RACE.variants(CPU)[kind]


@pytest.mark.parametrize("prompts", [1, 2])  # one buffer for all sequences, or one for each
def test_llamacpp_samples_the_same_greedy_tokens(prompts):
    variant, shape = llamacpp(), SHAPE | {"prompts": prompts}
    case = RACE.draw(shape, CPU)
    assert RACE.gate(variant, case, shape).wrong is None
    drawn = variant.function(case, case.prompts, 64)
    assert drawn.shape == (case.rows, 64) and drawn.min() >= 0 and drawn.max() < 17
    assert len(drawn.unique(dim=0)) == case.rows
    # Keys and values of a token: 2 x 2 layers x 2 heads x 32 floats. A buffer is of 256 tokens.
    assert RACE.held(variant, case, shape) == (1 if prompts == 1 else case.rows) * 256 * 1024


def test_llamacpp_forgets_the_rollout_before():
    case, variant = RACE.draw(SHAPE, CPU), llamacpp()
    made = RACE.before(variant, case, WHOLE).exported(**variant.function.keywords)
    first, again = (variant.function(case, case.prompts, 9, temperature=0) for _ in range(2))
    assert torch.equal(first, again)
    assert case.exported(**variant.function.keywords) is made  # written and loaded once


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama.cpp, Q8_0", "float32"), ("llama.cpp", "bfloat16")]
)
def test_llamacpp_in_fewer_bits_is_near(kind, dtype):
    variant, shape = llamacpp(kind), SHAPE | {"dtype": dtype}
    verdict = RACE.gate(variant, RACE.draw(shape, CPU), shape)
    assert verdict.wrong is None and verdict.errors["logits"] > 1e-5


def test_llamacpp_has_the_heads_of_a_llama_in_its_own_order():
    variant = llamacpp()
    sizes = rollout_models.TINY | {"num_hidden_layers": 2, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes | rollout_models.COMMON)).eval()
    case = bench_rollout.Case(model, [[3, 5, 4, 9, 16, 7, 2]], 2, 8)
    got = case.exported(**variant.function.keywords).logits(case.prompts[0])
    with torch.no_grad():
        want = model(torch.tensor(case.prompts)).logits[0, -1]
    assert (got - want).abs().max() < 2e-3 * want.abs().max()  # 5e-4 was seen


def test_llamacpp_refuses_what_it_cannot_have(case, tmp_path):
    llamacpp()
    from fastrl.bench.llamacpp_peer import LlamaCpp, write

    with pytest.raises(ValueError, match="300 completions at once"):
        LlamaCpp(case.model, 3, 100, 5, 2)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="the model is a gpt2; it may be one of llama, qwen2"):
        write(other, tmp_path / "x.gguf", "F32")
    config = LlamaConfig(
        **rollout_models.TINY | {"num_hidden_layers": 1},
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    )
    with pytest.raises(ValueError, match="rope_type='linear' is not written"):
        write(LlamaForCausalLM(config), tmp_path / "x.gguf", "F32")
