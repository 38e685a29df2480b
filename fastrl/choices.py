"""Words that recipes and losses share; a recipe is checked without importing torch."""

from typing import Literal

ImitationReward = Literal["airl", "gail", "gail_saturating", "forward_kl", "fairl"]
KLEstimator = Literal["k1", "k2", "k3", "k1+", "k3+"]
MismatchKind = Literal[
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "geometric_mask",
    "icepop",
]
Parallel = Literal["replicated", "fsdp"]
Reduction = Literal["grpo", "dapo", "bnpo", "dr_grpo", "sequence_sum"]
