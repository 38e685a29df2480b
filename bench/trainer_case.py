"""What the race of trainers starts from: a random model, random text, settings, a fixed batch."""

import atexit
import json
import random
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fastrl import train
from fastrl.bench import naive
from fastrl.models import completion_logprobs
from fastrl.train import loop
from fastrl.train.begin import begin

FIRST = 0x20000  # code points from here on are letters of a language with as many as are wanted
LR = 1e-5  # small: the lengths of rollouts stay what they are
HEAD = 32
UPDATES = 2


def reward(prompts, completions, **_):
    """Differs within a group, so that no row of a batch is idle, and cannot be learned."""
    return [float(sum(map(ord, c)) % 101) for c in completions]


def stage(shape):
    """The settings of ours; what naive.py has as constants are the same."""
    rows = shape["prompts"] * shape["G"]
    settings = {"steps": 10**6, "micro_batch_size": 2 * rows, "eval_every": 10**6}
    optimizer = {"lr": LR, "schedule": "constant"}
    settings |= {"optimizer": optimizer}
    if shape["algorithm"] == "dpo":
        return settings | {"batch_size": rows // 2}
    settings |= {"prompts_per_step": shape["prompts"], "group_size": shape["G"]}
    if shape["algorithm"] == "ppo":
        more = {"kl_coef": naive.KL_COEF, "updates_per_batch": UPDATES}
        return settings | more | {"critic_optimizer": optimizer}
    if shape["algorithm"] == "gail":
        return settings | {"discriminator_optimizer": optimizer}
    return settings


@dataclass(frozen=True)
class Fixed:
    """Rows that all variants give their losses of, and what rollouts would have brought along."""

    examples: list
    prompts: list[list[int]]
    ids: Tensor
    mask: Tensor
    rewards: Tensor
    old: Tensor
    ref: Tensor
    values: Tensor

    def double(self):
        wide = {k: v.double() for k, v in vars(self).items() if torch.is_tensor(v)}
        return replace(self, **{k: wide[k] for k in ("rewards", "old", "ref", "values")})


class Case:
    """What all variants start from; the folder goes with the process."""

    lr, updates, reward = LR, UPDATES, staticmethod(reward)

    def __init__(self, shape):
        folder = tempfile.TemporaryDirectory(prefix="fastrl-bench-")
        atexit.register(folder.cleanup)
        self.folder, self.algorithm = Path(folder.name), shape["algorithm"]
        self.rows, self.group = shape["prompts"] * shape["G"], shape["G"]
        self.tokens = shape["tokens"]
        self.examples_per_step = self.rows // 2 if self.algorithm == "dpo" else shape["prompts"]
        letters = [chr(FIRST + i) for i in range(shape["V"] - 3)]
        self.pairs = self._write(random.Random(0), letters, shape["P"])
        heads = shape["H"] // HEAD
        recipe = {
            "name": "bench",
            "model": {
                "alphabet": "".join(letters),
                "architecture": {
                    "hidden_size": shape["H"],
                    "num_layers": shape["layers"],
                    "num_heads": heads,
                    "num_kv_heads": heads // 2,
                    "head_dim": HEAD,
                    "intermediate_size": 3 * shape["H"],
                    "context_length": shape["P"] + shape["tokens"],
                },
            },
            "data": {"train_file": self.folder / "rows.jsonl"},
            "rewards": [{"function": "fastrl.bench.trainer_case:reward"}],
            "max_completion_length": shape["tokens"],
            "stages": {self.algorithm: stage(shape)},
        }
        torch.manual_seed(0)
        self.setup = loop.prepare(train.parse_config(recipe))
        self.tokenizer, self.examples = self.setup.tokenizer, self.setup.train
        self.setup.policy.save_pretrained(self.folder / "model")
        name = self.algorithm
        settings = self.setup.config.stages[name]
        self.work = begin(self.setup, settings, name, self.folder, None)
        self.weights = {
            name: {k: v.clone() for k, v in network.state_dict().items()}
            for name, network in self.setup.networks.items()
        }
        self.steppers = {}

    def _write(self, draw, letters, length):
        """Random text for each of a few steps, in the file of ours; its pairs for TRL."""

        def text(most):
            return "".join(draw.choices(letters, k=draw.randint(1, most)))

        rows = []
        for _ in range(4 * self.examples_per_step):
            sides = {k: text(self.tokens - 1) for k in ("completion", "chosen", "rejected")}
            rows.append({"prompt": "".join(draw.choices(letters, k=length)), **sides})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / "rows.jsonl").write_text(lines)
        return [{k: v for k, v in row.items() if k != "completion"} for row in rows]

    def stepper(self, kind):
        if kind not in self.steppers:
            self.steppers[kind] = kind(self)
        return self.steppers[kind]

    def load(self, networks, shifted=False):
        """Set networks of a variant to what all began with, or to the same distance from it."""
        for name, network in networks.items():
            network.load_state_dict(self.weights[name])
            g = torch.Generator().manual_seed(1)
            for p in network.parameters() if shifted else ():
                p.data += 0.005 * torch.randn(p.shape, generator=g)

    @cached_property
    def fixed(self):
        g = torch.Generator().manual_seed(0)
        prompts = [e.prompt_ids for e in self.examples[: self.rows // self.group]]
        prompts = [p for p in prompts for _ in range(self.group)]
        shape = self.rows, self.tokens
        ids = torch.randint(3, self.setup.policy.config.vocab_size, shape, generator=g)
        mask = torch.arange(self.tokens) < torch.randint(
            1, self.tokens + 1, (self.rows, 1), generator=g
        )
        start = naive.Algorithm(self).policy
        with torch.no_grad():
            logprobs = completion_logprobs(start, prompts, ids, mask).logprob
        old, ref = (logprobs + 0.1 * torch.randn(shape, generator=g) for _ in range(2))
        values = torch.where(mask, torch.randn(shape, generator=g), 0.0)
        rewards = torch.randn(self.rows, generator=g)
        examples = self.examples[: self.examples_per_step]
        return Fixed(examples, prompts, ids, mask, rewards, old, ref, values)

    @cached_property
    def truth(self):
        """The losses by the naive formulas, in float64."""
        exact = naive.ALGORITHMS[self.algorithm](self)
        self.load(exact.networks, shifted=True)
        for network in (*exact.networks.values(), getattr(exact, "reference", None)):
            if network is not None:
                network.double()
        with torch.no_grad():
            return exact.losses(self.fixed.double())
