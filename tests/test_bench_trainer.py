"""The race of trainers: naive PyTorch, TRL and ours compute one loss, and the gate would see."""

import pytest
import torch

pytest.importorskip("trl")

from fastrl.bench import bench_trainer, naive
from fastrl.bench.bench_trainer import RACE

CPU = torch.device("cpu")
SMALL = {"layers": 2, "prompts": 3, "G": 4, "P": 5, "tokens": 7}


@pytest.mark.parametrize("algorithm", list(bench_trainer.PASSES))
def test_the_variants_agree_after_a_step(algorithm):
    shape = RACE.complete(SMALL | {"algorithm": algorithm})
    case = RACE.draw(shape, CPU)
    for variant in RACE.variants(CPU).values():
        if variant.peer == "trl" and algorithm in ("ppo", "gail"):
            with pytest.raises(NotImplementedError, match="of TRL are raced"):
                case.stepper(variant.function)
            continue
        stepper = RACE.before(variant, case, "step")
        before = [p.clone() for n in stepper.networks.values() for p in n.parameters()]
        RACE.call(variant, stepper, "step")()
        after = [p for n in stepper.networks.values() for p in n.parameters()]
        assert all((a != b).any() for a, b in zip(after, before, strict=True))
        verdict = RACE.gate(variant, case, shape)
        assert verdict.wrong is None and verdict.errors
        # The gate leaves all with the weights that training starts from.
        assert all(map(torch.equal, before, after))


def test_the_gate_refuses_other_settings(monkeypatch):
    shape = RACE.complete(SMALL | {"algorithm": "ppo"})
    case = RACE.draw(shape, CPU)
    assert case.truth.keys() == {"policy", "value"}
    monkeypatch.setattr(naive, "LAM", 0.9)
    verdict = RACE.gate(RACE.variants(CPU)["naive PyTorch"], case, shape)
    assert verdict.wrong is not None


def test_naive_gae_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 5.0]])
    values = torch.tensor([[0.5, 0.25, 9.0]])
    advantages, returns = naive.gae(rewards, values, torch.tensor([[True, True, False]]))
    # delta_1 = 1 - 0.25, delta_0 = 0.25 - 0.5; A_0 = delta_0 + 0.95 * 0.75 = 0.4625.
    torch.testing.assert_close(returns[:, :2], torch.tensor([[0.9625, 1.0]]))
    torch.testing.assert_close(advantages[:, :2], torch.tensor([[-1.0, 1.0]]) / 2**0.5)


def test_work_by_hand():
    shape = RACE.complete({"algorithm": "dpo", "V": 10, "prompts": 2, "G": 2, "P": 3, "tokens": 4})
    # 4 layers of 128 x (128 + 64 + 64 + 128) and 3 of 128 x 384; two pairs: 8 + 6 tokens.
    layers = 4 * (128 * 384 + 3 * 128 * 384)
    assert RACE.work(shape, "step").operations == 2.0 * (4 * 14 * layers + 4 * 8 * 1280)
