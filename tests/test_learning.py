"""The benchmarks of learning: curves over seeds, and how well a recovered reward ranks."""

import json
import sys

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("reasoning_gym")

from fastrl.bench import learning
from fastrl.bench.inverse_rl import Judge

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
    command = ["learning", "rloo", "--seeds", "3", "--out", str(tmp_path / "runs")]
    command += ["--json", str(report), "--plot", str(plot)]
    for setting in SMALL:
        command += ["--set", setting]
    monkeypatch.setattr(sys, "argv", command)
    learning.main()
    got = json.loads(report.read_text())["rloo"]
    assert got["seeds"] == [3] and [step for step, _ in got["accuracy"][0]] == [0, 1, 2]
    assert plot.read_bytes().startswith(b"\x89PNG") and "rloo:" in capsys.readouterr().out
    run = tmp_path / "runs" / "rloo-seed3"
    written = (run / "metrics.jsonl").stat().st_mtime_ns
    learning.main()
    assert (run / "metrics.jsonl").stat().st_mtime_ns == written


def test_a_run_that_fails_names_its_log(tmp_path):
    run = learning.Run("rloo", 0, ("nonsense=1",), tmp_path / "run")
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
