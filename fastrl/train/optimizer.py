"""AdamW with clipping, a schedule, and float32 master weights for parameters kept in bf16."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.train import parallel, stages


def learning_rate(settings: stages.Optimizer, step: int, total: int) -> float:
    """Learning rate of step `step` (from 0) of `total`: linear warm-up, then decay."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / max(total - settings.warmup_steps, 1)
    decay = (
        (1 + math.cos(math.pi * progress)) / 2 if settings.schedule == "cosine" else 1 - progress
    )
    return settings.lr * (settings.final_lr_fraction + (1 - settings.final_lr_fraction) * decay)


class Optimizer:
    """Updates a model's trainable parameters from gradients accumulated in float32.

    bf16 parameters get a float32 master copy: an update far smaller than a bf16 step is not lost.
    """

    def __init__(self, model: nn.Module, settings: stages.Optimizer, total_steps: int):
        self.settings, self.total_steps = settings, total_steps
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for p in self.parameters
        ]
        decayed = [m for m in self.masters if m.dim() >= 2]
        others = [m for m in self.masters if m.dim() < 2]
        self.adamw = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )

    def zero_grad(self) -> None:
        """Start a step: no gradients, which `step` takes as zero."""
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def collect(self) -> None:
        """After each backward pass: add gradients of bf16 parameters to their float32 masters'."""
        for p, m in zip(self.parameters, self.masters, strict=True):
            if p is not m and p.grad is not None:
                m.grad = p.grad.float() if m.grad is None else m.grad.add_(p.grad)
                p.grad = None

    def clip(self) -> float:
        """Add up the gradients of all processes and clip them to `max_grad_norm`.

        Returns their norm before clipping.
        """
        for m in self.masters:
            if m.grad is None:
                m.grad = torch.zeros_like(m)
        parallel.add_up([m.grad for m in self.masters if m.grad is not None])
        norm = nn.utils.clip_grad_norm_(self.masters, self.settings.max_grad_norm)
        return float(parallel.full(norm))

    @torch.no_grad()
    def step(self, step: int) -> float:
        """Apply the collected gradients with the learning rate of `step`, which is returned."""
        lr = learning_rate(self.settings, step, self.total_steps)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for p, m in zip(self.parameters, self.masters, strict=True):
            if p is not m:
                p.copy_(m)
        return lr

    def state(self) -> dict[str, Tensor]:
        """Moments, step counts and bf16 parameters' masters as named tensors."""
        out = {}
        for name, p, m in zip(self.names, self.parameters, self.masters, strict=True):
            if p is not m:
                out[f"master.{name}"] = m.detach()
            out |= {f"{key}.{name}": value for key, value in self.adamw.state[m].items()}
        return out

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave; raises `KeyError` for a tensor that is missing."""
        for name, p, m in zip(self.names, self.parameters, self.masters, strict=True):
            if p is not m:
                m.copy_(parallel.like(tensors[f"master.{name}"], m))
            if f"exp_avg.{name}" in tensors:
                state: dict[str, Any] = {
                    key: parallel.like(tensors[f"{key}.{name}"], m)
                    for key in ("exp_avg", "exp_avg_sq")
                }
                self.adamw.state[m] = state | {"step": tensors[f"step.{name}"].to(m.device)}
