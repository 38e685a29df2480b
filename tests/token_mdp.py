"""A token MDP small enough to enumerate: prompts, every completion, exact expectations.

Two prompts, the tokens a, b and EOS, at most three tokens: 15 completions of 7 prefixes. A policy
is a table of logits `[X, 7, 3]`, so it can be any distribution over completions.
"""

from itertools import product

import torch

from fastrl import losses

VOCABULARY, LONGEST, EOS, PROMPTS = 3, 3, 2, 2


def _completions():
    out = []
    for length in range(1, LONGEST + 1):
        for head in product(range(EOS), repeat=length - 1):
            last = range(VOCABULARY) if length == LONGEST else (EOS,)
            out += [(*head, token) for token in last]
    return out


COMPLETIONS = _completions()
COUNT = len(COMPLETIONS)
_prefixes = sorted({c[:t] for c in COMPLETIONS for t in range(len(c))})
PREFIXES = len(_prefixes)


def _table(value):
    rows = [[value(c, t) if t < len(c) else 0 for t in range(LONGEST)] for c in COMPLETIONS]
    return torch.tensor(rows)


# By completion and step: the token, the prefix before it, and whether there is one.
TOKENS = _table(lambda c, t: c[t])
STATES = _table(lambda c, t: _prefixes.index(c[:t]))
MASK = _table(lambda c, t: 1).bool()
# Which entry of a policy's table a token reads: a product is faster than indexing, and so is its
# gradient. [21, 15 * T]
CHOICES = torch.nn.functional.one_hot(STATES * VOCABULARY + TOKENS, PREFIXES * VOCABULARY)
CHOICES = (CHOICES * MASK.unsqueeze(-1)).flatten(0, 1).T.double().contiguous()
# The rows of a batch are all completions of the first prompt, then of the second.
BATCH_MASK = MASK.repeat(PROMPTS, 1)


def policy(seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    shape = (PROMPTS, PREFIXES, VOCABULARY)
    return scale * torch.randn(shape, generator=g, dtype=torch.float64)


def logprobs(logits):
    """Per token, `[X * 15, T]`, 0 where there is none."""
    return at_tokens(logits.log_softmax(-1))


def at_tokens(table):
    """What a table `[X, 7, 3]` holds for each token of each completion, `[X * 15, T]`."""
    return (table.reshape(PROMPTS, -1) @ CHOICES).view(-1, LONGEST)


def lse(logits):
    """logsumexp of each token's state, `[X * 15, T]`."""
    return at_tokens(logits.logsumexp(-1, keepdim=True).expand_as(logits))


def sequence(logits):
    """Log-prob of each completion, `[X, 15]`."""
    return logprobs(logits).sum(-1).view(PROMPTS, COUNT)


def expectation(logits):
    """Token weights under which a loss is its expectation over the policy, prompts alike."""
    p = sequence(logits).detach().exp().flatten() / PROMPTS
    return p.unsqueeze(-1) * BATCH_MASK


def rewards(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(PROMPTS, COUNT, generator=g, dtype=torch.float64)


def tilted(reference, reward, beta):
    """pi_ref exp(reward / beta), normalised: log-probs `[X, 15]`."""
    return (sequence(reference) + reward / beta).log_softmax(-1)


def kl_rewards(logits, reference, reward, beta):
    """Of each token, what is still to come: the reward at the end less beta times the KL."""
    with torch.no_grad():
        now, ref = logprobs(logits), logprobs(reference)
        token = losses.token_rewards(reward.flatten(), now, ref, BATCH_MASK, kl_coef=beta)
    return token.flip(-1).cumsum(-1).flip(-1)


def same(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def distance(a, b):
    """Largest total variation, over prompts, of two tables of log-probs."""
    return 0.5 * (a.exp() - b.exp()).abs().sum(-1).max().item()


def minimise(loss, *tables, steps=200):
    """Tables at the minimum of a smooth deterministic loss."""
    leaves = [t.clone().requires_grad_() for t in tables]
    solver = torch.optim.LBFGS(
        leaves,
        max_iter=steps,
        history_size=50,
        tolerance_grad=1e-10,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        solver.zero_grad()
        value = loss(*leaves)
        value.backward()
        return value

    solver.step(closure)
    return [t.detach() for t in leaves]


def descend(step_loss, logits, steps, lr):
    """The policy after `steps` of Adam on a loss built anew at each, its rate falling to 0."""
    logits = logits.clone().requires_grad_()
    solver = torch.optim.Adam([logits], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, steps)
    for _ in range(steps):
        solver.zero_grad()
        step_loss(logits).backward()
        solver.step()
        schedule.step()
    return logits.detach()
