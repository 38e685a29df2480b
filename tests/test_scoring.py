"""Trained scoring models at work: prompts shared, quantized, heads on the policy, ensembles."""

from dataclasses import replace

import pytest
import torch
from runs import finals, same, steady, stop_and_resume

from fastrl import train
from fastrl.models import (
    ScoreHead,
    build_scorer,
    completion_scores,
    head_scores,
    join_head,
    save_pretrained,
)
from fastrl.reward import QuantizedRewardModel
from fastrl.train import ConfigError, loop, parse_config
from fastrl.train.algorithms import STEPS
from fastrl.train.algorithms.adversarial import discrimination
from fastrl.train.algorithms.policy import sample_batch
from fastrl.train.batches import Batch

SAMPLED = {"steps": 2, "eval_every": 2, "prompts_per_step": 4, "group_size": 4}
PAIRS = {"steps": 2, "eval_every": 2, "batch_size": 6}
PROMPTS = [[4, 5, 6]] * 3 + [[7]] + [[8, 9]] * 2
IDS = torch.tensor([[10, 1, 9], [9, 9, 9], [11, 12, 1], [4, 4, 4], [13, 1, 4], [5, 14, 9]])
MASK = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()


def a_recipe(recipe, stages, **more):
    return parse_config(recipe | more | {"stages": stages})


def begun(config, folder, name=None):
    """The work of a run's first stage, or of the one named after the others are done."""
    setup = loop.prepare(config)
    for stage_name, stage in config.stages.items():
        work = loop.begin(setup, stage, stage_name, folder, None)
        if name in (None, stage_name):
            return work
        for index in range(stage.steps):
            for update in STEPS[type(stage)](work.context, index):
                loop.apply(update, work.optimizers, 64, index, shared_prefix=setup.shared_prefix)
                setup.engine.weights_changed()


def rows_of(batch):
    prompts, ids, mask = batch.completions
    return prompts, [row[m].tolist() for row, m in zip(ids, mask, strict=True)]


def a_batch():
    return Batch(PROMPTS, IDS, MASK, MASK.float())


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("level", ["sequence", "token", "state"])
def test_shared_prompts_change_neither_scores_nor_gradients(model, level, heads):
    scorer = build_scorer(model, 0, heads=heads)
    found = []
    for shared in (False, True):
        scorer.zero_grad()
        scores = completion_scores(scorer, PROMPTS, IDS, MASK, level=level, shared_prefix=shared)
        (scores * torch.arange(1.0, scores.numel() + 1).view(scores.shape)).sum().backward()
        found.append((scores.detach(), [p.grad.clone() for p in scorer.parameters()]))
    (want, gradients), (got, parts) = found
    assert want.shape == (6,) + (() if level == "sequence" else (3,)) + ((3,) if heads > 1 else ())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients, parts, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)


def test_a_head_scores_what_the_model_it_joins_does(model):
    model.train()
    head = ScoreHead(model, 2, seed=3)
    classifier = join_head(model, head, 0).eval()
    for level in ("sequence", "token"):
        scores = head_scores(model, head, PROMPTS, IDS, MASK, level=level, shared_prefix=True)
        want = completion_scores(classifier, PROMPTS, IDS, MASK, level=level)
        torch.testing.assert_close(scores, want, rtol=1e-4, atol=1e-5)
    scores.sum().backward()
    assert head.weight.grad.abs().max() > 0 and model.training
    assert all(p.grad is None for p in model.parameters())
    assert not ScoreHead(model).weight.any() and ScoreHead(model, 2, 4).weight.std() > 0.05


def test_demonstrations_stand_with_samples_of_their_prompt(recipe, tmp_path):
    recipe["model"]["shared_prefix"] = "on"
    context = begun(a_recipe(recipe, {"gail": SAMPLED}), tmp_path).context
    demos = Batch([[8, 9], [7], [4, 5, 6]], IDS[:3], MASK[3:4].expand(3, 3), MASK[:3].float())
    update = discrimination(context, "discriminator", demos, a_batch(), "sequence")
    assert update.batch.prompt_ids == [[8, 9]] * 3 + [[7]] * 2 + [[4, 5, 6]] * 4
    labels = [True, False, False, True, False, True, False, False, False]
    assert update.batch["labels"].tolist() == labels
    assert update.batch.weights.tolist() == pytest.approx([1 / 3 if x else 1 / 6 for x in labels])


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("kind", ["separate", "head"])
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_quantized_scores_are_those_of_the_saved_model(recipe, tmp_path, level, kind, lora):
    """Also after the discriminator has learned: nothing of an older copy is left."""
    recipe["model"]["lora"] = lora
    settings = {"level": level, "discriminator": kind, "scheme": "int8"}
    work = begun(a_recipe(recipe, {"gail": SAMPLED | settings}), tmp_path)
    context, batch = work.context, a_batch()
    network = context.setup.networks["discriminator"]
    for round in range(2):
        with torch.no_grad():
            for p in (p for p in network.parameters() if p.requires_grad):
                p.add_(0.3 * torch.randn_like(p))
        got = context.learned_rewards("discriminator", batch, level)
        folder = tmp_path / f"saved{round}"
        saved = join_head(context.policy, network, 0) if kind == "head" else network
        save_pretrained(saved, None, folder)
        model = QuantizedRewardModel.from_pretrained(folder, "int8")
        if level == "sequence":
            want = model.score(*rows_of(batch))
        else:
            want = torch.zeros(MASK.shape)
            for i, (p, c) in enumerate(zip(*rows_of(batch), strict=True)):
                cut = [c[: n + 1] for n in range(len(c))]
                want[i, : len(c)] = model.score([p] * len(cut), cut)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        trained = context.scorer("discriminator").heads(batch, level).squeeze(-1)
        assert not torch.equal(got, trained)
        stage = context.stage.model_copy(update={"scheme": "float32"})
        exact = replace(context, stage=stage).learned_rewards("discriminator", batch, level)
        torch.testing.assert_close(exact, trained, rtol=1e-4, atol=1e-4)


def test_an_ensemble_is_read_as_the_recipe_says(recipe, tmp_path):
    stages = {
        "reward": PAIRS | {"heads": 3},
        "grpo": SAMPLED | {"reward": "reward", "ensemble": "worst_case"},
    }
    context = begun(a_recipe(recipe, stages), tmp_path, "grpo").context
    batch = a_batch()
    heads = context.scorer("reward").heads(batch).detach()
    assert heads.shape == (6, 3) and heads.std(-1).min() > 0
    found = {}
    for how, weight in (("mean", 0.5), ("worst_case", 0.5), ("uncertainty", 2.0)):
        stage = context.stage.model_copy(update={"ensemble": how, "variance_weight": weight})
        found[how] = replace(context, stage=stage).learned_rewards("reward", batch)
    for i, (a, b, c) in enumerate(heads.tolist()):
        mean = (a + b + c) / 3
        variance = ((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2) / 3
        want = {"mean": mean, "worst_case": min(a, b, c), "uncertainty": mean - 2 * variance}
        assert {k: float(v[i]) for k, v in found.items()} == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_reward_models_head_scores_with_the_policy_it_was_trained_on(recipe, tmp_path, kl_coef):
    stages = {
        "reward": PAIRS | {"reward_model": "head", "heads": 2, "optimizer": {"lr": 0.1}},
        "grpo": SAMPLED | {"reward": "reward", "kl_coef": kl_coef},
    }
    config = a_recipe(recipe, stages)
    context = begun(config, tmp_path, "grpo").context
    assert (context.scored_with is context.reference) == (kl_coef > 0)
    batch = a_batch()
    before = context.learned_rewards("reward", batch)
    with torch.no_grad():
        for p in context.policy.parameters():
            p.mul_(1.5)
    assert torch.equal(context.learned_rewards("reward", batch), before)
    run = train.run(config, tmp_path / "run")
    saved = QuantizedRewardModel.from_pretrained(run / "final-reward", "float32")
    scores = saved.score(*rows_of(batch)).mean(-1)
    torch.testing.assert_close(scores, before, rtol=1e-4, atol=1e-4)


def test_gold_metrics_do_not_depend_on_the_scheme(recipe, tmp_path):
    stages = {"reward": PAIRS, "grpo": SAMPLED | {"reward": "reward"}}
    context = begun(a_recipe(recipe, stages), tmp_path, "grpo").context
    stage = context.stage.model_copy(update={"scheme": "int8"})
    plain, quantized = (sample_batch(c, 0)[3] for c in (context, replace(context, stage=stage)))
    assert plain["gold_reward"] == quantized["gold_reward"]
    assert quantized["reward"] == pytest.approx(plain["reward"], abs=0.05)
    assert quantized["reward"] != plain["reward"]


RUNS = {
    "quantized": {"gail": SAMPLED | {"steps": 3, "scheme": "int8"}},
    "frozen": {
        "reward": PAIRS | {"heads": 2, "reward_model": "head"},
        "sft": PAIRS,
        "grpo": SAMPLED | {"reward": "reward", "scheme": "int8"},
    },
    "head": {"airl": SAMPLED | {"steps": 3, "discriminator": "head", "level": "token"}},
}


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_exact(recipe, tmp_path, name, monkeypatch):
    config = a_recipe(recipe, RUNS[name])
    whole, folder = train.run(config, tmp_path / "whole"), tmp_path / "stopped"
    rows = steady(whole)
    stop_and_resume(config, folder, len(rows) - 1, monkeypatch)
    assert steady(folder) == rows
    assert same(finals(folder), finals(whole))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"grpo": SAMPLED | {"scheme": "int8"}}, "scheme='int8' has no effect with reward="),
        ({"ppo": SAMPLED | {"ensemble": "worst_case"}}, "ensemble='worst_case' has no effect"),
        ({"gail": SAMPLED | {"ensemble": "worst_case"}}, "ensemble has no effect where"),
        (
            {"reward": PAIRS, "raft": SAMPLED | {"reward": "reward", "ensemble": "uncertainty"}},
            "'reward' has one head; train it with heads of 2 or more",
        ),
        (
            {"reward": PAIRS, "raft": SAMPLED | {"reward": "reward", "variance_weight": 1.0}},
            "variance_weight=1.0 has no effect with ensemble='mean'",
        ),
        ({"gail": SAMPLED | {"scheme": "int3"}}, "stages.gail.scheme"),
        (
            {"reward": PAIRS, "afd": SAMPLED | {"heads": 2}},
            "goes on with the scoring model 'reward' of an earlier stage",
        ),
    ],
)
def test_settings_that_would_be_ignored_are_refused(recipe, stages, message):
    with pytest.raises(ConfigError, match=message):
        a_recipe(recipe, stages)


def test_a_backbone_without_a_quantized_forward_is_refused_before_training(
    recipe, tmp_path, tokenizer
):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = a_recipe(recipe, {"gail": SAMPLED | {"scheme": "int8"}}, model={"path": str(tmp_path)})
    message = "stages.gail.scheme='int8' cannot be: the backbone 'gpt2' is not known"
    with pytest.raises(ConfigError, match=message):
        loop.prepare(config)


def test_accuracy_is_that_of_what_says_what_is_right(recipe, tmp_path, model, tokenizer):
    """Not a model's score, whatever stands first."""
    folder = tmp_path / "reward-model"
    build_scorer(model, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    learned = {"model": str(folder), "scheme": "float32"}
    stages = {"grpo": SAMPLED | {"steps": 1, "eval_every": 1}}

    def evaluated(name, *rewards):
        config = a_recipe(recipe, stages, rewards=list(rewards))
        return steady(train.run(config, tmp_path / name))[0]

    gold = {"function": "reasoning_gym"}
    assert loop.prepare(a_recipe(recipe, stages)).rewards.verifier == "reasoning_gym"
    both = loop.prepare(a_recipe(recipe, stages, rewards=[learned, gold]))
    assert both.rewards.verifier == "reasoning_gym"
    alone = evaluated("alone", learned)
    assert "eval/reward" in alone and "eval/accuracy" not in alone
    certain = evaluated("threshold", learned | {"threshold": -100.0})
    assert certain["eval/accuracy"] == certain["eval/reward"] == 1.0
