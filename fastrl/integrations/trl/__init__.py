"""TRL: what `fastrl.patch("trl")` replaces, and a `rollout_func` on fastrl's engine."""

from fastrl.integrations.patching import Registration, Replacement
from fastrl.integrations.trl import lm_head, prompts
from fastrl.integrations.trl.rollout import rollout_func

__all__ = ["registrations", "replacements", "rollout_func"]


def replacements() -> list[Replacement]:
    """What is replaced, with the originals that ours need."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import dpo_trainer, utils

    chunked = "trl.kernels.chunked_logprob.ChunkedLogProbFunction"
    return [
        Replacement(
            f"{chunked}.apply",
            lm_head.chunked(ChunkedLogProbFunction.apply),
            declared=f"{chunked}.forward",
        ),
        # Only here: elsewhere it tells whether TRL's own Triton kernels can be launched.
        Replacement(
            "trl.trainer.utils._use_triton",
            lm_head.labelled_tokens_only(utils._use_triton),
            compare=None,
            everywhere=False,
        ),
        Replacement("trl.trainer.utils.selective_log_softmax", lm_head.selective_log_softmax),
        Replacement("trl.trainer.utils.entropy_from_logits", lm_head.entropy_from_logits),
        Replacement(
            "trl.trainer.utils.selective_log_softmax_and_entropy",
            lm_head.selective_log_softmax_and_entropy,
        ),
        *(
            Replacement(
                f"trl.trainer.{trainer}._get_per_token_logps_and_entropies",
                prompts.group_logps,
                compare=prompts.compare_logps,
            )
            for trainer in ("grpo_trainer.GRPOTrainer", "rloo_trainer.RLOOTrainer")
        ),
        Replacement(
            "trl.trainer.dpo_trainer.DPOTrainer._compute_loss",
            prompts.pair_loss(dpo_trainer.DPOTrainer._compute_loss),
            compare=prompts.compare_losses,
        ),
    ]


def registrations() -> list[Registration]:
    return []
