"""Rank statistics by hand, and the report on what quantization does to a ranking."""

import json
import math

import numpy as np
import pytest
import torch
from reward_models import tiny
from rich.console import Console

from fastrl.reward import Checkpoint, QuantizedRewardModel, fidelity_report
from fastrl.reward.fidelity import compare
from fastrl.reward.ranks import kendall_tau, ranks, spearman


def test_rank_statistics_by_hand():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])
    assert kendall_tau(x, y) == pytest.approx(4 / 6)  # 5 pairs agree, 1 does not
    assert spearman(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert kendall_tau(x, -x) == spearman(x, -x) == -1
    # (1, 2) is tied in x, (2, 3) in y: 4 pairs agree, and sqrt(5 * 5) are counted.
    assert kendall_tau(np.array([1.0, 1, 2, 3]), np.array([1.0, 2, 2, 3])) == pytest.approx(4 / 5)
    assert spearman(np.array([1.0, 1, 2]), np.array([1.0, 2, 3])) == pytest.approx(math.sqrt(3) / 2)
    assert math.isnan(kendall_tau(np.ones(3), x[:3])) and math.isnan(spearman(x, np.ones(4)))


def test_a_report_by_hand():
    want = [np.array([0.0, 1.0, 2.0, 5.0]), np.array([1.0, -1.0]), np.array([7.0, 7.0])]
    got = [np.array([1.0, 3.0, 2.0, 6.0]), np.array([2.0, 2.0]), np.array([7.0, 8.0])]
    report = compare(got, want)
    assert (report.groups, report.completions) == (2, 6)  # the third has no ranking
    assert report.kendall == pytest.approx((4 / 6 + 0) / 2)  # ties have lost the second
    assert report.best_of == {2: 1.0, 4: 1.0}
    # sd of the first is sqrt(3.5): a margin of 1 is 0.53 of it, and one such pair of two flipped.
    flips = {(f.low, f.high): (f.pairs, f.flipped) for f in report.flips}
    assert flips[(0.5, 1.0)] == (2, 0.5) and flips[(0.25, 0.5)] == (0, 0.0)
    assert flips[(1.0, math.inf)] == (5, pytest.approx(0.5 / 5))  # the tie counts half
    noise = [1.0 - 1.25, 2.0 - 1.25, 0.0 - 1.25, 1.0 - 1.25, 1.0 - 2.0, 3.0 - 2.0]
    assert report.noise == pytest.approx(
        np.sqrt(np.square([-0.0, 1.0, -1.0, 0.0, -1.0, 1.0]).mean())
    )
    assert report.spread == pytest.approx(math.sqrt((14 + 2) / 6))
    assert report.noise_to_spread == report.noise / report.spread
    assert 0 < report.advantage_cosine < 1 and noise


def test_equal_scores_are_perfect():
    want = [np.arange(5.0), np.array([2.0, 2.0, 1.0])]
    report = compare(want, want)
    assert report.kendall == report.spearman == pytest.approx(1)
    assert report.noise == 0 and report.advantage_cosine == pytest.approx(1)
    assert all(f.flipped == 0 for f in report.flips) and set(report.best_of.values()) == {1.0}
    shifted = compare([3 * g + 1 for g in want], want)  # a ranking has no unit
    assert shifted.kendall == pytest.approx(1) and shifted.advantage_cosine > 0.999


GROUPS = [
    {
        "prompt": torch.randint(2, 151, (9,), generator=torch.Generator().manual_seed(i)).tolist(),
        "completions": [[3 + i, 5 + j, 90 - 7 * j] for j in range(5)],
    }
    for i in range(4)
]


def models(model, scheme="int8", **arguments):
    return (
        QuantizedRewardModel.from_pretrained(Checkpoint.of(model), s, **a)
        for s, a in ((scheme, arguments), ("float32", {}))
    )


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_report_of_models(tmp_path, scheme):
    quantized, reference = models(tiny(num_labels=2), scheme)
    report = fidelity_report(quantized, reference, GROUPS)
    assert report.scheme == scheme and report.groups == 4 and report.completions == 20
    assert report.kendall > (0.9 if scheme == "int8" else 0.3)
    assert 0 < report.noise_to_spread < (0.1 if scheme == "int8" else 1)
    assert len(report.layers) == 3 * 7
    low, high = (25, 60) if scheme == "int8" else (10, 30)
    assert all(low < v < high for v in report.layers.values())
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["kendall"] == report.kendall and saved["flips"][-1]["high"] is None
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    console = Console(record=True, width=120)
    console.print(report.table())
    assert "Kendall tau within prompt" in (text := console.export_text()) and scheme in text


def test_the_layer_that_spoils_the_scores_is_proposed():
    model = tiny()
    with torch.no_grad():  # a channel that leaves the others no bits
        model.model.layers[1].mlp.up_proj.weight[5] *= 1000
        model.model.layers[1].mlp.down_proj.weight[:, 5] /= 1000
    quantized, reference = models(model)
    report = fidelity_report(quantized, reference, GROUPS)
    assert report.keep_bf16[0] == "layers.1.mlp.down_proj"
    kept, _ = models(model, keep_bf16=report.keep_bf16)
    better = fidelity_report(kept, reference, GROUPS)
    assert better.noise_to_spread < report.noise_to_spread / 2
    assert "layers.1.mlp.down_proj" not in better.keep_bf16
    texts = [g["prompt"] + c for g in GROUPS for c in g["completions"]]
    smooth, _ = models(model, smooth=texts)
    layers = fidelity_report(smooth, reference, GROUPS).layers
    assert layers["layers.1.mlp.down_proj"] > report.layers["layers.1.mlp.down_proj"] + 6


def test_an_unquantized_model_has_no_noise():
    _, reference = models(tiny())
    report = fidelity_report(reference, reference, GROUPS)
    assert report.kendall == pytest.approx(1) and report.noise == 0 and report.keep_bf16 == ()
    assert set(report.layers.values()) == {math.inf}


def test_bad_arguments_are_named():
    quantized, reference = models(tiny())
    _, other = models(tiny("qwen2"))
    for arguments, message in (
        ((quantized, quantized, GROUPS), "reference has scheme='int8'; it must be one of bf16"),
        ((quantized, other, GROUPS), "have two shapes"),
        ((quantized, reference, []), "groups is empty"),
        ((quantized, reference, [{"prompt": [3], "completions": [[4]]}]), "at least two"),
        ((None, reference, GROUPS), "quantized must be a QuantizedRewardModel, got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            fidelity_report(*arguments)
    with pytest.raises(ValueError, match="one score; no ranking"):
        compare([np.ones(2)], [np.ones(2)])
