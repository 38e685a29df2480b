"""Learning from 64 demonstrations of a hidden expert: accuracy, and the reward that was recovered.

python -m fastrl.bench.inverse_rl runs/inverse-rl --json inverse-rl.json

The recipe `imitation` makes, for each seed, a policy from a crowd's answers, most of which are
wrong by one. Each method goes on from there with the same 64 answers of an expert and about the
same seconds of one core. The verifier only measures.

The recovered reward is judged on completions that no method saw, of held-out prompts, sampled from
the crowd's policy: the share of pairs of a right and a wrong completion of the same prompt that it
ranks rightly, and its correlation with the verifier within prompts. It is the discriminator's or
reward model's score; where a method has none, how much likelier its policy makes a completion than
the crowd's did (the implicit reward, 2305.18290).
"""

import argparse
import json
import os
from pathlib import Path
from statistics import mean, pstdev

import torch
from torch import Tensor, nn

from fastrl import models
from fastrl.bench.learning import Run, accuracy_curve, train_all
from fastrl.rollout import Engine, RolloutEngine, Rollouts, SamplingParams
from fastrl.train import loop
from fastrl.train.batches import Batch
from fastrl.train.scoring import Scorer, frozen_scores

SAMPLES = 16  # completions of each held-out prompt
# Recipe, settings and the network that holds the reward. The steps make the seconds about equal.
METHODS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "sft": ("imitation", (), "policy"),
    "sft, long": ("imitation", ("stages.sft.steps=600", "stages.sft.eval_every=50"), "policy"),
    "iqlearn": ("iqlearn", (), "policy"),
    "spin": ("spin", (), "policy"),
    "afd": ("afd", (), "reward"),
    "gail": ("gail", (), "discriminator"),
    "gail, classifier": ("gail", ("stages.gail.discriminator=separate",), "discriminator"),
    "airl": ("airl", (), "discriminator"),
    "fairl": ("fairl", (), "discriminator"),
}


class Judge:
    """Completions of held-out prompts by the crowd's policy, and which of them are right."""

    def __init__(self, crowd: Run):
        config = Run("imitation", crowd.seed, (), Path(), start=crowd).config()
        self.setup = setup = loop.prepare(config)
        sampling = SamplingParams(
            max_new_tokens=config.max_completion_length,
            eos_token_id=setup.tokenizer.eos_token_id,
            seed=crowd.seed,
        )
        self.sampling = sampling
        rollouts, self.right = self.sample(setup.engine)
        mask = rollouts.completion_mask
        self.batch = Batch(rollouts.prompt_ids, rollouts.completion_ids, mask, mask.float())
        self.before = self.logprobs(setup.policy)

    def sample(self, engine: Engine) -> tuple[Rollouts, Tensor]:
        """Completions of held-out prompts, and which are right `[prompts, SAMPLES]`."""
        setup = self.setup
        prompts = [e.prompt_ids for e in setup.held_out]
        rollouts = engine.generate(prompts, SAMPLES, self.sampling)
        scored = setup.rewards.score_rollouts(setup.held_out, rollouts, setup.tokenizer)
        return rollouts, torch.tensor(scored.total).view(-1, SAMPLES) >= 1

    def sampled_accuracy(self, folder: Path) -> float:
        """The share of right completions of a saved policy at temperature 1."""
        policy = models.load_model(str(folder))
        return float(self.sample(RolloutEngine(policy, self.setup.tokenizer))[1].double().mean())

    def logprobs(self, policy: nn.Module) -> Tensor:
        """Log-probs of the completions, `[prompts, SAMPLES]`."""
        logprobs = self.batch.frozen_logprobs(policy, 1024, shared_prefix=True)
        return torch.where(self.batch.completion_mask, logprobs, 0.0).sum(-1).view(-1, SAMPLES)

    def recovered(self, folder: Path) -> Tensor:
        """The reward that a saved network gives to the completions, `[prompts, SAMPLES]`."""
        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
        if "CausalLM" in architecture:
            return self.logprobs(models.load_model(str(folder))) - self.before
        scorer = models.load_scorer(str(folder))
        return frozen_scores(Scorer(scorer, None, True), self.batch, 1024).view(-1, SAMPLES)

    def judge(self, reward: Tensor) -> dict[str, float]:
        """Share of right-wrong pairs of a prompt that are ranked rightly, and the correlation."""
        pairs = self.right[:, :, None] & ~self.right[:, None, :]
        gaps = (reward[:, :, None] - reward[:, None, :])[pairs]
        gold = self.right.double() - self.right.double().mean(1, keepdim=True)
        ours = reward.double() - reward.double().mean(1, keepdim=True)
        correlation = (gold * ours).sum() / (gold.norm() * ours.norm()).clamp_min(1e-12)
        ranked = (gaps > 0).double().mean() + (gaps == 0).double().mean() / 2
        return {"ranked": float(ranked), "correlation": float(correlation)}


def spread(values: list[float], scale: float = 1.0) -> str:
    return f"{scale * mean(values):.3g} ± {scale * pstdev(values):.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the runs' folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    crowds = {
        seed: Run("imitation", seed, ("stages.sft=null",), options.out / f"crowd-seed{seed}")
        for seed in options.seeds
    }
    train_all(crowds.values(), options.jobs)
    runs = {}
    for method in options.methods:
        recipe, settings, _ = METHODS[method]
        for seed, crowd in crowds.items():
            folder = options.out / f"{method.replace(', ', '-').replace(' ', '-')}-seed{seed}"
            runs[method, seed] = Run(recipe, seed, settings, folder, start=crowd)
    train_all(runs.values(), options.jobs)
    judges = {seed: Judge(crowd) for seed, crowd in crowds.items()}
    starts = [accuracy_curve(crowd.metrics())[-1][1] for crowd in crowds.values()]
    print(
        "| method | greedy % | best greedy % | sampled % | pairs ranked rightly % | correlation | "
        "seconds |"
    )
    print("|---|---|---|---|---|---|---|")
    sampled = [float(judge.right.double().mean()) for judge in judges.values()]
    print(f"| crowd | {spread(starts, 100)} | | {spread(sampled, 100)} | | | |")
    report = {"crowd": {"accuracy": starts, "sampled": sampled}}
    for method in options.methods:
        rows = []
        for seed, judge in judges.items():
            run = runs[method, seed]
            network = METHODS[method][2]
            folder = run.folder / ("final" if network == "policy" else f"final-{network}")
            curve = [a for _, a in accuracy_curve(run.metrics())]
            seconds = sum(m["seconds"] for m in run.metrics())
            row = {"accuracy": curve[-1], "best": max(curve), "seconds": seconds, "curve": curve}
            row["sampled"] = judge.sampled_accuracy(run.folder / "final")
            rows.append(row | judge.judge(judge.recovered(folder)))
        report[method] = rows
        figures = {key: [row[key] for row in rows] for key in rows[0] if key != "curve"}
        print(
            f"| {method} | {spread(figures['accuracy'], 100)} | {spread(figures['best'], 100)} | "
            f"{spread(figures['sampled'], 100)} | "
            f"{spread(figures['ranked'], 100)} | {spread(figures['correlation'])} | "
            f"{mean(figures['seconds']):.0f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
