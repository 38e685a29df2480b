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
    group_logprobs,
    group_rows,
    verify_shared_prefix,
)

__all__ = [
    "LmHead",
    "add_lora",
    "backbone",
    "build_model",
    "character_tokenizer",
    "check_shared_prefix",
    "check_vocabulary",
    "completion_logprobs",
    "group_logprobs",
    "group_rows",
    "lm_head",
    "load_model",
    "load_tokenizer",
    "save_pretrained",
    "verify_lm_head",
    "verify_shared_prefix",
]
