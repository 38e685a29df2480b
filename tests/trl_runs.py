"""TRL's own trainers on a model built on the spot: what the tests and the bench of patches run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fastrl.models import character_tokenizer

ALPHABET = "0123456789+-= "
PROMPTS = ["1+2=", "10+20-3=", "4=", "55-5+1="]
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def tiny_model(tokenizer, vocab_size=None, dtype=torch.float32, **changed):
    """A Qwen3 whose vocabulary may be larger than the tokenizer's, the same at every call."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **(SHAPE | changed),
        vocab_size=vocab_size or len(tokenizer),
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.3)  # not uniform: a wrong token's log-prob shows
    return model.to(dtype)


def on_disk(folder, tokenizer, **changed):
    """The tiny model read from a folder, where trainers read their reference model from too."""
    tiny_model(tokenizer, **changed).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")


def even_share(prompts, completion_ids, **_):
    """A reward that differs within every group."""
    return [sum(i % 7 for i in ids) / 7 + 0.01 * len(ids) for ids in completion_ids]


def arguments(folder, steps, **changed):
    """Settings of every trainer here; two runs with equal ones differ by the patch alone."""
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    } | changed


def sampler(kind, folder, steps=3, model=None, rollout=None, **changed):
    """TRL's GRPOTrainer or RLOOTrainer: four prompts, groups of four."""
    import trl

    tokenizer = character_tokenizer(ALPHABET)
    config, trainer = {
        "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
        "rloo": (trl.RLOOConfig, trl.RLOOTrainer),
    }[kind]
    settings = {
        "num_generations": 4,
        "per_device_train_batch_size": 16,
        "max_completion_length": 6,
        "beta": 0.1,
    }
    extra = {} if rollout is None else {"rollout_func": rollout}
    return trainer(
        model or on_disk(folder, tokenizer),
        reward_funcs=even_share,
        args=config(**arguments(folder, steps, **(settings | changed))),
        train_dataset=datasets.Dataset.from_list([{"prompt": p} for p in PROMPTS * 16]),
        processing_class=tokenizer,
        **extra,
    )


def preferences(folder, steps=3, model=None, **changed):
    """TRL's DPOTrainer on a few pairs."""
    import trl

    tokenizer = character_tokenizer(ALPHABET)
    rows = [
        {"prompt": p, "chosen": str(i % 10) + "7" * (i % 4), "rejected": "+" * (1 + i % 3)}
        for i, p in enumerate(PROMPTS * 16)
    ]
    return trl.DPOTrainer(
        model or on_disk(folder, tokenizer),
        args=trl.DPOConfig(
            **arguments(folder, steps, **({"per_device_train_batch_size": 8} | changed))
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def losses(trainer):
    """Train, and return the loss and the gradient's norm of each step."""
    trainer.train()
    return [(r["loss"], r["grad_norm"]) for r in trainer.state.log_history if "loss" in r]
