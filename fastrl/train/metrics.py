"""What a run logs, in words: the report and the documentation show these lines."""

from typing import NamedTuple


class Metric(NamedTuple):
    """What a metric is, its unit, who logs it, and what a healthy run shows."""

    what: str
    unit: str
    of: str
    healthy: str = ""

    def sentence(self) -> str:
        """In a report, where it is plain who logged it."""
        unit = f" ({self.unit})" if self.unit else ""
        healthy = f" Healthy: {self.healthy}." if self.healthy else ""
        return f"{self.what[0].upper()}{self.what[1:]}{unit}.{healthy}"


SAMPLING = "all that sample"
GRADIENTS = "policy gradients: `grpo` and its family, `ppo`, `gail`, `airl`, `fairl`"
PAIRS = "`dpo` and its family, `spin`"
ADVERSARIAL = "`gail`, `airl`, `fairl` (`discriminator/...`), `afd`"

# In the order in which a report shows them. What is logged of a critic's or a discriminator's own
# update has its prefix (`critic/loss`) and is here without.
METRICS = {
    "eval/accuracy": Metric(
        "held-out prompts whose greedy completion is right: the first reward function gives it at "
        "least 1, or the first reward model with a `threshold` does",
        "share",
        "stages that train the policy, every `eval_every` steps",
        "rises; its standard error is `sqrt(p (1 - p) / prompts)`",
    ),
    "eval/reward": Metric(
        "mean weighted reward of greedy completions of the held-out prompts",
        "reward",
        "stages that train the policy, every `eval_every` steps",
        "rises with `reward`; where that one alone does, the training prompts are learned by heart",
    ),
    "eval/pair_accuracy": Metric(
        "held-out rankings whose best completion the reward model scores above the worst",
        "share",
        "`reward`, every `eval_every` steps",
        "above 0.5, which is chance",
    ),
    "eval/nll": Metric(
        "negative log-likelihood of held-out demonstrations, per token",
        "nats",
        "`sft`, `iqlearn`, every `eval_every` steps",
        "falls; rising under a falling `nll` is overfitting",
    ),
    "reward": Metric(
        "mean of the step's rewards as optimised: of functions weighted and summed, or of the "
        "scoring model that a stage names; `distillation` only looks on",
        "reward",
        "all that sample and have rewards",
        "rises, noisily",
    ),
    "reward/NAME": Metric(
        "mean of one reward function or model of the recipe, before its weight",
        "reward",
        "all that sample and have rewards, but `distillation` and pairs of own samples",
    ),
    "reward_std": Metric(
        "standard deviation of rewards in a group, averaged over groups; of the whole batch where "
        "a group is one completion",
        "reward",
        "all that sample and have rewards",
        "above 0: without differences nothing is learned",
    ),
    "zero_std_groups": Metric(
        "groups whose rewards are all equal, so that their advantages are 0 and they teach nothing",
        "share",
        "all that sample groups and have rewards",
        "well below 1; near 1 the prompts are too easy or too hard, or groups too small",
    ),
    "best_reward": Metric(
        "mean reward of the best completion of each group", "reward", "`raft`", "above `reward`"
    ),
    "gold_reward": Metric(
        "mean reward of the recipe's functions where a learned reward is optimised instead",
        "reward",
        "stages with a scoring model as reward; `gail`, `airl`, `fairl`",
        "rises with `reward`; where it falls, the learned reward is being exploited",
    ),
    "gold_correlation": Metric(
        "correlation of learned rewards with those of the functions, over the step's samples; 0 "
        "where either is constant",
        "-1 to 1",
        "as `gold_reward`",
        "well above 0",
    ),
    "loss": Metric(
        "what the step minimised, all terms included",
        "the algorithm's",
        "all",
        "of likelihoods, pairs and rankings falls; of policy gradients is often near 0 and says "
        "nothing about progress",
    ),
    "nll": Metric(
        "negative log-likelihood of the completions learned from, per token",
        "nats",
        "`sft`, `iqlearn`, `raft`, `rpo`",
        "falls",
    ),
    "accuracy": Metric(
        "training pairs (of rankings: all pairs of them) whose better completion has the higher "
        "score or implied reward",
        "share",
        f"`reward`, {PAIRS}, but `kto`",
        "above 0.5 and rising; 1 at once says that the pairs are too easy",
    ),
    "margin": Metric(
        "score or implied reward of the better completion less that of the worse",
        "nats, times `beta`",
        f"`reward` with `loss: bradley_terry`, {PAIRS}, but `kto`",
        "positive, rising",
    ),
    "chosen_reward": Metric(
        "implied reward `beta log pi/pi_ref` of the better completion (without a reference: "
        "`beta log pi`)",
        "nats, times `beta`",
        f"{PAIRS}, but `kto`",
        "above `rejected_reward`; that it falls, more slowly, is common",
    ),
    "rejected_reward": Metric(
        "implied reward of the worse completion",
        "nats, times `beta`",
        f"{PAIRS}, but `kto`",
        "falls",
    ),
    "desirable_reward": Metric(
        "implied reward of desirable completions", "nats, times `beta`", "`kto`", "rises"
    ),
    "undesirable_reward": Metric(
        "implied reward of undesirable completions", "nats, times `beta`", "`kto`", "falls"
    ),
    "reference_point": Metric(
        "KTO's z0: how far the policy has moved from the reference on mismatched completions, at "
        "least 0",
        "nats",
        "`kto`",
        "small beside `desirable_reward / beta`",
    ),
    "log_odds_ratio": Metric(
        "log of the odds of the better completion over those of the worse",
        "nats",
        "`orpo`",
        "positive, rising",
    ),
    "pairs": Metric(
        "groups of own samples with a difference, of which best and worst make a pair",
        "pairs",
        "`dpo` and its family with `pairs: samples`",
        "above 0; at most `batch_size`",
    ),
    "iq_reward": Metric(
        "reward that the logits imply, `Q - gamma V'`, per token", "nats", "`iqlearn`"
    ),
    "iq_penalty": Metric(
        "square of `iq_reward` over `4 alpha`, the regulariser", "nats", "`iqlearn`", "bounded"
    ),
    "distillation": Metric(
        "divergence between teacher and policy on own samples, per token",
        "nats",
        "`distillation`",
        "falls towards 0",
    ),
    "demo_accuracy": Metric(
        "demonstrations (of `afd`: what is to be imitated) that the discriminator takes for such",
        "share",
        ADVERSARIAL,
        "between 0.5 and 1; both at 1 for long: the policy has no gradient to follow",
    ),
    "policy_accuracy": Metric(
        "samples that the discriminator takes for samples",
        "share",
        ADVERSARIAL,
        "falls towards 0.5 as the policy becomes like the demonstrations",
    ),
    "demo_logit": Metric(
        "mean logit of the discriminator on demonstrations", "nats", ADVERSARIAL, "above 0"
    ),
    "policy_logit": Metric(
        "mean logit of the discriminator on samples", "nats", ADVERSARIAL, "below `demo_logit`"
    ),
    "value_loss": Metric(
        "half the squared error of the critic's values, clipped",
        "reward squared",
        "`ppo` (`critic/...`)",
        "falls, then follows the rewards' variance",
    ),
    "value_error": Metric(
        "mean of returns less values", "reward", "`ppo` (`critic/...`)", "around 0"
    ),
    "value_clip_fraction": Metric(
        "tokens whose value is held near the old one",
        "share",
        "`ppo` (`critic/...`)",
        "below about 0.2",
    ),
    "entropy": Metric(
        "entropy of the policy per sampled token, estimated as the mean of `-log p`",
        "nats",
        SAMPLING,
        "falls slowly; near 0 early on, samples are all alike and learning ends",
    ),
    "entropy_exact": Metric(
        "entropy of the policy per sampled token, over the whole vocabulary",
        "nats",
        "policy gradients with `entropy_coef`",
    ),
    "completion_length": Metric(
        "mean length of samples, end token included", "tokens", SAMPLING, "no drift to the limit"
    ),
    "truncated": Metric(
        "samples cut off at `max_completion_length`",
        "share",
        SAMPLING,
        "near 0; an answer that is cut off is rarely right",
    ),
    "sampled_batches": Metric(
        "batches sampled until enough groups differed", "batches", "`dynamic_sampling`", "near 1"
    ),
    "kl": Metric(
        "KL of the policy to the reference per token, by `kl_estimator`",
        "nats",
        "policy gradients with `kl_coef`",
        "rises slowly from 0",
    ),
    "approx_kl": Metric(
        "how far the step's own updates moved the policy from the one that sampled: k3 estimate "
        "of the KL per token",
        "nats",
        GRADIENTS,
        "exactly 0 with `updates_per_batch: 1`; else about 0.01 or less",
    ),
    "clip_fraction": Metric(
        "tokens whose ratio is outside the clip range, so that they have no gradient (`cispo`: a "
        "bounded one)",
        "share",
        f"{GRADIENTS}; not `sapo`, `kl_cov`",
        "exactly 0 with `updates_per_batch: 1`; else a few percent, more with `gspo`",
    ),
    "ratio": Metric(
        "mean ratio of the policy's probabilities to those before the step's updates",
        "",
        GRADIENTS,
        "exactly 1 with `updates_per_batch: 1`; else within a few percent of it",
    ),
    "selected": Metric(
        "tokens that were left out or held back for their covariance",
        "share",
        "`clip_cov`, `kl_cov`",
        "at most `cov_fraction`",
    ),
    "mismatch_mean": Metric(
        "mean distance between the sampler's and the trainer's log-probs of the samples",
        "nats",
        GRADIENTS,
        "1e-6 in float32, 1e-2 in bfloat16; more: sampler and trainer do not agree",
    ),
    "mismatch_k3": Metric(
        "the same distance as a KL per token (k3 estimate)", "nats", GRADIENTS, "below 1e-3"
    ),
    "mismatch_max": Metric(
        "largest distance between the sampler's and the trainer's log-prob of a token",
        "nats",
        GRADIENTS,
        "1e-4 in float32",
    ),
    "grad_norm": Metric(
        "norm of the gradient before it is clipped to `max_grad_norm`",
        "",
        "all",
        "no steady growth; spikes are what the clip is for",
    ),
    "lr": Metric("learning rate", "", "all", "follows `warmup_steps` and `schedule`"),
    "skipped": Metric(
        "steps so far whose loss or gradient was NaN or infinite and that were not applied; their "
        "samples are in `skipped-step-N.json`",
        "steps",
        "all",
        "0; three in a row end the run",
    ),
    "tokens_per_second": Metric(
        "completion tokens learned from, over `seconds`; groups without a difference do not count",
        "tokens/s",
        "all",
    ),
    "seconds": Metric("the step's time, evaluation not included", "s", "all"),
    "rollout_seconds": Metric(
        "the part of `seconds` without gradients: sampling, rewards, log-probs of frozen models",
        "s",
        "all",
    ),
}


def entry(name: str) -> str:
    """The key of METRICS that tells of a logged metric; the name itself where there is none."""
    if name.startswith("reward/"):
        return "reward/NAME"
    return name.removeprefix("critic/").removeprefix("discriminator/")
