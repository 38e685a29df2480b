"""PPO, GRPO, DPO and GAIL as they are written in plain PyTorch, for the race of trainers.

Hugging Face's `generate` on replicated prompts, padded batches, logits of every completion token,
log_softmax and gather, autograd, AdamW as it comes. Batched, and nothing is computed twice.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from fastrl.models import load_model

EPS, VALUE_CLIP, KL_COEF, GAMMA, LAM, BETA = 0.2, 0.2, 0.05, 1.0, 0.95, 0.1


@dataclass(frozen=True)
class Padded:
    """Prompts, padded on the left, and completions, padded on the right: `[B, P + T]`."""

    ids: Tensor
    attention: Tensor
    mask: Tensor  # [B, T]

    @property
    def completions(self) -> Tensor:
        return self.ids[:, -self.mask.shape[1] :]


def pad_prompts(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask `[B, P]`, padded on the left with 0."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    lengths = torch.tensor([len(p) for p in prompts]).unsqueeze(1)
    return ids, (torch.arange(longest) >= longest - lengths).long()


def join(prompts: list[list[int]], completions: Tensor, mask: Tensor) -> Padded:
    ids, attention = pad_prompts(prompts)
    return Padded(torch.cat([ids, completions], 1), torch.cat([attention, mask.long()], 1), mask)


def pad(prompts: list[list[int]], completions: list[list[int]]) -> Padded:
    ids = nn.utils.rnn.pad_sequence([torch.tensor(c) for c in completions], batch_first=True)
    lengths = torch.tensor([len(c) for c in completions]).unsqueeze(1)
    return join(prompts, ids, torch.arange(ids.shape[1]) < lengths)


def token_logprobs(model: nn.Module, rows: Padded) -> Tensor:
    """`[B, T]`; whatever it is where the mask is false."""
    keep = rows.mask.shape[1] + 1
    out = model(rows.ids, attention_mask=rows.attention, use_cache=False, logits_to_keep=keep)
    logprobs = out.logits[:, :-1].log_softmax(-1)
    return logprobs.gather(-1, rows.completions.unsqueeze(-1)).squeeze(-1)


class Scorer(nn.Module):
    """A backbone with a linear head: a score for each token it has read, `[B, P + T]`."""

    def __init__(self, path: str):
        super().__init__()
        self.model = AutoModel.from_pretrained(path, dtype=torch.float32)
        self.score = nn.Linear(self.model.config.hidden_size, 1, bias=False)

    def forward(self, rows: Padded) -> Tensor:
        out = self.model(rows.ids, attention_mask=rows.attention, use_cache=False)
        return self.score(out.last_hidden_state).squeeze(-1)

    def values(self, rows: Padded) -> Tensor:
        """`[B, T]`, each before its token is read."""
        return self(rows)[:, -rows.mask.shape[1] - 1 : -1]

    def logits(self, rows: Padded) -> Tensor:
        """`[B]`, at each row's last token."""
        last = rows.attention.shape[1] - rows.mask.shape[1] + rows.mask.sum(1) - 1
        return self(rows).gather(1, last.unsqueeze(1)).squeeze(1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = (logprobs - old).exp()
    gain = torch.min(ratio * advantages, ratio.clamp(1 - EPS, 1 + EPS) * advantages)
    return -masked_mean(gain, mask)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    near = old + (values - old).clamp(-VALUE_CLIP, VALUE_CLIP)
    return masked_mean(torch.max((values - returns) ** 2, (near - returns) ** 2), mask) / 2


def group_advantages(rewards: Tensor, size: int) -> Tensor:
    """`[B, 1]`: how far each reward is above its group's mean, in standard deviations."""
    groups = rewards.view(-1, size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages, whitened, and returns `[B, T]`."""
    rewards, values = rewards * mask, values * mask
    steps, following = [], torch.zeros(len(rewards), dtype=values.dtype)
    after = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        after = delta + GAMMA * LAM * after
        following = values[:, t]
        steps.append(after)
    advantages = torch.stack(steps[::-1], 1)
    kept = advantages[mask]
    return (advantages - kept.mean()) / (kept.var() + 1e-8).sqrt(), advantages + values


class Algorithm:
    """What the four share; `networks` are trained, `fixed` says what `losses` is asked about."""

    scorer: str | None = None

    def __init__(self, case):
        self.case, path = case, str(case.folder / "model")
        self.policy = load_model(path)
        self.networks: dict[str, nn.Module] = {"policy": self.policy}
        if self.scorer is not None:
            self.networks[self.scorer] = Scorer(path)
        case.load(self.networks)  # a new head is random
        self.optimizers = {
            name: torch.optim.AdamW(network.parameters(), lr=case.lr, weight_decay=0.0)
            for name, network in self.networks.items()
        }
        self.index = 0

    def draw(self) -> list:
        """The next examples, round and round."""
        examples, count = self.case.examples, self.case.examples_per_step
        self.index += 1
        return [examples[(self.index * count + i) % len(examples)] for i in range(count)]

    def sample(self, examples: list) -> tuple[list[list[int]], Padded, Tensor]:
        """Prompts, a group of rollouts for each, and their rewards `[B]`."""
        tokenizer, size = self.case.tokenizer, self.case.group
        prompts = [e.prompt_ids for e in examples for _ in range(size)]
        ids, attention = pad_prompts(prompts)
        self.policy.eval()
        out = self.policy.generate(
            ids,
            attention_mask=attention,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.case.tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.policy.train()
        completions = out[:, ids.shape[1] :]
        ended = completions == tokenizer.eos_token_id
        mask = ended.cumsum(1) - ended.long() == 0
        texts = tokenizer.batch_decode(completions * mask, skip_special_tokens=True)
        rewards = torch.tensor(self.case.reward([e.prompt for e in examples], texts))
        return prompts, join(prompts, completions, mask), rewards

    def update(self, name: str, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.networks[name].parameters(), 1.0)
        optimizer.step()


class GRPO(Algorithm):
    def step(self):
        _, rows, rewards = self.sample(self.draw())
        advantages = group_advantages(rewards, self.case.group)
        logprobs = token_logprobs(self.policy, rows)
        self.update("policy", policy_loss(logprobs, logprobs.detach(), advantages, rows.mask))

    def losses(self, fixed) -> dict[str, Tensor]:
        rows = join(fixed.prompts, fixed.ids, fixed.mask)
        advantages = group_advantages(fixed.rewards, self.case.group)
        logprobs = token_logprobs(self.policy, rows)
        return {"policy": policy_loss(logprobs, fixed.old, advantages, rows.mask)}


class PPO(Algorithm):
    scorer = "critic"

    def __init__(self, case):
        super().__init__(case)
        self.reference = copy.deepcopy(self.policy).eval().requires_grad_(False)

    def advantages(self, rewards: Tensor, old: Tensor, ref: Tensor, values: Tensor, mask: Tensor):
        last = mask.sum(1, keepdim=True) - 1
        per_token = (-KL_COEF * (old - ref)).scatter_add(1, last, rewards.unsqueeze(1))
        return gae(per_token, values, mask)

    def step(self):
        _, rows, rewards = self.sample(self.draw())
        critic = self.networks["critic"]
        with torch.no_grad():
            old, ref = token_logprobs(self.policy, rows), token_logprobs(self.reference, rows)
            values = critic.values(rows)
        advantages, returns = self.advantages(rewards, old, ref, values, rows.mask)
        for _ in range(self.case.updates):
            self.update("critic", value_loss(critic.values(rows), values, returns, rows.mask))
            logprobs = token_logprobs(self.policy, rows)
            self.update("policy", policy_loss(logprobs, old, advantages, rows.mask))

    def losses(self, fixed) -> dict[str, Tensor]:
        rows = join(fixed.prompts, fixed.ids, fixed.mask)
        given = (fixed.rewards, fixed.old, fixed.ref, fixed.values, rows.mask)
        advantages, returns = self.advantages(*given)
        logprobs, values = token_logprobs(self.policy, rows), self.networks["critic"].values(rows)
        return {
            "policy": policy_loss(logprobs, fixed.old, advantages, rows.mask),
            "value": value_loss(values, fixed.values, returns, rows.mask),
        }


class DPO(Algorithm):
    def __init__(self, case):
        super().__init__(case)
        self.reference = copy.deepcopy(self.policy).eval().requires_grad_(False)

    def loss(self, examples: list) -> Tensor:
        """Chosen completions first, then the rejected ones."""
        ranked = [(e.prompt_ids, e.ranked_ids[side]) for side in (0, 1) for e in examples]
        rows = pad(*map(list, zip(*ranked, strict=True)))
        with torch.no_grad():
            before = (token_logprobs(self.reference, rows) * rows.mask).sum(1)
        now = (token_logprobs(self.policy, rows) * rows.mask).sum(1)
        chosen, rejected = (now - before).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    def step(self):
        self.update("policy", self.loss(self.draw()))

    def losses(self, fixed) -> dict[str, Tensor]:
        return {"preference": self.loss(fixed.examples)}


class GAIL(Algorithm):
    scorer = "discriminator"

    def discriminator_loss(self, examples: list, samples: Padded) -> Tensor:
        demonstrations = pad([e.prompt_ids for e in examples], [e.completion_ids for e in examples])
        discriminator = self.networks["discriminator"]
        demo, policy = discriminator.logits(demonstrations), discriminator.logits(samples)
        return (F.softplus(-demo).mean() + F.softplus(policy).mean()) / 2

    def policy_loss(self, rows: Padded, old: Tensor | None) -> Tensor:
        with torch.no_grad():
            rewards = F.softplus(self.networks["discriminator"].logits(rows))
        advantages = group_advantages(rewards, self.case.group)
        logprobs = token_logprobs(self.policy, rows)
        old = logprobs.detach() if old is None else old
        return policy_loss(logprobs, old, advantages, rows.mask)

    def step(self):
        examples = self.draw()
        _, rows, _ = self.sample(examples)
        self.update("discriminator", self.discriminator_loss(examples, rows))
        self.update("policy", self.policy_loss(rows, None))

    def losses(self, fixed) -> dict[str, Tensor]:
        rows = join(fixed.prompts, fixed.ids, fixed.mask)
        return {
            "discriminator": self.discriminator_loss(fixed.examples, rows),
            "policy": self.policy_loss(rows, fixed.old),
        }


ALGORITHMS = {"ppo": PPO, "grpo": GRPO, "dpo": DPO, "gail": GAIL}
