"""TRL's own trainers with and without `fastrl.patch("trl")`: ten steps of GRPO, RLOO and DPO.

python -m fastrl.bench.bench_patch [--vocabularies 151936 32] [--kinds grpo rloo dpo] [--json FILE]

Each run is a process of its own, for its peak memory, and plain and patched ones take turns. The
model is a Qwen3 of two layers of width 256 in float32, so the lm-head dominates at a large
vocabulary. The losses of the runs agree to 1e-4 before any time is printed. A step lasts from the
end of the one before to its own, generation included; the first two, with the comparisons of the
patch, are left out. `cpu` is the processor time of a step, which other processes disturb less.
Memory is the most that the process held during training, beyond what it held before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
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

    import torch
    import trl_runs
    from transformers import TrainerCallback

    import fastrl
    from fastrl.bench import measure

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    patch = fastrl.patch("trl") if variant == "patched" else contextlib.nullcontext()
    trl_runs.PROMPTS[:] = ["1+2-3+4-5+6-7+8-9+" * 2 + p for p in trl_runs.PROMPTS]
    options = {"learning_rate": 1e-5, "per_device_train_batch_size": 8}
    if kind != "dpo":
        options |= {"beta": 0.0, "max_completion_length": 16, "num_generations": 4}
    with TemporaryDirectory() as folder, patch:
        tokenizer = trl_runs.character_tokenizer(trl_runs.ALPHABET)
        size = {"vocab_size": vocabulary, **SHAPE}
        model = trl_runs.on_disk(Path(folder), tokenizer, **size)
        if kind == "dpo":
            trainer = trl_runs.preferences(Path(folder), steps, model=model, **options)
        else:
            trainer = trl_runs.sampler(kind, Path(folder), steps, model=model, **options)
        ends = [(time.perf_counter(), time.process_time())]

        class Clock(TrainerCallback):
            def on_step_end(self, *_, **__):
                ends.append((time.perf_counter(), time.process_time()))

        trainer.add_callback(Clock())
        memory, losses = measure.extra_memory(lambda: trl_runs.losses(trainer), torch.device("cpu"))
    clocks = [[b - a for a, b in pairwise(clock)][WARM_UP:] for clock in zip(*ends, strict=True)]
    return {
        "losses": [loss for loss, _ in losses],
        "wall": clocks[0],
        "cpu": clocks[1],
        "memory": memory,
    }


def in_a_process(threads: int, *task: object) -> dict:
    out = subprocess.run(
        [sys.executable, __file__, "--task", *map(str, task)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    if out.returncode:
        raise SystemExit(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


def compare(kind: str, vocabulary: int, options: argparse.Namespace) -> dict:
    """Medians of both variants, in turns; `SystemExit` where their losses differ."""
    runs: dict[str, list[dict]] = {v: [] for v in VARIANTS}
    for _ in range(options.rounds):
        for variant in VARIANTS:
            task = kind, vocabulary, variant, options.steps
            runs[variant].append(in_a_process(options.threads, *task))
    gap = max(
        abs(a - b)
        for one, other in zip(*runs.values(), strict=True)
        for a, b in zip(one["losses"], other["losses"], strict=True)
    )
    if not gap < 1e-4:
        raise SystemExit(f"{kind}, V={vocabulary}: losses differ by {gap:.2g}")
    row = {"kind": kind, "vocabulary": vocabulary, "loss_gap": gap}
    row |= {name: getattr(options, name) for name in ("steps", "rounds", "threads")}
    for variant, results in runs.items():
        for clock in ("wall", "cpu"):
            median = statistics.median(t for r in results for t in r[clock])
            row[f"{variant}_{clock}_ms"] = 1e3 * median
        row[f"{variant}_mb"] = min(r["memory"] for r in results) / 2**20
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[151936, 32])
    parser.add_argument("--kinds", nargs="+", default=["grpo", "rloo", "dpo"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--task", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        kind, vocabulary, variant, steps = options.task
        print(json.dumps(run(kind, int(vocabulary), variant, int(steps))))
        return
    from fastrl.bench import measure

    rows = []
    print("             V | wall ms: plain patched ratio | cpu ms: plain patched ratio | MB: plain")
    for vocabulary in options.vocabularies:
        for kind in options.kinds:
            row = compare(kind, vocabulary, options)
            rows.append(row)
            text = f"{kind:6}{vocabulary:8}"
            for clock in ("wall", "cpu"):
                plain, patched = (row[f"{v}_{clock}_ms"] for v in VARIANTS)
                text += f" |{plain:15.0f}{patched:8.0f}{plain / patched:6.2f}"
            text += f" |{row['plain_mb']:9.0f} patched {row['patched_mb']:.0f}"
            print(f"{text}, losses to {row['loss_gap']:.1g}", flush=True)
            if options.json:  # each time: a run takes long
                facts = {"machine": measure.machine(), "rows": rows}
                options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
