"""A step of PPO, GRPO, DPO and GAIL: this trainer, the same in naive PyTorch, and TRL's trainers.

The same random Qwen3 in float32, data and settings for all (trainer_case.py). PPO has a critic and
a reference of its own and takes two updates of each batch, GAIL a discriminator. DPO learns from
prompts * G / 2 pairs, so that all have as many rows. Rollouts end where the end is drawn, up to
`tokens`. Two trainers are comparable where their losses of a fixed batch agree: that is the gate.
"""

from dataclasses import replace

import torch

from fastrl import losses
from fastrl.bench import naive, trl_steps
from fastrl.bench.race import Race, Variant, Work, within
from fastrl.bench.trainer_case import HEAD, UPDATES, Case
from fastrl.train import loop
from fastrl.train.algorithms.adversarial import discrimination
from fastrl.train.algorithms.policy import policy_loss
from fastrl.train.algorithms.ppo import critic_loss
from fastrl.train.algorithms.preference import preference_loss, reference_logprobs
from fastrl.train.algorithms.ranking import rankings
from fastrl.train.batches import Batch
from fastrl.train.checkpoints import Progress

STEP = "step"
# Passes over the rows: with the lm-head (rollouts and log-probs; three for training) and without.
PASSES = {
    "grpo": (1 + 3, 0),
    "ppo": (1 + 2 + 3 * UPDATES, 1 + 3 * UPDATES),
    "dpo": (1 + 3, 0),
    "gail": (1 + 3, 1 + 3),
}


class Ours:
    def __init__(self, case):
        self.case, self.work = case, case.work
        self.networks = case.setup.networks
        self.progress = Progress(stage=case.algorithm)

    def log(self, *_):
        """Takes the place of the tracker."""

    def step(self):
        self.progress = loop._step(self.work, self.progress, self, self.case.folder)

    def losses(self, fixed):
        context, algorithm = self.work.context, self.case.algorithm
        if algorithm == "dpo":
            pairs = rankings(context, fixed.examples)
            pairs = replace(pairs, ref_logprobs=reference_logprobs(context, pairs))
            return {"preference": preference_loss(context, pairs, None)[0]}
        weights = context.token_weights(fixed.mask, context.stage.reduction)
        batch = Batch(
            fixed.prompts,
            fixed.ids,
            fixed.mask,
            weights,
            sampler_logprobs=fixed.old,
            old_logprobs=fixed.old,
            ref_logprobs=fixed.ref if algorithm == "ppo" else None,
        )
        found = {}
        if algorithm == "ppo":
            per_token = losses.token_rewards(
                fixed.rewards, fixed.old, fixed.ref, fixed.mask, kl_coef=context.stage.kl_coef
            )
            advantages, returns = losses.gae_advantages(per_token, fixed.values, fixed.mask)
            batch = replace(batch, returns=returns, old_values=fixed.values)
            found["value"] = critic_loss(context, batch)[0]
        elif algorithm == "gail":
            demonstrations = context.demonstrations(fixed.examples, "dapo")
            name = "discriminator"
            update = discrimination(context, name, demonstrations, batch, "sequence")
            found[name] = update.loss(update.batch)[0]
            logits = context.scorer(name).heads(batch).squeeze(-1)
            rewards = losses.imitation_rewards(logits, context.stage.reward)
            advantages = losses.grpo_advantages(rewards, self.case.group)
        else:
            advantages = losses.grpo_advantages(fixed.rewards, self.case.group)
        batch = replace(batch, advantages=advantages)
        return found | {"policy": policy_loss(context, batch, None)[0]}


class Naive:
    def __new__(cls, case):
        return naive.ALGORITHMS[case.algorithm](case)


class Theirs:
    def __new__(cls, case):
        if case.algorithm not in trl_steps.ALGORITHMS:
            raise NotImplementedError(f"only {', '.join(trl_steps.ALGORITHMS)} of TRL are raced")
        return trl_steps.ALGORITHMS[case.algorithm](case)


class Trainer(Race):
    op = "trainer"
    about = "a training step: rollouts, rewards, forwards, backwards, updates"
    modes = (STEP,)
    defaults = {
        "algorithm": "grpo",
        "H": 128,
        "layers": 4,
        "V": 17,
        "prompts": 16,
        "P": 9,
        "G": 8,
        "tokens": 32,
    }
    grids = {
        "quick": [{"prompts": 4, "tokens": 8}],
        "default": [{"algorithm": algorithm} for algorithm in PASSES],
        "middle": [
            {"algorithm": algorithm, "H": 384, "V": 32000, "prompts": 4, "P": 64}
            for algorithm in PASSES
        ],
        "large": [
            {"algorithm": algorithm, "H": 384, "V": 151936, "prompts": 4, "P": 64}
            for algorithm in PASSES
        ],
    }

    def variants(self, device):
        theirs = {"TRL": Variant(Theirs, "trl")} if device.type == "cpu" else {}
        return {"fastrl": Variant(Ours), "naive PyTorch": Variant(Naive, "eager"), **theirs}

    def draw(self, shape, device):
        return Case(shape)

    def before(self, variant, inputs, mode):
        return inputs.stepper(variant.function)

    def call(self, variant, inputs, mode):
        return inputs.step

    def gate(self, variant, inputs, shape):
        """The losses of a fixed batch, away from where training starts, in float64."""
        stepper = inputs.stepper(variant.function)
        inputs.load(stepper.networks, shifted=True)
        with torch.no_grad():
            found = stepper.losses(inputs.fixed)
        inputs.load(stepper.networks)
        gaps = {name: abs(loss.item() - inputs.truth[name].item()) for name, loss in found.items()}
        return within(gaps, 1e-5)

    def small(self, shape):
        return shape | {"layers": 1, "prompts": 2, "P": 4, "G": 2, "tokens": 2}

    def bytes_needed(self, name, shape):
        """Logits, their log-softmax and both gradients, of all rows; ours holds none of it."""
        rows = shape["prompts"] * shape["G"] * (shape["tokens"] + 1)
        return 0.0 if name == "fastrl" else 4.0 * 4 * rows * shape["V"]

    def work(self, shape, mode):
        """Passes over the tokens that rows have on average, each prompt once."""
        heads = shape["H"] // HEAD
        each = shape["H"] * HEAD * 3 * heads + 9 * shape["H"] ** 2
        layers, head = shape["layers"] * each, shape["H"] * shape["V"]
        rows, most = shape["prompts"] * shape["G"], shape["tokens"]
        ends = 1 / shape["V"]
        length = most / 2 if shape["algorithm"] == "dpo" else (1 - (1 - ends) ** most) / ends
        prompts = rows / 2 if shape["algorithm"] == "dpo" else shape["prompts"]
        tokens = rows * length + prompts * shape["P"]
        whole, bare = PASSES[shape["algorithm"]]
        operations = 2.0 * ((whole + bare) * tokens * layers + whole * rows * length * head)
        decoding = 0 if shape["algorithm"] == "dpo" else length
        trained = 7  # Adam reads and writes weight, gradient and moments
        moved = (whole + bare + decoding + trained) * (layers + head) * 4
        return Work(operations, float(moved), "float32")


RACE = Trainer()
