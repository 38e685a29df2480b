"""TRL's own trainers with and without `fastrl.patch("trl")`: ten steps of GRPO, RLOO and DPO.

python bench/bench_patch.py [--vocabularies 151936 32] [--kinds grpo rloo dpo] [--json FILE]

Each run is a process of its own, for its peak memory, and plain and patched ones take turns. The
model is a Qwen3 of two layers of width 256 in float32, so the lm-head dominates at a large
vocabulary. The losses of the runs agree to 1e-4 before any time is printed. A step lasts from the
end of the one before to its own, generation included; the first two, with the comparisons of the
patch, are left out. Memory is the most that the process held during training, beyond what it held
before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
WARM_UP = 2
VARIANTS = ("plain", "patched")


def run(kind: str, vocabulary: int, variant: str, steps: int) -> dict:
    """Train once, in this process."""
    import contextlib

    import measure
    import torch
    import trl_runs
    from transformers import TrainerCallback

    import fastrl

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    patch = fastrl.patch("trl") if variant == "patched" else contextlib.nullcontext()
    trl_runs.PROMPTS[:] = ["1+2-3+4-5+6-7+8-9+" * 4 + p for p in trl_runs.PROMPTS]
    options = {"learning_rate": 1e-5, "beta": 0.0, "max_completion_length": 32}
    if kind == "dpo":
        options = {"learning_rate": 1e-5}
    with TemporaryDirectory() as folder, patch:
        tokenizer = trl_runs.character_tokenizer(trl_runs.ALPHABET)
        size = {"vocab_size": vocabulary, **SHAPE}
        model = trl_runs.on_disk(Path(folder), tokenizer, **size)
        if kind == "dpo":
            trainer = trl_runs.preferences(Path(folder), steps, model=model, **options)
        else:
            options["num_generations"] = 8
            trainer = trl_runs.sampler(kind, Path(folder), steps, model=model, **options)
        ends = [time.perf_counter()]

        class Clock(TrainerCallback):
            def on_step_end(self, *_, **__):
                ends.append(time.perf_counter())

        trainer.add_callback(Clock())
        before = measure.resident()
        peak, losses = measure.peak_of(lambda: trl_runs.losses(trainer))
    seconds = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    return {
        "losses": [loss for loss, _ in losses],
        "seconds": seconds[WARM_UP:],
        "memory": peak - before,
    }


def in_a_process(*task: str) -> dict:
    out = subprocess.run(
        [sys.executable, __file__, "--task", *task],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "2"} | os.environ,
    )
    if out.returncode:
        raise SystemExit(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[151936, 32])
    parser.add_argument("--kinds", nargs="+", default=["grpo", "rloo", "dpo"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--task", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        kind, vocabulary, variant, steps = options.task
        print(json.dumps(run(kind, int(vocabulary), variant, int(steps))))
        return
    figures = []
    print(f"{'':6}{'V':>8}{'plain ms':>10}{'patched':>9}{'ratio':>7}{'plain MB':>10}{'patched':>9}")
    for vocabulary in options.vocabularies:
        for kind in options.kinds:
            runs = {v: [] for v in VARIANTS}
            for _ in range(options.rounds):
                for variant in VARIANTS:
                    runs[variant].append(
                        in_a_process(kind, str(vocabulary), variant, str(options.steps))
                    )
            gaps = [
                abs(a - b)
                for one, other in zip(*runs.values(), strict=True)
                for a, b in zip(one["losses"], other["losses"], strict=True)
            ]
            if not max(gaps) < 1e-4:
                raise SystemExit(f"{kind}, V={vocabulary}: losses differ by {max(gaps):.2g}")
            ms = {
                v: 1e3 * statistics.median(t for r in runs[v] for t in r["seconds"])
                for v in VARIANTS
            }
            mb = {v: min(r["memory"] for r in runs[v]) / 2**20 for v in VARIANTS}
            figures.append(
                {"kind": kind, "vocabulary": vocabulary, "gap": max(gaps), "ms": ms, "mb": mb}
            )
            print(
                f"{kind:6}{vocabulary:8}{ms['plain']:10.0f}{ms['patched']:9.0f}"
                f"{ms['plain'] / ms['patched']:7.2f}{mb['plain']:10.0f}{mb['patched']:9.0f}",
                flush=True,
            )
    if options.json:
        import measure

        facts = {"machine": measure.machine(), "runs": figures}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
