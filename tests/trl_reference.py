"""TRL's own loss code on given tensors: its methods, with stand-ins for the trainer and its model.

A stand-in carries the settings that the method reads; what it lacks raises AttributeError, so a
release of TRL that reads more is noticed.
"""

from collections import defaultdict, deque
from types import SimpleNamespace

import torch

ACCELERATOR = SimpleNamespace(
    num_processes=1,
    process_index=0,
    sync_gradients=True,
    device=torch.device("cpu"),
    reduce=lambda x, reduction: x,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    pad_across_processes=lambda x, **_: x,
    unwrap_model=lambda x: x,
)
MODEL = SimpleNamespace(training=True)


def _trainer(**settings):
    return SimpleNamespace(
        accelerator=ACCELERATOR,
        model=MODEL,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def _rollouts(batch, **more):
    ids = torch.zeros_like(batch.mask, dtype=torch.long)
    prompt = torch.zeros(len(ids), 1, dtype=torch.long)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": ids,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.ref,
        "num_items_in_batch": batch.mask.sum(),
    } | more


def _grpo_trainer(batch, loss_type, **settings):
    from trl import GRPOTrainer

    args = {
        "delta": None,
        "use_bias_correction_kl": False,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "steps_per_generation": 1,
    }
    own = {
        "loss_type": loss_type,
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "max_completion_length": 11,
        "current_gradient_accumulation_steps": 1,
    }
    args |= {k: settings.pop(k) for k in list(settings) if k in args}
    own |= settings
    trainer = _trainer(
        args=SimpleNamespace(**args),
        _entropy_bonus_enabled=own["entropy_coef"] != 0,
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logprobs, batch.entropy, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        **own,
    )
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    return trainer


def grpo(batch, loss_type, *, importance_weights=None, **settings):
    from trl import GRPOTrainer

    more = {"sampling_per_token_logps": batch.sampler}
    if importance_weights is not None:
        settings["use_vllm"], more["importance_sampling_ratio"] = True, importance_weights
    trainer = _grpo_trainer(batch, loss_type, **settings)
    return GRPOTrainer._compute_loss(trainer, MODEL, _rollouts(batch, **more))


def gmpo(batch, **settings):
    from trl.experimental.gmpo import GMPOTrainer

    trainer = _grpo_trainer(batch, "gmpo", **settings)
    return GMPOTrainer._compute_loss(trainer, MODEL, _rollouts(batch))


def rloo(batch):
    from trl import RLOOTrainer

    trainer = _grpo_trainer(batch, "rloo")
    old = torch.where(batch.mask, batch.old, 0.0).sum(-1)
    return RLOOTrainer._compute_loss(trainer, MODEL, _rollouts(batch, old_logps=old))


def _outputs(logprobs):
    zeros = torch.zeros_like(logprobs.detach())
    return SimpleNamespace(
        log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


def dpo(pairs, loss_types, **settings):
    from trl import DPOTrainer

    mask = torch.cat([pairs.chosen_mask, pairs.rejected_mask])
    logprobs = torch.where(mask, torch.cat([pairs.chosen, pairs.rejected]), 0.0)
    ref = torch.where(mask, torch.cat([pairs.ref_chosen, pairs.ref_rejected]), 0.0)
    own = {
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "loss_types": loss_types,
        "loss_weights": [1.0] * len(loss_types),
        "beta": 0.1,
        "label_smoothing": 0.0,
        "use_weighting": False,
        "args": SimpleNamespace(discopop_tau=0.05),
    }
    prompt = torch.zeros(len(mask), 1, dtype=torch.long)
    ref_chosen, ref_rejected = ref.sum(-1).chunk(2)
    inputs = {
        "input_ids": torch.cat([prompt, torch.ones_like(mask, dtype=torch.long)], 1),
        "attention_mask": torch.cat([prompt + 1, mask.long()], 1),
        "completion_mask": torch.cat([prompt, mask.long()], 1),
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    return DPOTrainer._compute_loss(
        _trainer(**own | settings), lambda **_: _outputs(logprobs), inputs, False
    )


def kto(pairs, mismatched, ref_mismatched, **settings):
    from trl import KTOTrainer

    mask = torch.cat([pairs.chosen_mask, pairs.rejected_mask])
    logprobs = torch.where(mask, torch.cat([pairs.chosen, pairs.rejected]), 0.0)
    ref = torch.where(mask, torch.cat([pairs.ref_chosen, pairs.ref_rejected]), 0.0)
    prompt = torch.zeros(len(mask), 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.cat([prompt, torch.ones_like(mask, dtype=torch.long)], 1),
        "attention_mask": torch.cat([prompt + 1, mask.long()], 1),
        "completion_mask": torch.cat([prompt, mask.long()], 1),
        "label": torch.arange(len(mask)) < len(mask) // 2,
        "ref_logps": ref.sum(-1),
        "ref_KL_logps": ref_mismatched,
    }
    own = {
        "loss_type": "kto",
        "calculate_KL": True,
        "precompute_ref_logps": True,
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "_compute_kl_logps": lambda *_: mismatched,
    }
    return KTOTrainer._compute_loss(
        _trainer(**own | settings), lambda **_: _outputs(logprobs), inputs, False
    )


def reward(chosen, rejected, margin, centering):
    from trl import RewardTrainer

    logits = torch.cat([chosen, rejected]).unsqueeze(-1)
    inputs = {"attention_mask": torch.ones_like(logits)}
    if margin is not None:
        inputs["margin"] = margin
    trainer = _trainer(args=SimpleNamespace(center_rewards_coefficient=centering))
    return RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs)


def cpo(chosen, rejected, loss_type, beta, label_smoothing, simpo_gamma=0.5):
    from trl.experimental.cpo import CPOTrainer

    trainer = _trainer(
        alpha=0.0,
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        simpo_gamma=simpo_gamma,
    )
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean()


def orpo_odds(chosen, rejected, beta):
    from trl.experimental.orpo import ORPOTrainer

    return -ORPOTrainer.odds_ratio_loss(_trainer(beta=beta), chosen, rejected)[0].mean()


def gkd(student, teacher, mask, beta, temperature):
    from trl.experimental.gkd import GKDTrainer

    labels = torch.where(mask, 0, -100)
    return GKDTrainer.generalized_jsd_loss(
        student, teacher, labels, beta, temperature, num_items_in_batch=mask.sum()
    )


def distillation(student, student_head, teacher, teacher_head, mask, beta, temperature):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    return _chunked_divergence_loss(
        student, teacher, student_head, teacher_head, mask, beta, temperature=temperature
    )[0]


def _sampling_trainer(rewards, group_size, mask, **settings):
    """What both trainers read between sampling and advantages."""
    rows = [int(n) for n in mask.sum(-1)]
    ids = [[1] * n for n in rows]
    logs = {"prompt": deque(), "completion": deque(), "advantages": deque()}
    own = {
        "_tokenizer": SimpleNamespace(pad_token_id=0, eos_token_id=2),
        "processing_class": SimpleNamespace(batch_decode=lambda *_, **__: [""] * len(rows)),
        "_calculate_rewards": lambda *_: rewards.unsqueeze(-1),
        "args": SimpleNamespace(
            gradient_accumulation_steps=1,
            per_device_train_batch_size=len(rows),
            per_device_eval_batch_size=len(rows),
            steps_per_generation=1,
            gradient_checkpointing_kwargs=None,
        ),
        "num_generations": group_size,
        "reward_weights": torch.ones(1),
        "reward_func_names": ["reward"],
        "pad_to_multiple_of": None,
        "mask_truncated_completions": False,
        "num_iterations": 1,
        "beta": 0.0,
        "_logs": logs | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "log_multimodal": False,
        "use_vllm": False,
    }
    trainer = _trainer(**own | settings)
    trainer.model = SimpleNamespace(
        training=True, is_gradient_checkpointing=False, parameters=lambda: iter(())
    )
    return trainer, ids


def grpo_advantages(rewards, group_size, scale_rewards, mismatch=None):
    """GRPO's advantages; with mismatch, (old, sampler, mask, mode, low, high), its ratios too."""
    from trl import GRPOTrainer

    mask = torch.ones(len(rewards), 2, dtype=torch.bool) if mismatch is None else mismatch[2]
    settings = {}
    sampled = None
    if mismatch is not None:
        old, sampler, _, mode, low, high = mismatch
        sampled = [row[m].tolist() for row, m in zip(sampler, mask, strict=True)]
        settings = {
            "use_vllm": True,
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_min": low,
            "vllm_importance_sampling_clip_max": high,
            "_get_per_token_logps_and_entropies": lambda *_, **__: (old, None, None),
        }
    trainer, ids = _sampling_trainer(
        rewards,
        group_size,
        mask,
        **{
            "environment_factories": None,
            "environments": None,
            "tools": None,
            "vllm_importance_sampling_correction": True,
            "multi_objective_aggregation": "sum_then_normalize",
            "scale_rewards": scale_rewards,
            "_generate": lambda prompts: (ids, ids, None, ids, sampled, {}, None, None),
        }
        | settings,
    )
    prompts = [{"prompt": "p"} for _ in rewards]

    out = GRPOTrainer._generate_and_score_completions(trainer, prompts)
    return out["advantages"] if mismatch is None else out["importance_sampling_ratio"]


def rloo_advantages(rewards, group_size):
    from trl import RLOOTrainer

    mask = torch.ones(len(rewards), 2, dtype=torch.bool)
    zeros = torch.zeros(mask.shape)
    trainer, ids = _sampling_trainer(
        rewards,
        group_size,
        mask,
        reward_clip_range=None,
        normalize_advantages=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (zeros, None, None),
        _generate=lambda prompts: (None, None, None),
    )
    trainer._generate = lambda prompts: (ids, ids, ids)
    out = RLOOTrainer._generate_and_score_completions(trainer, [{"prompt": "p"} for _ in rewards])
    return out["advantages"]
