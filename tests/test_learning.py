"""The benchmarks of learning: curves over seeds, and how well a recovered reward ranks."""

import json
import sys
from pathlib import Path

import pytest
import torch
from runs import steady

pytest.importorskip("matplotlib")
pytest.importorskip("reasoning_gym")

from fastrl import models
from fastrl.bench import effects, learning
from fastrl.bench.effects import Effect, Figure, Pairs
from fastrl.bench.inverse_rl import Judge
from fastrl.bench.learning import Run
from fastrl.train import load_recipe, loop
from fastrl.train.setup import padding

SMALL = [
    "stages.sft.steps=1",
    "stages.{last}.steps=2",
    "stages.{last}.eval_every=1",
    "stages.{last}.prompts_per_step=2",
    "stages.{last}.group_size=2",
    "data.reasoning_gym.size=8",
    "data.reasoning_gym.eval_size=4",
]


def test_curves_of_runs_that_are_made_once(tmp_path, monkeypatch, capsys):
    report, plot = tmp_path / "report.json", tmp_path / "curves.png"
    other = {"seeds": [0], "accuracy": [[[0, 0.1], [2, 0.2]]]}
    report.write_text(json.dumps({"arithmetic": other, "rloo": None}))
    command = ["learning", "rloo", "--seeds", "3", "--out", str(tmp_path / "runs")]
    command += ["--json", str(report), "--plot", str(plot)]
    for setting in SMALL:
        command += ["--set", setting]
    monkeypatch.setattr(sys, "argv", command)
    learning.main()
    written = json.loads(report.read_text())
    assert written["arithmetic"] == other
    got = written["rloo"]
    assert got["seeds"] == [3] and [step for step, _ in got["accuracy"][0]] == [0, 1, 2]
    assert plot.read_bytes().startswith(b"\x89PNG") and "rloo:" in capsys.readouterr().out
    run = tmp_path / "runs" / "rloo-seed3"
    made = (run / "metrics.jsonl").stat().st_mtime_ns
    learning.main()
    assert (run / "metrics.jsonl").stat().st_mtime_ns == made
    # What goes on from a warm start that others share is what trains it itself, bit for bit.
    settings = tuple(s.replace("{last}", "rloo") for s in SMALL)
    whole = Run("rloo", 3, settings, tmp_path / "whole")
    whole.train()
    start = next(p for p in (tmp_path / "runs").glob("sft-*-seed3") if p.is_dir())
    parts = [{k: v for k, v in m.items() if k != "step"} for p in (start, run) for m in steady(p)]
    assert parts == [{k: v for k, v in m.items() if k != "step"} for m in steady(whole.folder)]
    same = json.loads(json.dumps(learning.learning([whole], "rloo")))
    assert got == same | {"seconds": got["seconds"]}


def test_warm_starts_are_shared_where_the_last_stage_needs_no_more(tmp_path):
    def start(recipe, seed=0, *settings):
        return learning.warm_start(recipe, seed, settings, tmp_path)

    assert start("rloo").folder == start("dapo").folder == start("dpo").folder
    assert list(start("rloo").config().stages) == ["sft"]
    assert list(start("gail").config().stages) == ["crowd", "sft"]
    others = start("rloo", 1), start("rloo", 0, "stages.sft.steps=2"), start("gail")
    assert len({start("rloo").folder, *(o.folder for o in others)}) == 4
    # A reward model, the policy of an earlier stage, a teacher; and no stage before.
    for recipe in ("reward", "afd", "distillation", "reward_model"):
        assert start(recipe) is None


def test_a_run_that_fails_names_its_log(tmp_path):
    run = Run("rloo", 0, ("nonsense=1",), tmp_path / "run")
    with pytest.raises(SystemExit, match=r"nonsense=1 failed; see .*run\.log"):
        run.train()
    assert "unknown key 'nonsense'" in (tmp_path / "run.log").read_text()


def test_the_recovered_reward_is_judged_within_prompts():
    judge = Judge.__new__(Judge)
    # Prompt 0 has 2 right-wrong pairs, one ranked rightly; prompt 1 has 2, one tied.
    judge.right = torch.tensor([[True, False, False], [True, True, False]])
    reward = torch.tensor([[1.0, 0.0, 2.0], [5.0, 3.0, 3.0]])
    got = judge.judge(reward)
    assert got["ranked"] == pytest.approx((1 + 1 + 0.5) / 4)
    gold = torch.tensor([2 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, -2 / 3])
    ours = torch.tensor([0.0, -1.0, 1.0, 4 / 3, -2 / 3, -2 / 3])
    want = (gold @ ours) / (gold.norm() * ours.norm())
    assert got["correlation"] == pytest.approx(want.item())
    assert judge.judge(10 * reward + torch.tensor([[7.0], [-3.0]])) == pytest.approx(got)


def made_run(folder: Path, rows: list[tuple], **more) -> Run:
    """A run whose metrics are (stage, stage_step, metrics)."""
    folder.mkdir()
    lines = [{"stage": stage, "stage_step": step, "seconds": 2.0, **m} for stage, step, m in rows]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return Run("raft", 0, (), folder, **more)


def test_a_figure_before_and_after(tmp_path):
    start = made_run(tmp_path / "start", [("sft", 1, {"eval/accuracy": 0.4, "nll": 7.0})])
    steps = [("raft", i, {"entropy": float(i), "reward": 0.5}) for i in range(1, 31)]
    end = [("raft", 31, {"eval/accuracy": 0.625, "entropy": 31.0, "reward": 0.5})]
    run = made_run(tmp_path / "run", steps + end, start=start)
    accuracy, entropy = Figure("acc", "eval/accuracy", percent=True), Figure("nats", "entropy")
    effect = Effect("raft", "up, down", (accuracy, entropy))
    found = effects.measure(run, effect, None)
    # Means of 1 to 10, and of 22 to 31.
    assert found == {"acc": (0.4, 0.625), "nats": (5.5, 26.5)}
    want = "| `raft` | up, down | acc 40.0 → 62.5 %; nats 5.5 → 26.5 | 62 |"
    assert effects.row("raft", effect, found, 62.0) == want
    # The start's own figures, where a stage is named and has nothing before it.
    assert effects.change(run.history(), Figure("nll", "nll", "sft")) == (7.0, 7.0)
    alone = effects.change(start.metrics(), accuracy)
    assert alone == (None, 0.4) and accuracy.show(alone) == "acc 40.0 %"
    with pytest.raises(KeyError, match="stage 'raft' logged no 'kl'"):
        effects.change(run.history(), Figure("kl", "kl"))


def test_what_a_policy_makes_of_held_out_pairs(tmp_path):
    small = ["data.reasoning_gym.size=4", "data.reasoning_gym.eval_size=5"]
    setup = loop.prepare(load_recipe("dpo", small))
    models.save_pretrained(setup.policy, setup.tokenizer, tmp_path)
    pairs = Pairs(setup.config)
    got = pairs.figures(tmp_path)
    sums = []
    for example in setup.held_out:
        for completion in example.ranked_ids:
            ids = torch.tensor([example.prompt_ids + completion])
            with torch.no_grad():
                logprobs = setup.policy(input_ids=ids).logits.double().log_softmax(-1)
            at = range(len(example.prompt_ids) - 1, ids.shape[1] - 1)
            sums.append((sum(float(logprobs[0, i, ids[0, i + 1]]) for i in at), len(completion)))
    two = list(zip(sums[::2], sums[1::2], strict=True))
    want = {
        "accuracy": sum(a > b for (a, _), (b, _) in two) / 5,
        "margin": sum(a - b for (a, _), (b, _) in two) / 5,
        "gap": sum(a / n - b / m for (a, n), (b, m) in two) / 5,
        "chosen": sum(a for (a, _), _ in two) / 5,
        "rejected": sum(b for _, (b, _) in two) / 5,
    }
    assert got == {f"policy/{k}": pytest.approx(v, abs=1e-5) for k, v in want.items()}
    scorer = models.build_scorer(setup.policy, padding(setup), seed=1).eval()
    models.save_pretrained(scorer, setup.tokenizer, tmp_path / "scorer")
    with torch.no_grad():
        scores = [
            float(scorer(input_ids=torch.tensor([e.prompt_ids + c])).logits)
            for e in setup.held_out
            for c in e.ranked_ids
        ]
    right = sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True)) / 5
    want = {"scores/accuracy": right, "scores/centre": pytest.approx(sum(scores) / 10, abs=1e-5)}
    assert pairs.scores(tmp_path / "scorer") == want


def test_every_effect_is_of_a_recipe_and_its_settings_hold(tmp_path):
    start = learning.warm_start("arithmetic", 0, (), tmp_path)
    for name, effect in effects.EFFECTS.items():
        settings = effect.settings
        if effect.recipe == "hf_grpo":
            settings += effects.prompts_file(tmp_path, start)
        run = Run(effect.recipe, 0, settings, tmp_path, None if effect.whole else start)
        assert run.config().stages, name
        assert len({figure.label for figure in effect.figures}) == len(effect.figures)
    line = json.loads((tmp_path / "prompts.jsonl").read_text().splitlines()[0])
    given = [line["prompt"]] * 2, [f"{line['answer']} ", "no"]
    assert effects.exact(*given, answer=[line["answer"]] * 2) == [1.0, 0.0]
