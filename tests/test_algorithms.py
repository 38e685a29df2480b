"""Every algorithm of the trainer: what a step computes, and resuming."""

import io
import re

import pytest
import torch
from rich.console import Console
from runs import finals, same, steady, stop_and_resume

from fastrl import train
from fastrl.models import build_scorer, completion_scores, load_scorer
from fastrl.train import ConfigError, DataError, loop, parse_config
from fastrl.train.algorithms import STEPS
from fastrl.train.begin import begin
from fastrl.train.optimizer import Optimizer
from fastrl.train.stages import ALGORITHMS, FAMILIES
from fastrl.train.update import accumulate

SAMPLED = {"steps": 2, "eval_every": 2, "prompts_per_step": 4, "group_size": 4}
PAIRS = {"steps": 2, "eval_every": 2, "batch_size": 6}
STAGES = {
    "sft": PAIRS,
    "iqlearn": PAIRS,
    "reward": PAIRS | {"centering": 0.01, "label_smoothing": 0.1, "heads": 2},
    "afd": {k: v for k, v in SAMPLED.items()} | {"data": "demos_vs_sft"},
    "ppo": SAMPLED | {"kl_coef": 0.1},
    "ppo head": SAMPLED | {"algorithm": "ppo", "critic": "head", "kl_coef": 0.1, "kl_in": "loss"},
    "reinforce++": SAMPLED | {"kl_coef": 0.1},
    "rloo": SAMPLED | {"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1"},
    "grpo": SAMPLED | {"kl_coef": 0.1, "entropy_coef": 0.01, "mismatch": "token_truncate"},
    "dapo": SAMPLED | {"overlong_buffer": 3},
    "clip_cov": SAMPLED | {"cov_fraction": 0.2},
    "kl_cov": SAMPLED | {"cov_fraction": 0.2},
    "gail": SAMPLED | {"prompts": "all", "demonstrations_per_step": 6},
    "airl": SAMPLED | {"level": "token"},
    "fairl": SAMPLED | {"discriminator_updates": 2},
    "likelihood": SAMPLED | {"algorithm": "gail", "discriminator": "likelihood"},
    "likelihood of tokens": SAMPLED
    | {"algorithm": "airl", "discriminator": "likelihood", "level": "token"},
    "spin": PAIRS,
    "distillation": {"steps": 2, "eval_every": 2, "prompts_per_step": 8, "beta": 0.5},
    "raft": SAMPLED,
    **{a: PAIRS for a in ("dpo", "ipo", "slic", "exo", "rpo", "kto", "simpo", "orpo")},
    "robust_dpo": PAIRS | {"label_smoothing": 0.1},
    **{
        a: SAMPLED
        for a in [
            "dr_grpo",
            "reinforce++_baseline",
            "remax",
            "opo",
            "maxrl",
            "gspo",
            "cispo",
            "sapo",
            "gmpo",
        ]
    },
}


def a_recipe(recipe, stages):
    return parse_config(recipe | {"stages": stages})


@pytest.fixture
def varied(recipe, tmp_path, monkeypatch):
    """A recipe whose reward differs between samples of an untrained model."""
    (tmp_path / "varied_rewards.py").write_text(
        "def digits(prompts, completions):\n"
        "    return [sum(c in '0123456789' for c in text) / 5 for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe["rewards"] = [{"function": "varied_rewards:digits"}]
    return recipe


def first_updates(config, tmp_path, micro_batch_size, split):
    """The updates of a first step, taken; gradients, losses and metrics of each.

    All that a step computes without gradients takes `micro_batch_size` rows at a time, and so do
    gradients where `split`.
    """
    (name, stage), *_ = config.stages.items()
    stage = stage.model_copy(update={"micro_batch_size": micro_batch_size})
    setup = loop.prepare(config)
    work = loop.begin(setup, stage, name, tmp_path, None)
    torch.manual_seed(0)
    if work.context.reference is not None:  # so that what compares with it is not trivial
        with torch.no_grad():
            for p in work.context.reference.parameters():
                p.mul_(1.05)
    out = []
    for update in STEPS[type(stage)](work.context, 0):
        optimizers = [work.optimizers[n] for n in update.networks]
        size = micro_batch_size if split else len(update.batch.prompt_ids)
        figures = accumulate(update.batch, update.loss, max(size, 1), optimizers, per=update.per)
        parameters = [p for n in update.networks for p in setup.networks[n].parameters()]
        out.append((figures, [p.grad.clone() for p in parameters if p.grad is not None]))
        for optimizer in optimizers:
            optimizer.clip()
            optimizer.step(0)
        setup.engine.weights_changed()
    return out


def test_every_algorithm_is_tested():
    assert {s.get("algorithm", n) for n, s in STAGES.items()} == set(ALGORITHMS) and set(
        STEPS
    ) == set(FAMILIES)


@pytest.mark.parametrize("algorithm", STAGES)
def test_micro_batches_do_not_change_a_step(varied, tmp_path, algorithm):
    config = a_recipe(varied, {algorithm: STAGES[algorithm]})
    whole = first_updates(config, tmp_path / "a", 64, False)
    split = first_updates(config, tmp_path / "b", 3, True)
    assert len(whole) == len(split) >= 1
    for (want, gradients), (got, parts) in zip(whole, split, strict=True):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-5)
        assert any(g.abs().max() > 0 for g in gradients)
        for a, b in zip(gradients, parts, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=2e-5)


RUNS = {
    "ppo": {"ppo": SAMPLED | {"steps": 4, "kl_coef": 0.1, "critic_warmup": 1}},
    "value head": {"ppo": SAMPLED | {"steps": 3, "critic": "head", "critic_warmup": 1}},
    "gail": {"sft": PAIRS, "gail": SAMPLED | {"steps": 4}},
    "likelihood": {
        "sft": PAIRS,
        "airl": SAMPLED | {"steps": 4, "discriminator": "likelihood", "discriminator_warmup": 1},
    },
    "learned likelihood": {
        "sft": PAIRS,
        "reward": PAIRS | {"reward_model": "likelihood"},
        "grpo": SAMPLED | {"reward": "reward"},
    },
    "spin": {"spin": PAIRS | {"steps": 4, "reference_every": 2}},
    "own pairs": {
        "dpo": PAIRS | {"steps": 4, "pairs": "samples", "group_size": 4, "reference_every": 3}
    },
    "learned reward": {
        "sft": PAIRS,
        "reward": PAIRS | {"heads": 2},
        "grpo": SAMPLED | {"reward": "reward"},
    },
    "afd": {"sft": PAIRS, "afd": SAMPLED, "raft": SAMPLED | {"reward": "reward"}},
    "distillation": {"sft": PAIRS, "distillation": {"steps": 3, "prompts_per_step": 4}},
}


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_exact(varied, tmp_path, name, monkeypatch):
    config = a_recipe(varied, RUNS[name])
    whole = train.run(config, tmp_path / "whole")
    rows = steady(whole)
    for stop_at in (1, len(rows) - 1):
        folder = tmp_path / f"stopped{stop_at}"
        stop_and_resume(config, folder, stop_at, monkeypatch)
        assert steady(folder) == rows
        assert same(finals(folder), finals(whole))


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("iqlearn", "loss nll eval/nll eval/reward"),
        ("reward", "loss accuracy eval/pair_accuracy"),
        ("afd", "loss demo_accuracy policy_accuracy"),
        ("dpo", "loss accuracy margin eval/reward"),
        ("kto", "loss desirable_reward undesirable_reward eval/reward"),
        ("spin", "loss accuracy margin eval/reward"),
        ("ppo", "reward kl completion_length eval/reward"),
        ("gail", "reward gold_reward discriminator/demo_accuracy discriminator/policy_accuracy"),
        ("raft", "nll reward best_reward completion_length eval/reward"),
        ("distillation", "distillation reward completion_length eval/reward"),
    ],
)
def test_the_console_shows_what_matters(varied, tmp_path, name, names):
    console = Console(file=io.StringIO())
    varied["data"]["reasoning_gym"]["eval_size"] = 4
    config = a_recipe(varied, {name: STAGES[name] | {"steps": 1}})
    train.run(config, tmp_path / "run", console)
    (line,) = re.findall(rf"^  {name}, step 1: (.*)", console.file.getvalue(), re.MULTILINE)
    assert " ".join(line.split()[::2]).startswith(names)


def test_a_reward_model_learns_and_is_used(recipe, tmp_path):
    stages = {
        "sft": {"steps": 60, "batch_size": 32, "optimizer": {"lr": 1e-2}},
        "reward": {
            "steps": 60,
            "batch_size": 32,
            "loss": "bradley_terry",
            "optimizer": {"lr": 3e-3},
            "eval_every": 60,
        },
        "grpo": SAMPLED | {"steps": 1, "reward": "reward"},
    }
    recipe["data"]["reasoning_gym"]["ranked"] = 3
    run = train.run(a_recipe(recipe, stages), tmp_path / "run")
    rows = steady(run)
    assert rows[119]["accuracy"] > 0.85 and rows[119]["eval/pair_accuracy"] > 0.6
    assert {"gold_reward", "gold_correlation", "reward"} <= rows[120].keys()
    scorer = load_scorer(str(run / "final-reward"))
    ids = torch.tensor([[4, 1, 0], [5, 6, 1]])
    mask = torch.tensor([[True, True, False], [True] * 3])
    scores = completion_scores(scorer, [[4, 5], [6]], ids, mask)
    assert scores.shape == (2,) and scores.dtype == torch.float32


def test_a_discriminator_begins_before_the_policy(varied, tmp_path):
    config = a_recipe(varied, {"gail": SAMPLED | {"discriminator_warmup": 2}})
    setup = loop.prepare(config)
    work = begin(setup, config.stages["gail"], "gail", tmp_path, None)
    step = STEPS[type(work.context.stage)]
    trained = [[u.networks for u in step(work.context, i)] for i in (1, 2)]
    assert trained == [[("discriminator",)], [("discriminator",), ("policy",)]]


def test_a_likelihood_is_a_log_ratio_to_the_policy(varied, tmp_path):
    settings = {"discriminator": "likelihood", "temperature": 0.7}
    config = a_recipe(varied, {"airl": SAMPLED | settings})
    setup = loop.prepare(config)
    context = begin(setup, config.stages["airl"], "airl", tmp_path, None).context
    network = setup.networks["discriminator"]
    assert network.config.architectures == setup.policy.config.architectures
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.1)
    batch = next(STEPS[type(context.stage)](context, 0)).batch
    prompts, ids, mask = batch.completions
    want = torch.zeros(ids.shape)
    for i, prompt in enumerate(prompts):
        row = torch.tensor([prompt + ids[i][mask[i]].tolist()])
        chosen = row[0, len(prompt) :, None]
        after, before = (
            model(row).logits[0, len(prompt) - 1 : -1].double() for model in (network, setup.policy)
        )
        # The policy samples at a temperature of 0.7.
        ratio = after.log_softmax(-1) - (before / 0.7).log_softmax(-1)
        want[i, : len(chosen)] = ratio.gather(1, chosen).squeeze(1).float()
    scorer = context.scorer("discriminator")
    got = scorer.heads(batch, "token")
    assert got.shape == (*ids.shape, 1) and want.abs().max() > 0.01
    torch.testing.assert_close(got[..., 0], want, rtol=1e-4, atol=1e-5)
    whole = scorer.heads(batch)
    torch.testing.assert_close(whole[:, 0], want.sum(-1), rtol=1e-4, atol=1e-5)


def test_dynamic_sampling_goes_on_until_groups_differ(recipe, tmp_path, monkeypatch):
    (tmp_path / "rare_rewards.py").write_text(
        "def rare(prompts, completions):\n"
        "    return [float(text.startswith('3')) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe["rewards"] = [{"function": "rare_rewards:rare"}]
    stages = {"dapo": SAMPLED | {"dynamic_sampling": 8, "steps": 3}}
    rows = steady(train.run(a_recipe(recipe, stages), tmp_path / "run"))
    assert max(r["sampled_batches"] for r in rows) > 1


def test_groups_that_never_differ_teach_nothing(recipe, tmp_path, monkeypatch):
    (tmp_path / "flat_rewards.py").write_text(
        "def flat(prompts, completions): return [0.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe["rewards"] = [{"function": "flat_rewards:flat"}]
    stages = {"dapo": SAMPLED | {"dynamic_sampling": 2, "steps": 1}}
    (row,) = steady(train.run(a_recipe(recipe, stages), tmp_path / "run"))
    assert row["sampled_batches"] == 2 and row["zero_std_groups"] == 1
    assert row["loss"] == row["grad_norm"] == row["skipped"] == 0


def test_scores_are_independent_of_padding_and_read_where_they_should(model, tokenizer):
    scorer = build_scorer(model, tokenizer.pad_token_id, heads=2).eval()
    prompts = [[4, 5, 6], [7], [8, 9]]
    ids = torch.tensor([[10, 1, 99], [11, 12, 1], [99, 99, 99]]).clamp(max=16)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    scores = completion_scores(scorer, prompts, ids, mask)
    tokens = completion_scores(scorer, prompts, ids, mask, level="token")
    states = completion_scores(scorer, prompts, ids, mask, level="state")
    assert scores.shape == (3, 2) and tokens.shape == states.shape == (3, 3, 2)
    rows = [p + i[m].tolist() for p, i, m in zip(prompts, ids, mask, strict=True)]
    for i, row in enumerate(rows):
        hidden = scorer.base_model(input_ids=torch.tensor([row])).last_hidden_state[0]
        each, start = scorer.score(hidden), len(prompts[i])
        torch.testing.assert_close(scores[i], each[-1])
        torch.testing.assert_close(tokens[i, : len(row) - start], each[start:])
        torch.testing.assert_close(states[i, : len(row) - start], each[start - 1 : -1])
    assert (tokens[~mask] == 0).all() and (states[~mask] == 0).all()
    own = scorer(
        torch.tensor([rows[1]]), attention_mask=torch.ones(1, len(rows[1])).long()
    ).logits  # as transformers reads it
    torch.testing.assert_close(scores[1:2], own)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"grpo": SAMPLED | {"max_ratio": 2.0}}, "max_ratio=2.0 has no effect with loss='clip'"),
        ({"grpo": SAMPLED | {"reward": "reward"}}, "neither functions nor a scoring model"),
        ({"afd": SAMPLED | {"initial": "later"}}, "initial='later' is not one of the stages"),
        ({"grpo": SAMPLED | {"mismatch_low": 0.5}}, "need mismatch"),
        ({"rloo": SAMPLED | {"kl_coef": 1, "kl_in": "reward"}}, "needs kl_estimator=k1"),
        ({"gail": SAMPLED | {"level": "token", "advantage": "rloo"}}, "level=token"),
        ({"remax": SAMPLED | {"group_size": 1}, "opo": SAMPLED | {"group_size": 1}}, "at least 2"),
        ({"dpo": PAIRS | {"gamma": 2.0}}, "gamma=2.0 has no effect with algorithm='dpo'"),
        ({"dpo": PAIRS | {"temperature": 0.5}}, "temperature=0.5 has no effect with pairs='data'"),
        ({"reward": PAIRS | {"loss": "plackett_luce", "centering": 1.0}}, "centering=1.0 has no"),
        ({"gail": SAMPLED | {"demonstrations_per_step": 6}}, "has no effect with prompts="),
        ({"gail": SAMPLED | {"overlong_buffer": 2}}, "overlong_buffer has no effect where"),
        ({"airl": SAMPLED | {"advantage": "remax"}}, "remax has no rule"),
        ({"afd": SAMPLED | {"reward_model": "likelihood", "heads": 2}}, "a likelihood has one"),
        (
            {"gail": SAMPLED | {"discriminator": "likelihood", "scheme": "int8"}},
            "stages.gail.scheme='int8' has no effect on a likelihood",
        ),
        ({"ppp": SAMPLED}, "algorithm 'ppp' is unknown; use one of sft, iqlearn"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(recipe, stages, message):
    with pytest.raises(ConfigError, match=message):
        a_recipe(recipe, stages)


def test_a_margin_that_is_not_there_is_named(recipe):
    config = a_recipe(recipe, {"reward": PAIRS | {"margin": "gap"}})
    with pytest.raises(DataError, match="row 1: the margin column 'gap' holds no number"):
        loop.prepare(config)


def test_optimizers_of_their_own(varied):
    config = a_recipe(varied, {"ppo": SAMPLED | {"critic_optimizer": {"lr": 0.5}}})
    stage = config.stages["ppo"]
    assert stage.critic_optimizer.lr == 0.5 and stage.optimizer.lr == 1e-3
    assert isinstance(Optimizer(torch.nn.Linear(2, 2), stage.critic_optimizer, 1), Optimizer)
