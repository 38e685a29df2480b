"""What each recipe does: the figures that its method is known by, before and after.

python -m fastrl.bench.effects runs/effects --json effects.json

Trains recipes at their own length, each a process of one thread, `--jobs` at a time, and prints a
table of one line each; runs that are there already are read. The warm start, supervised learning
of the default task, is trained once: what is before is what it left, or the first steps of a stage.
The GRPO family and PPO are in `fastrl.bench.learning`, learning from few demonstrations is in
`fastrl.bench.inverse_rl`.
"""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from fastrl import models
from fastrl.bench.learning import AVERAGED, Run, train_all, warm_start
from fastrl.reward.reasoning_gym import make_problems
from fastrl.train import Config, loop
from fastrl.train.batches import Batch, pad_batch
from fastrl.train.scoring import Scorer, frozen_scores

Change = tuple[float | None, float]  # before, where there is such a figure, and after


@dataclass(frozen=True)
class Figure:
    """A figure of a run: what it is called, where it is found, and in what it is counted.

    key is a metric, of the last stage where no other is named, or one of `Pairs`: `policy/...` of
    the policies before and after, `scores/...` of the reward model.
    """

    label: str
    key: str
    stage: str | None = None
    percent: bool = False

    def show(self, change: Change) -> str:
        before, after = (None if v is None else self._number(v) for v in change)
        values = after if before is None else f"{before} → {after}"
        return f"{self.label} {values}{' %' if self.percent else ''}"

    def _number(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.percent else f"{value:.3g}"


ACCURACY = Figure("greedy accuracy", "eval/accuracy", percent=True)
TOLD = Figure("pairs told apart", "policy/accuracy", percent=True)
MARGIN = Figure("log-ratio of a pair", "policy/margin")
CHOSEN = Figure("log-prob of the chosen", "policy/chosen")
REJECTED = Figure("of the rejected", "policy/rejected")
RANKED = Figure("held-out pairs ranked rightly", "scores/accuracy", percent=True)
CENTRE = Figure("mean score of a pair", "scores/centre")
FAMILY = (TOLD, MARGIN, CHOSEN, REJECTED, ACCURACY)


@dataclass(frozen=True)
class Effect:
    """A recipe with other settings, what is expected of it, and the figures that show it."""

    recipe: str
    expected: str
    figures: tuple[Figure, ...] = FAMILY
    settings: tuple[str, ...] = ()
    whole: bool = False  # it does not begin with the warm start of the default task


FLIPPED = ("data.reasoning_gym.flips=0.3", "stages.dpo.beta=0.5")  # as in robust_dpo
EFFECTS: dict[str, Effect] = {
    "dpo": Effect("dpo", "the margin grows without end, the chosen's likelihood falls too"),
    "ipo": Effect(
        "ipo",
        "the gap per token is drawn to 1 / (2 beta) = 2.5 above the warm start's",
        (TOLD, Figure("log-ratio per token", "policy/gap"), CHOSEN, ACCURACY),
    ),
    "slic": Effect("slic", "no push beyond the hinge, at a log-ratio of 1 / beta = 5 more"),
    "exo": Effect("exo", "as DPO, which it is at the optimum"),
    "rpo": Effect("rpo", "DPO's margin while the chosen's likelihood is held"),
    "kto": Effect("kto", "the same from completions judged one by one"),
    "simpo": Effect(
        "simpo",
        "the gap per token passes gamma / beta = 0.5, without a reference",
        (TOLD, Figure("log-ratio per token", "policy/gap"), CHOSEN, ACCURACY),
    ),
    "orpo": Effect("orpo", "the chosen becomes likelier and the rejected less, in one stage"),
    "robust_dpo": Effect(
        "robust_dpo", "three in ten pairs are the wrong way round: the margin grows all the same"
    ),
    "dpo, flipped": Effect(
        "dpo",
        "the same pairs without the correction: the log-ratio stops log(0.7 / 0.3) / beta = 1.7 "
        "above the warm start's",
        settings=FLIPPED,
    ),
    "iterated_dpo": Effect(
        "iterated_dpo",
        "own samples correct own mistakes: above DPO on data",
        (Figure("reward of samples", "reward", percent=True), ACCURACY),
    ),
    "reward": Effect(
        "reward",
        "a reward model that ranks held-out answers; without a KL a policy soon over-optimises it",
        (
            RANKED,
            CENTRE,
            Figure("learned reward", "reward"),
            Figure("its correlation with the verifier", "gold_correlation"),
            ACCURACY,
        ),
    ),
    "reward, alone": Effect(
        "reward", "the reward model without the policy", (RANKED, CENTRE), ("stages.grpo=null",)
    ),
    "reward, not centred": Effect(
        "reward",
        "ranks as well, but scores are free to drift",
        (RANKED, CENTRE),
        ("stages.reward.centering=0", "stages.grpo=null"),
    ),
    "reward, classification": Effect(
        "reward",
        "orders as Bradley-Terry does, each answer judged by itself",
        (RANKED, CENTRE),
        ("stages.reward.loss=classification", "stages.reward.centering=0", "stages.grpo=null"),
    ),
    "reward_model": Effect(
        "reward_model",
        "eight answers ranked as the verifier grades them (Plackett-Luce)",
        (
            Figure("pairs of a training batch", "accuracy", percent=True),
            Figure("held-out pairs", "eval/pair_accuracy", percent=True),
        ),
        whole=True,
    ),
    "raft": Effect(
        "raft",
        "likelier answers become likelier: accuracy up, entropy down",
        (ACCURACY, Figure("entropy", "entropy"), Figure("reward", "reward", percent=True)),
    ),
    "distillation": Effect(
        "distillation",
        "a new policy comes near its teacher in reverse KL and accuracy",
        (
            Figure("KL per token", "loss"),
            Figure("teacher's → student's accuracy", "eval/accuracy", percent=True),
        ),
        whole=True,
    ),
    "hf_grpo": Effect(
        "hf_grpo",
        "a checkpoint, prompts from a file and a reward of one's own, by LoRA: the reward rises",
        (Figure("reward", "reward", percent=True), Figure("entropy", "entropy")),
    ),
}


class Pairs:
    """Held-out pairs of a right and a wrong completion."""

    def __init__(self, config: Config):
        setup = loop.prepare(config)
        pairs = [e.ranked_ids or [] for e in setup.held_out]
        prompts = [e.prompt_ids for e in setup.held_out for _ in range(2)]
        completions = [c for best, *_, worst in pairs for c in (best, worst)]
        prompts, ids, mask = pad_batch(prompts, completions, setup.device)
        self.batch = Batch(prompts, ids, mask, mask.float(), 2)
        self.shared_prefix = setup.shared_prefix

    def figures(self, policy: Path) -> dict[str, float]:
        """What a saved policy makes of the pairs: log-probs in nats, means over pairs."""
        model = models.load_model(str(policy))
        mask = self.batch.completion_mask
        logprobs = self.batch.frozen_logprobs(model, 1024, shared_prefix=self.shared_prefix)
        sums = torch.where(mask, logprobs, 0.0).double().sum(-1)
        averages = sums / mask.sum(-1)
        chosen, rejected = sums[::2], sums[1::2]
        return {
            "policy/accuracy": float((chosen > rejected).double().mean()),
            "policy/margin": float((chosen - rejected).mean()),
            "policy/gap": float((averages[::2] - averages[1::2]).mean()),
            "policy/chosen": float(chosen.mean()),
            "policy/rejected": float(rejected.mean()),
        }

    def scores(self, reward: Path) -> dict[str, float]:
        """What a saved reward model makes of the pairs."""
        scorer = Scorer(models.load_scorer(str(reward)), None, self.shared_prefix)
        chosen, rejected = frozen_scores(scorer, self.batch, 1024).double().view(-1, 2).unbind(1)
        return {
            "scores/accuracy": float((chosen > rejected).double().mean()),
            "scores/centre": float((chosen + rejected).mean() / 2),
        }


def change(history: list[dict], figure: Figure) -> Change:
    """A metric before and after a stage.

    Of one that each step logs the mean over the stage's first steps and over its last. A held-out
    one is what it was last in an earlier stage, if one has it, and at the end of the stage.
    """
    stages = list(dict.fromkeys(m["stage"] for m in history))
    stage = figure.stage or stages[-1]
    earlier = stages[: stages.index(stage)]
    values = [m[figure.key] for m in history if m["stage"] == stage and figure.key in m]
    if not values:
        raise KeyError(f"stage {stage!r} logged no {figure.key!r}")
    if not figure.key.startswith("eval/"):
        return mean(values[:AVERAGED]), mean(values[-AVERAGED:])
    before = [m[figure.key] for m in history if m["stage"] in earlier and figure.key in m]
    return (before[-1] if before else None), values[-1]


def measure(run: Run, effect: Effect, pairs: Pairs | None) -> dict[str, Change]:
    """The figures of a run that is complete."""
    kinds = {figure.key.partition("/")[0] for figure in effect.figures}
    history = run.history()
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    if pairs is not None and run.start is not None and "policy" in kinds:
        before = pairs.figures(run.start.folder / "final")
        after = pairs.figures(run.folder / "final")
    if pairs is not None and "scores" in kinds:
        after |= pairs.scores(run.folder / "final-reward")
    return {
        f.label: (before.get(f.key), after[f.key]) if f.key in after else change(history, f)
        for f in effect.figures
    }


def row(name: str, effect: Effect, found: dict[str, Change], seconds: float) -> str:
    """A line of the table."""
    shown = "; ".join(figure.show(found[figure.label]) for figure in effect.figures)
    return f"| `{name}` | {effect.expected} | {shown} | {seconds:.0f} |"


def prompts_file(folder: Path, start: Run) -> tuple[str, ...]:
    """Settings by which `hf_grpo` learns the default task, from a file, on the warm start.

    A model of a million parameters needs a larger step than one of half a billion.
    """
    gym = start.config().data.reasoning_gym
    assert gym is not None
    rows, _ = make_problems(gym.task, gym.options, gym.size, gym.eval_size, gym.seed, gym.prompt)
    path = folder / "prompts.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": r["prompt"], "answer": r["completion"]}) for r in rows]
    path.write_text("\n".join(lines) + "\n")
    return (
        f"data.train_file={path.absolute()}",
        "rewards.0.function=fastrl.bench.effects:exact",
        "max_completion_length=5",
        "stages.grpo.prompts_per_step=32",
        "stages.grpo.micro_batch_size=256",
        "stages.grpo.optimizer.lr=1e-3",
        "rollout_rows=256",
    )


def exact(prompts, completions, answer, **_) -> list[float]:
    """A reward function: 1 for the answer, 0 for all else."""
    return [float(c.strip() == a) for c, a in zip(completions, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the runs' folder")
    parser.add_argument("--effects", nargs="+", choices=EFFECTS, default=list(EFFECTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="a setting of every recipe")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="gains the figures; what else it holds stays")
    options = parser.parse_args()
    start = warm_start("arithmetic", options.seed, tuple(options.set), options.out)
    assert start is not None
    runs = {}
    for name in options.effects:
        effect = EFFECTS[name]
        settings = effect.settings
        if effect.recipe == "hf_grpo":
            settings += prompts_file(options.out, start)
        runs[name] = Run(
            effect.recipe,
            options.seed,
            (*settings, *options.set),
            options.out / f"{name.replace(', ', '-')}-seed{options.seed}",
            None if effect.whole else start,
        )
    train_all(runs.values(), options.jobs)
    report = {}
    if options.json is not None and options.json.exists():
        report = json.loads(options.json.read_text())
    pairs = None
    print("| recipe | expected | before → after | seconds |")
    print("|---|---|---|---|")
    for name, run in runs.items():
        effect = EFFECTS[name]
        if pairs is None and any(f.key.startswith(("policy/", "scores/")) for f in effect.figures):
            pairs = Pairs(Run("dpo", options.seed, (), options.out, start).config())
        found = measure(run, effect, pairs)
        seconds = sum(m["seconds"] for m in run.metrics())
        print(row(name, effect, found, seconds), flush=True)
        report[name] = {
            "recipe": effect.recipe,
            "seed": options.seed,
            "settings": list(effect.settings),
            "steps": len(run.metrics()),
            "figures": found,
            "seconds": seconds,
        }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
