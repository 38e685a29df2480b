"""What to choose for linear_logprob on a GPU: triton or cuda, and the sizes of Triton's tiles.

python -m fastrl.bench.bench_logprob_gpu --table [--json FILE]   triton against cuda over the grid,
                                                  and the rows of kernels/logprob/measured.py
python -m fastrl.bench.bench_logprob_gpu --tiles [--json FILE]   sizes of the Triton kernels' tiles

The race itself, against others, is `fastrl bench logprob --device cuda`.
"""

import argparse
import importlib.metadata
import json
import statistics
from functools import partial
from pathlib import Path

import torch

from fastrl.bench import measure
from fastrl.bench.bench_logprob import RACE, point
from fastrl.bench.race import BOTH, describe
from fastrl.kernels.logprob import measured

CUDA = torch.device("cuda")
WIDTHS = ((896, 151936), (2048, 32000), (2048, 128256), (4096, 131072), (4096, 256000))
GRID = {"bfloat16": WIDTHS, "float16": WIDTHS[1:4:2], "float32": WIDTHS[:2]}
TOKENS = (256, 2048, 8192)  # of each row of the table
GAIN = 1.05  # cuda has to be so much faster: it does not keep a row's bits from batch to batch
TILES = [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4)]


def medians(shape, names, rounds):
    """Median seconds of forward and backward, in turns, of those that are right and run here."""
    inputs, calls = RACE.draw(shape, CUDA), {}
    for name in names:
        variant = RACE.variants(CUDA)[name]
        try:
            verdict = RACE.gate(variant, inputs, shape)
        except Exception as error:  # what cannot do this shape is reported, not hidden
            print(f"  {name} failed: {type(error).__name__}: {error}".splitlines()[0][:160])
            continue
        if verdict.wrong:
            print(f"  {name} is wrong: {verdict.wrong}")
            continue
        calls[name] = partial(measure.seconds, RACE.call(variant, inputs, BOTH), CUDA)
        calls[name]()
    found = measure.take_turns(calls, dict.fromkeys(calls, rounds))
    print(describe(shape), {name: f"{1e3 * t['median']:.2f} ms" for name, t in found.items()})
    return {name: t["median"] for name, t in found.items()}


def table(rounds):
    """A row per dtype and head: the faster of ours by the geometric mean over numbers of tokens."""
    both = ("fastrl triton", "fastrl cuda")
    names = [n for n in both if n in RACE.variants(CUDA)]
    for dtype, heads in GRID.items():
        for h, v in heads:
            ratios = []
            for n in TOKENS:
                shape = RACE.complete(point(n, h, v, dtype, entropy=True))
                found = medians(shape, names, rounds)
                if len(found) == 2:
                    ratios.append(found[both[0]] / found[both[1]])
            if ratios:
                gain = statistics.geometric_mean(ratios)
                row = measured.Row(dtype, h, v, "cuda" if gain > GAIN else "triton")
                print(f"    {row!r},  # triton / cuda {gain:.2f}")
                yield row._asdict() | {"triton_over_cuda": ratios, "tokens": TOKENS}


def tiles(rounds):
    from fastrl.kernels.logprob import triton_launch as t

    before = t.ENGINE
    for given in (RACE.cuda[0], RACE.cuda[3]):
        shape = RACE.complete(given)
        for sizes in TILES:
            t.ENGINE = t.Tile(*sizes)
            print(sizes, end=" ")
            yield {"shape": shape, "tile": sizes, "both": medians(shape, ["fastrl triton"], rounds)}
    t.ENGINE = before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--rounds", type=int, default=5)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", action="store_true", help="rows for kernels/logprob/measured.py")
    what.add_argument("--tiles", action="store_true", help="sizes of the Triton kernels' tiles")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; fastrl bench logprob is for the CPU too")
    work = table if options.table else tiles
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        work.__name__: [],
    }
    for figures in work(options.rounds):
        report[work.__name__].append(figures)
        if options.json:  # every time: who runs out of time keeps what was measured
            options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
