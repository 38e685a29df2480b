"""verl's losses and advantages as its sources define them, written out for one tensor at a time.

`verl/trainer/ppo/core_algos.py` of late 2025; rows and tokens in plain loops, so that nothing is
shared with the code under test.
"""

import torch


def aggregate(per_token, mask, mode):
    rows = [x[m] for x, m in zip(per_token, mask, strict=True) if m.any()]
    if mode == "token-mean":
        return torch.cat(rows).mean()
    if mode == "seq-mean-token-mean":
        return torch.stack([r.mean() for r in rows]).mean()
    if mode == "seq-mean-token-sum":
        return torch.stack([r.sum() for r in rows]).mean()
    raise ValueError(mode)


def vanilla(logprobs, old, advantages, mask, *, low, high, c, mode="token-mean"):
    """PPO clip with log rho within +-20, dual clip c for negative advantages."""
    ratio = (logprobs - old).clamp(-20, 20).exp()
    a = advantages.unsqueeze(-1).expand_as(ratio)
    worst = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
    bounded = torch.minimum(worst, -a * c)
    return aggregate(torch.where(a < 0, bounded, worst), mask, mode)


def gspo(logprobs, old, advantages, mask, *, low, high):
    """Value of the sequence's ratio, gradient of the token's log-prob."""
    losses = []
    for row, was, a, m in zip(logprobs, old, advantages, mask, strict=True):
        if not m.any():
            continue
        mean = (row - was)[m].mean().detach()
        ratio = (row[m] - row[m].detach() + mean).clamp(max=10).exp()
        losses.append(torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high)).mean())
    return torch.stack(losses).mean()


def cispo(logprobs, old, advantages, mask, *, low, high):
    ratio = (logprobs - old).clamp(-20, 20).exp().clamp(1 - low, 1 + high).detach()
    return aggregate(-ratio * advantages.unsqueeze(-1) * logprobs, mask, "token-mean")


def sapo(logprobs, old, advantages, mask, *, tau_pos, tau_neg):
    a = advantages.unsqueeze(-1)
    tau = torch.where(a > 0, tau_pos, tau_neg)
    ratio = (logprobs - old).clamp(-20, 20).exp()
    gate = torch.sigmoid(tau * (ratio - 1)) * (4 / tau)
    return aggregate(-gate * a, mask, "seq-mean-token-mean")


def geo_mean(logprobs, old, advantages, mask, *, low, high):
    losses = []
    for row, was, a, m in zip(logprobs, old, advantages, mask, strict=True):
        gap, sign = (row - was)[m], torch.sign(a)
        kept = sign * torch.minimum(sign * gap, sign * gap.clamp(-low, high))
        losses.append(-a * kept.mean().exp())
    return torch.stack(losses).mean()


def _covariance(logprobs, advantages, mask):
    a, now = advantages.unsqueeze(-1).expand_as(logprobs), logprobs.detach()
    return (a - a[mask].mean()) * (now - now[mask].mean())


def clip_cov(logprobs, old, advantages, mask, *, low, high, cov_low, cov_high):
    """With a ratio of tokens so large that all of the band are taken: no draw."""
    a, ratio = advantages.unsqueeze(-1), (logprobs - old).exp()
    plain, clipped = -a * ratio, -a * ratio.clamp(1 - low, 1 + high)
    covariance = _covariance(logprobs, advantages, mask)
    taken = (covariance > cov_low) & (covariance < cov_high) & ~(clipped > plain)
    return aggregate(torch.maximum(plain, clipped) * (~taken).float(), mask, "token-mean")


def kl_cov(logprobs, old, advantages, mask, *, ratio, coef):
    rho = (logprobs - old).exp()
    per_token = -advantages.unsqueeze(-1) * rho
    covariance = _covariance(logprobs, advantages, mask).masked_fill(~mask, -torch.inf)
    count = max(1, int(int(mask.sum()) * ratio))
    cut = covariance.flatten().sort(descending=True).values[count - 1]
    penalised = per_token + coef * (logprobs - old).abs()
    return aggregate(torch.where(covariance >= cut, penalised, per_token), mask, "token-mean")


def value(values, old, returns, mask, *, clip):
    near = torch.minimum(torch.maximum(values, old - clip), old + clip)
    worst = torch.maximum((values - returns).square(), (near - returns).square())
    return 0.5 * aggregate(worst, mask, "token-mean")


def low_var_kl(logprobs, ref):
    gap = (ref - logprobs).clamp(-20, 20)
    return (gap.exp() - gap - 1).clamp(-10, 10)


def whiten(x, mask):
    kept = x[mask]
    return torch.where(mask, (x - kept.mean()) * torch.rsqrt(kept.var() + 1e-8), 0.0)


def gae(rewards, values, mask, *, gamma, lam):
    """Observation tokens are skipped: value and advantage carry across them."""
    advantages = torch.zeros_like(rewards)
    for i in range(len(rewards)):
        value = advantage = torch.tensor(0.0)
        for t in reversed(range(rewards.shape[1])):
            if mask[i, t]:
                advantage = rewards[i, t] + gamma * value - values[i, t] + gamma * lam * advantage
                value = values[i, t]
            advantages[i, t] = advantage
    return whiten(advantages, mask), torch.where(mask, advantages + values, 0.0)


def reinforce_plus_plus(rewards, mask, *, gamma):
    returns = torch.zeros_like(rewards)
    for i in range(len(rewards)):
        running = torch.tensor(0.0)
        for t in reversed(range(rewards.shape[1])):
            running = rewards[i, t] + gamma * running
            returns[i, t] = running
            running = running * mask[i, t]
    return whiten(returns, mask)


def reinforce_plus_plus_baseline(rewards, mask, group_size):
    scores = rewards.sum(-1).view(-1, group_size)
    centred = (scores - scores.mean(1, keepdim=True)).flatten()
    return whiten(centred.unsqueeze(-1).expand(mask.shape), mask)


def rloo(rewards, group_size):
    out = []
    for group in rewards.view(-1, group_size):
        n = group_size
        out += [r * n / (n - 1) - group.mean() * n / (n - 1) for r in group]
    return torch.stack(out)


def opo(rewards, lengths, group_size):
    groups = rewards.view(-1, group_size), lengths.view(-1, group_size)
    return torch.cat([r - (n * r).sum() / n.sum() for r, n in zip(*groups, strict=True)])


def grpo(rewards, group_size):
    return torch.cat([(g - g.mean()) / (g.std() + 1e-6) for g in rewards.view(-1, group_size)])
