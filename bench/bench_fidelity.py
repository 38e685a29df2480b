"""Does the ranking survive quantization? Kendall tau and the rest, against float32.

fastrl train reward_model --out runs/reward-model               once
python -m fastrl.bench.bench_fidelity runs/reward-model [--json FOLDER]

The model is what the run's stage `reward` trained, the groups are the run's held-out rankings, by
the task's verifier. Prints a row for each scheme, plain and with what `fastrl` can do about it:
`smooth` (calibrated on half of the groups, which are then not judged) and the layers that the
report of the plain model proposes to keep in bf16; and for each the share of pairs that it ranks as
the verifier does.
"""

import argparse
from itertools import combinations
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastrl.models import load_tokenizer
from fastrl.reward import QuantizedRewardModel, fidelity_report
from fastrl.train import load_recipe
from fastrl.train.data import load_examples

SCHEMES = {
    "bf16": {},
    "int8": {},
    "int8, bf16 between": {"scheme": "int8", "activations": "bf16"},
    "fp8": {},
    "nf4": {},
    "nf4, products in bf16": {"scheme": "nf4", "compute": "bf16"},
    "int4": {},
    "int4, groups of 32": {"scheme": "int4", "group": 32},
}


def held_out(run: Path) -> list[dict]:
    """The held-out rankings of a run, best first, as token ids with the end that it trained on."""
    config = load_recipe(str(run / "config.yaml"))
    _, examples = load_examples(config, load_tokenizer(str(run / "final-reward")))
    return [{"prompt": e.prompt_ids, "completions": e.ranked_ids} for e in examples]


def right(model: QuantizedRewardModel, groups: list[dict]) -> float:
    """The share of pairs that a model ranks as the verifier does."""
    scores = [model.score([g["prompt"]] * len(g["completions"]), g["completions"]) for g in groups]
    pairs = [a > b for row in scores for a, b in combinations(row.tolist(), 2)]
    return sum(pairs) / len(pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a run of a recipe like reward_model")
    parser.add_argument("--schemes", nargs="*", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--groups", type=int, help="judge only this many")
    parser.add_argument("--json", type=Path, help="where to write the reports")
    options = parser.parse_args()
    groups = held_out(options.run)
    model_path = options.run / "final-reward"
    half = len(groups) // 2
    texts = [g["prompt"] + c for g in groups[:half] for c in g["completions"]]
    judged = groups[half:][: options.groups]
    reference = QuantizedRewardModel.from_pretrained(model_path, "float32")
    table = Table(
        title=f"against float32, {len(judged)} prompts of {len(judged[0]['completions'])}"
    )
    for column in (
        "scheme",
        "setting",
        "Kendall",
        "Spearman",
        "best of 8",
        "cosine",
        "noise/spread",
        "as verified",
        "MB",
    ):
        table.add_column(column)
    reports = {}

    def judge(name, setting, **arguments):
        scheme = arguments.pop("scheme", name)
        model = QuantizedRewardModel.from_pretrained(model_path, scheme, **arguments)
        report = fidelity_report(model, reference, judged)
        reports[f"{name} {setting}".strip()] = report
        figures = f"{report.kendall:.4f}", f"{report.spearman:.4f}", f"{report.best_of[8]:.1%}"
        more = f"{report.advantage_cosine:.5f}", f"{report.noise_to_spread:.4f}"
        more += (f"{right(model, judged):.1%}",)
        table.add_row(name, setting, *figures, *more, f"{model.nbytes / 2**20:.2f}")
        print(name, setting, *figures, *more, flush=True)
        return report

    print(f"float32 ranks {right(reference, judged):.1%} of pairs as the verifier does", flush=True)
    for name in options.schemes:
        given = SCHEMES[name]
        plain = judge(name, "", **given)
        if name == "bf16":
            continue
        judge(name, "smooth", smooth=texts, **given)
        if plain.keep_bf16:
            kept = plain.keep_bf16
            judge(name, f"keep_bf16: {len(kept)}", keep_bf16=kept, **given)
            judge(name, "both", keep_bf16=kept, smooth=texts, **given)
        print("  lowest signal to noise (dB):", end=" ")
        lowest = sorted(plain.layers, key=plain.layers.__getitem__)[:4]
        print(", ".join(f"{n} {plain.layers[n]:.1f}" for n in lowest), flush=True)
    Console().print(table)
    if options.json:
        options.json.mkdir(parents=True, exist_ok=True)
        for name, report in reports.items():
            report.save(options.json / f"{name.replace(' ', '-').replace(',', '')}.json")


if __name__ == "__main__":
    main()
