"""linear_logprob on a CPU against eager PyTorch, torch.compile and the fused losses of others.

python -m pytest bench/bench_logprob.py       pytest-benchmark's table, one small shape
python bench/bench_logprob.py --grid issue    checked, timed in turns, memory measured, as JSON
python bench/bench_logprob.py --help          grids, and how to bound what is run

Every point runs in processes of its own (point.py). A variant is timed only after its results agree
with float64 (accuracy.py). The gradient is that of the sum of the log-probs, and entropies.
"""

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path

import peak
import pytest
import race
from baselines import NO_ENTROPY, OURS, VARIANTS, counted, missing

TOKENS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 16384)
WIDTHS = (896, 2048, 4096)
VOCABS = (32000, 128256, 151936, 256000)
BOTH_DTYPES = ("bfloat16", "float32")

# Shapes (tokens, width, vocab), and the defaults of --dtype, --entropy and --ignored.
GRIDS = {
    "small": ([(1, 896, 32000), (16, 896, 32000), (256, 896, 32000)], BOTH_DTYPES, "both", (0, 50)),
    "issue": ([(2048, 896, 151936), (16, 896, 151936)], BOTH_DTYPES, "no", (0, 50)),
    "full": (list(itertools.product(TOKENS, WIDTHS, VOCABS)), BOTH_DTYPES, "both", (0, 50, 90)),
    "peers": (
        [(252, 128, 507), (1530, 2048, 32256), (2169, 896, 151936), (1937, 3584, 152064)],
        BOTH_DTYPES,
        "no",
        (0,),
    ),
}


def bounds(point: dict, report: dict) -> dict[str, dict[str, float]]:
    """Seconds of the floor, and of our operations alone at the peak, forward and both."""
    tokens, width, vocab = point["shape"]
    kept = counted(tokens, point["ignored"])
    share = min(1.0, report["workspace_mb"] * 2**20 / (2.25 * kept * vocab))
    where = (report["peaks"], report["isa"], report["threads"])
    rate = peak.flops(*where, point["dtype"])
    shape = (kept, width, vocab)
    return {
        mode: {
            "floor": peak.floor(*where, shape, point["dtype"], mode == "both", share),
            "operations": peak.operations(*shape, mode == "both", share) / rate,
        }
        for mode in ("forward", "both")
    }


def describe(point: dict) -> str:
    n, h, v = point["shape"]
    ignored = f", {point['ignored']:.0%} ignored" if point["ignored"] else ""
    return f"N={n} H={h} V={v} {point['dtype']}{', entropy' if point['entropy'] else ''}{ignored}"


def show(result: dict):
    """Prints a point."""
    found = result["variants"]
    base = found.get(OURS, {})
    if "failed" in result:
        print(f"  FAILED: {result['failed']}")
    for name, of in found.items():
        if "skipped" in of or "failed" in of:
            print(f"  {name:30s} {'; '.join(of[k] for k in ('skipped', 'failed') if k in of)}")
            continue
        text = f"  {name:30s}"
        for mode in ("forward", "both"):
            if mode not in of:
                continue
            median = of[mode]["median"]
            text += f" {mode} {median * 1e3:10.2f} ms"
            if mode in base:
                text += f" ({median / base[mode]['median']:5.2f}x)"
            if "extra_mb" in of:
                text += f" {of['extra_mb'][mode]:+7.0f} MB"
        if "errors" in of:
            text += f"  error {max(of['errors'].values()):.1e}"
        if result["entropy"] and name in NO_ENTROPY:
            text += "  (without entropy)"
        print(text)
    for mode, least in result.get("bounds", {}).items():
        if mode in base:
            took = base[mode]["median"]
            print(
                f"  {OURS} {mode}: {least['operations'] / took:.0%} of the peak, "
                f"{took / least['floor']:.2f} times the floor of {least['floor'] * 1e3:.2f} ms"
            )
    everything = found.get(f"{OURS}, none ignored", {})
    for mode in ("forward", "both"):
        if mode in everything and mode in base:
            tokens = result["shape"][0]
            share = counted(tokens, result["ignored"]) / tokens * everything[mode]["median"]
            print(
                f"  {OURS} {mode}: {base[mode]['median'] / share:.2f} times its share of the rows"
            )


def points(options) -> list[dict]:
    """Smallest first, so that a limit leaves out the largest."""
    shapes, dtypes, entropy, ignored = GRIDS[options.grid]
    shapes = options.only or shapes
    wanted = {"no": (False,), "yes": (True,), "both": (False, True)}[options.entropy or entropy]
    axes = (shapes, options.dtype or dtypes, wanted, options.ignored or ignored)
    found = [
        {"shape": list(s), "dtype": d, "entropy": e, "ignored": i / 100}
        for s, d, e, i in itertools.product(*axes)
    ]
    return sorted(found, key=race.size)


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--grid", choices=GRIDS, default="small")
    add(
        "--only", action="append", type=_shape, metavar="N,H,V", help="instead of the grid's shapes"
    )
    add("--dtype", nargs="+", choices=(*BOTH_DTYPES, "float16"), help="instead of the grid's")
    add("--entropy", choices=("no", "yes", "both"), help="instead of the grid's")
    add("--ignored", nargs="+", type=int, help="per cent of the rows, instead of the grid's")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--rounds", type=int, default=5, help="of each variant, fewer where they do not fit")
    add("--limit-seconds", type=float, default=float("inf"), help="no point starts after these")
    add("--point-seconds", type=float, default=120.0, help="for the rounds of a point, and at most "
        "for a variant's first call")  # fmt: skip
    add("--pause-ms", type=float, default=10.0, help="before each call; 0 for what OpenMP's "
        "spinning threads do to the next one")  # fmt: skip
    add("--isa", choices=race.CAPPED, help="for ours and for PyTorch; the best without")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--workspace-mb", type=float, help="of linear_logprob; its own default without")
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure it too")
    add("--peak", action=argparse.BooleanOptionalAction, default=True, help="measure it first")
    add("--json", type=Path, help="where to write the figures, after every point")
    add("--resume", action="store_true", help="keep what the JSON file has and run the rest")
    return parser.parse_args(arguments)


def _shape(text: str) -> tuple[int, int, int]:
    n, h, v = map(int, text.split(","))
    return n, h, v


def main():
    options = parse()
    env, end = (
        race.environment(options.isa, options.threads),
        time.monotonic() + options.limit_seconds,
    )
    report = race.start(options, env)
    if options.resume and options.json and options.json.exists():
        before = json.loads(options.json.read_text())
        same = ("machine", "versions", "environment", "isa", "workspace_mb", "pause_ms")
        if any(before[k] != report[k] for k in same):
            raise SystemExit(f"{options.json} is of another machine, version or setting")
        report["points"] = before["points"]
        report["command"] = before["command"] + "; " + report["command"]
    print(f"{report['machine']['cpu']}, {report['isa']}, {report['threads']} threads, {env}")
    print(peak.table(report["peaks"]) if report["peaks"] else "no peak measured")
    for name, why in report["missing"].items():
        print(f"{name}: {why}")
    variants = [v for v in options.variants if v not in report["missing"]]
    wanted = points(options)
    done = [{k: p[k] for k in wanted[0]} for p in report["points"]]
    slow: dict[tuple[str, str], int] = {}
    for point in (p for p in wanted if p not in done):
        print(describe(point), flush=True)
        if time.monotonic() > end:
            print("  skipped: --limit-seconds are over")
            continue
        result = race.run_point(point, variants, slow, options, env)
        if report["peaks"] and report["isa"]:
            result["bounds"] = bounds(point, report)
        show(result)
        report["points"].append(result)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    wrong = [
        p for p in report["points"] if "failed" in p or "failed" in p["variants"].get(OURS, {})
    ]
    for point in wrong:
        print(f"FAILED: {describe(point)}")
    return bool(wrong)


@pytest.mark.parametrize("name", VARIANTS)
def test_linear_logprob(benchmark, name):
    import accuracy
    import point

    if missing(name):
        pytest.skip(missing(name))
    *inputs, _ = point.draw(64, 128, 2003, "bfloat16")
    function = VARIANTS[name]
    _, wrong = point.checked(name, function, inputs, False, accuracy.truth(*inputs, False))
    assert wrong is None, wrong
    call = (function, *inputs, False)
    benchmark.pedantic(point.both, args=call, rounds=20, warmup_rounds=2)


if __name__ == "__main__":
    sys.exit(main())
