"""What fastrl knows of Hugging Face decoder-only models."""

from fastrl.models.attention import check_shared_prefix
from fastrl.models.head import LmHead, backbone, lm_head, verify_lm_head
from fastrl.models.load import (
    add_lora,
    build_model,
    character_tokenizer,
    check_vocabulary,
    load_model,
    load_tokenizer,
    save_pretrained,
)
from fastrl.models.logprobs import (
    completion_logprobs,
    completion_states,
    group_logprobs,
    group_rows,
    verify_shared_prefix,
)
from fastrl.models.scorer import (
    Level,
    ScoreHead,
    build_scorer,
    completion_scores,
    head_scores,
    join_head,
    load_scorer,
    logprobs_and_values,
    scorer_class,
)

__all__ = [
    "Level",
    "LmHead",
    "ScoreHead",
    "add_lora",
    "backbone",
    "build_model",
    "build_scorer",
    "character_tokenizer",
    "check_shared_prefix",
    "check_vocabulary",
    "completion_logprobs",
    "completion_scores",
    "completion_states",
    "group_logprobs",
    "group_rows",
    "head_scores",
    "join_head",
    "lm_head",
    "load_model",
    "load_scorer",
    "load_tokenizer",
    "logprobs_and_values",
    "save_pretrained",
    "scorer_class",
    "verify_lm_head",
    "verify_shared_prefix",
]
