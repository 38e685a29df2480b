"""The schedule by hand, and master weights for bf16."""

import pytest
import torch

from fastrl.train.optimizer import Optimizer, learning_rate
from fastrl.train.stages import Optimizer as OptimizerSettings


def test_learning_rate_by_hand():
    settings = OptimizerSettings(lr=1.0, warmup_steps=2, final_lr_fraction=0.1)
    assert [learning_rate(settings, s, 12) for s in (0, 1, 2, 7)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.55]
    )
    linear = settings.model_copy(update={"schedule": "linear"})
    assert learning_rate(linear, 7, 12) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(settings.model_copy(update={"schedule": "constant"}), 11, 12) == 1.0


def test_bf16_updates_smaller_than_a_bf16_step_add_up():
    layer = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    settings = OptimizerSettings(lr=1e-4, schedule="constant", max_grad_norm=1e9)
    optimizer = Optimizer(layer, settings, 100)
    for step in range(100):
        optimizer.zero_grad()
        for _ in range(2):
            layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
            optimizer.collect()
        assert optimizer.masters[0].grad.dtype == torch.float32
        optimizer.clip()
        optimizer.step(step)
    assert layer.weight.float().mean().item() == pytest.approx(0.99, abs=4e-3)
