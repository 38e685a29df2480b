"""Rollouts: the native decoder against Hugging Face generate, replicated and with one prefill.

python -m pytest bench/bench_rollout.py            pytest-benchmark's table, the tiny model
python bench/bench_rollout.py tiny [--json FILE]   variants interleaved, ratios of medians printed
python bench/bench_rollout.py 0.5b --layers 6 --prompt 512 --group 16 --tokens 64
python bench/bench_rollout.py 0.5b --grid --skip "HF generate" --json results.json
python bench/bench_rollout.py 0.5b --prompt 64 512 --group 1 16 --tokens 32 128

tiny: Qwen3 of 0.8M parameters, float32, 16 prompts x 8 completions of 32 tokens, as in
bench_trainer.py. 0.5b: the shape of Qwen2.5-0.5B with random bf16 weights, one prompt. Lists of
prompts, groups and tokens are crossed; --grid is P {64, 512, 1024, 4096} x G {1, 4, 8, 16, 32} x
L {32, 128}.

A step at full length is timed apart from the lm-head and beside one of rows without a past, whose
difference is attention's; the floor is the bytes that each must read (weights; keys and values,
the prompt's once) over the rate at which memory is read, measured in the same run.
"""

import argparse
import json
import platform
import statistics
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fastrl.models import backbone, lm_head
from fastrl.rollout import RolloutEngine, SamplingParams, generation
from fastrl.rollout.decoder import Decoder
from fastrl.rollout.huggingface import HuggingFaceRows
from fastrl.rollout.native import NativeRows
from fastrl.rollout.request import Request

COMMON = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "tie_word_embeddings": True}
TINY = {
    "vocab_size": 17,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "max_position_embeddings": 128,
}
HALF_B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
GRID = (64, 512, 1024, 4096), (1, 4, 8, 16, 32), (32, 128)  # prompt, group, tokens


class Case:
    """A model, prompts of equal length, and the variants of `tokens` new tokens for each row."""

    def __init__(self, model, prompts, group, tokens):
        self.model, self.prompts, self.group, self.tokens = model.eval(), prompts, group, tokens
        self.rows = len(prompts) * group
        self.engine = RolloutEngine(model, max_rows=self.rows)
        self.ids = torch.tensor([p for p in prompts for _ in range(group)])

    def variants(self):
        return {
            "fastrl": self.fastrl,
            "HF, one prefill": self.prefill_once,
            "HF generate": self.generate,
        }

    def fastrl(self, temperature=1.0):
        sampling = SamplingParams(temperature, max_new_tokens=self.tokens, ignore_eos=True)
        return self.engine.generate(self.prompts, self.group, sampling).completion_ids

    @torch.no_grad()
    def prefill_once(self, temperature=1.0):
        model = backbone(self.model)
        rows = HuggingFaceRows(model, self.ids.device)
        sampling = SamplingParams(temperature, max_new_tokens=self.tokens)
        limits = [self.tokens] * len(self.prompts)
        request = Request(self.prompts, limits, self.group, sampling, [])
        ending = generation.Ending([], None, self.group, None)
        return generation.generate(
            rows, lm_head(self.model), request, ending, self.rows, lambda *_: None
        ).tokens

    def generate(self, temperature=1.0):
        out = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            do_sample=temperature > 0,
            min_new_tokens=self.tokens,
            max_new_tokens=self.tokens,
            top_k=0,
        )
        return out[:, self.ids.shape[1] :]

    def check(self):
        """The gate before any timing: greedy tokens (float32) or hidden states agree."""
        if self.model.dtype == torch.float32:
            want = self.generate(temperature=0)
            for name in ("fastrl", "HF, one prefill"):
                assert torch.equal(self.variants()[name](temperature=0), want), name
        got = self.engine.prefill(self.prompts[0]).hidden.float()
        with torch.no_grad():
            want = backbone(self.model)(self.ids[:1], use_cache=False).last_hidden_state[0, -1]
        gap = (got - want.float()).abs().max() / want.float().abs().max()
        assert gap < (1e-5 if self.model.dtype == torch.float32 else 5e-2), f"off by {gap}"


def tiny():
    torch.manual_seed(0)
    prompts = torch.randint(3, 17, (16, 9), generator=torch.Generator().manual_seed(0)).tolist()
    return Case(Qwen3ForCausalLM(Qwen3Config(**TINY, **COMMON)), prompts, 8, 32)


def half_b(layers, prompt, group, tokens):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(Qwen2Config(**HALF_B, num_hidden_layers=layers, **COMMON))
    torch.set_default_dtype(torch.float32)
    return Case(model, torch.randint(3, 1000, (1, prompt)).tolist(), group, tokens)


def once(function):
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turns(functions, rounds):
    """Median and best seconds of each, one call of each per round after a first one."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            times[name].append(once(function))
    return {
        name: {"median": statistics.median(t[1:]), "best": min(t[1:])} for name, t in times.items()
    }


def grown(case, past):
    """Rows of the case with `past` tokens of their own behind the prompt, and what they hold."""
    decoder = Decoder(case.model)
    rows = NativeRows(decoder, 0)
    prompts = case.prompts if past else [p[:1] for p in case.prompts]
    rows.add(prompts, [case.group] * len(prompts))
    for _ in range(past):
        rows.step(torch.full((case.rows,), 3))
    return rows


def kv_bytes(rows):
    """Bytes allocated for keys and values, and those of them that a step reads."""
    branches = rows._branches
    nodes = {id(n): n for b in branches for n in b.nodes}.values()
    slabs = {n.storage.untyped_storage().data_ptr(): n.storage.untyped_storage() for n in nodes}
    row = branches[0]
    token = row.nodes[0].storage[:, :, :, 0].numel() * row.nodes[0].storage.element_size()
    prompts = {id(b.nodes[0]): b.nodes[0].capacity for b in branches}
    own = sum(b.length + rows._taken - b.nodes[0].capacity for b in branches)
    return sum(s.nbytes() for s in slabs.values()), token * (sum(prompts.values()) + own)


@torch.no_grad()
def parts(case, rounds):
    """A step of all rows at full length and without a past, its lm-head, and prefills."""
    decoder, head = Decoder(case.model), lm_head(case.model)
    model, ids = backbone(case.model), case.ids[:1]
    full, fresh = grown(case, case.tokens), grown(case, 0)
    held, read = kv_bytes(full)
    layers = sum(p.numel() * p.element_size() for p in model.layers.parameters())
    memory = torch.ones(64 << 20)
    tokens, seeds, warm = torch.full((case.rows,), 3), torch.arange(case.rows), SamplingParams()
    times = in_turns(
        {
            "prefill": lambda: decoder.prefill(case.prompts[:1], 0),
            "HF prefill": lambda: model(ids, use_cache=True),
            "step": lambda: full.step(tokens),
            "step, no past": lambda: fresh.step(tokens),
            "lm-head": lambda: generation.draw(full.hidden, head, warm, seeds, seeds),
            "256 MB read": memory.sum,
        },
        rounds,
    )
    bytes_read = {
        "step": layers + read,
        "step, no past": layers,
        "lm-head": head.weight.numel() * head.weight.element_size(),
        "256 MB read": memory.numel() * 4,
    }
    return {
        "times": times,
        "bytes read": bytes_read,
        "KV bytes": held,
        "KV bytes replicated": read
        // (sum(len(p) + case.group * case.tokens for p in case.prompts))
        * case.rows
        * (len(case.prompts[0]) + case.tokens),
    }


@pytest.fixture(scope="module")
def tiny_case():
    case = tiny()
    case.check()
    return case


@pytest.mark.parametrize("name", ["fastrl", "HF, one prefill", "HF generate"])
def test_tiny(benchmark, tiny_case, name):
    benchmark.pedantic(tiny_case.variants()[name], rounds=5, warmup_rounds=1)


def show(case, report):
    tokens = case.rows * case.tokens
    fastest = report["rollout"]["fastrl"]["median"]
    for name, t in report["rollout"].items():
        print(
            f"{name:16s} {t['median'] * 1e3:9.1f} ms (best {t['best'] * 1e3:.1f})"
            f"  {tokens / t['median']:8.0f} tokens/s  {t['median'] / fastest:6.2f}x"
        )
    times, bytes_read = report["parts"]["times"], report["parts"]["bytes read"]
    for name, t in times.items():
        rate = f"{bytes_read[name] / t['best'] / 1e9:7.2f} GB/s" if name in bytes_read else ""
        print(f"{name:16s} {t['median'] * 1e3:9.2f} ms (best {t['best'] * 1e3:.2f})  {rate}")
    best = {name: t["best"] for name, t in times.items()}
    floor = bytes_read["step"] / bytes_read["256 MB read"] * best["256 MB read"]
    print(
        f"attention {(best['step'] - best['step, no past']) * 1e3:.2f} ms of a step; its floor "
        f"{floor * 1e3:.2f} ms; KV {report['parts']['KV bytes'] / 1e6:.1f} MB, replicated "
        f"{report['parts']['KV bytes replicated'] / 1e6:.1f} MB"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["tiny", "0.5b"])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--prompt", type=int, nargs="+", default=[512])
    parser.add_argument("--group", type=int, nargs="+", default=[16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64])
    parser.add_argument("--grid", action="store_true", help="the whole grid, for hours")
    parser.add_argument("--skip", nargs="+", default=[], help="variants to leave out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    o = parser.parse_args()
    grid = GRID if o.grid else (o.prompt, o.group, o.tokens)
    reports = []
    for prompt, group, tokens in [(9, 8, 32)] if o.model == "tiny" else product(*grid):
        case = tiny() if o.model == "tiny" else half_b(o.layers, prompt, group, tokens)
        case.check()
        variants = {name: f for name, f in case.variants().items() if name not in o.skip}
        report = {
            "device": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "settings": {"model": o.model, "layers": o.layers, "rounds": o.rounds}
            | {"prompt": prompt, "group": group, "tokens": tokens},
            "rollout": in_turns(variants, o.rounds),
            "parts": parts(case, 4 * o.rounds),
        }
        print(f"{o.model}: P={prompt}, G={group}, L={tokens}")
        show(case, report)
        reports.append(report)
        if o.json:
            o.json.write_text(json.dumps(reports, indent=2) + "\n")


if __name__ == "__main__":
    main()
