"""Building, loading and saving models, the lm-head of each family, and completion log-probs."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

from fastrl import models

SMALL = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=2.0),
    "granite": GraniteConfig(**SMALL, logits_scaling=4.0),
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "phi3": Phi3Config(**SMALL),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_lm_head_and_completion_logprobs_match_the_models_own_logits(family):
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    models.verify_lm_head(model)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [3]]
    lengths = [4, 2, 3]
    ids = torch.randint(3, 41, (3, 4))
    mask = torch.arange(4) < torch.tensor(lengths).unsqueeze(1)
    out = models.completion_logprobs(model, prompts, ids, mask, temperature=0.7, entropy=True)
    for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
        row = torch.tensor([prompt + ids[i, :n].tolist()])
        logits = model(row).logits[0, len(prompt) - 1 : -1].float() / 0.7
        want = torch.log_softmax(logits, -1).gather(-1, ids[i, :n].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(out.logprob[i, :n], want, rtol=1e-5, atol=1e-5)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(out.entropy[i, :n], entropy, rtol=1e-5, atol=1e-5)
    assert not out.logprob[~mask].any()


def test_a_model_with_unknown_logits_is_refused():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    inner = model.lm_head.forward
    model.lm_head.forward = lambda x: inner(x).tanh() + x.sum(-1, keepdim=True)
    with pytest.raises(ValueError, match="changes its logits"):
        models.verify_lm_head(model)


def test_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="empty prompt"):
        models.completion_logprobs(model, [[]], torch.ones(1, 2).long(), torch.ones(1, 2).bool())


def test_character_tokenizer_round_trip(tokenizer, tmp_path):
    text = "12 + 34 = 46"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer("a")["input_ids"] == [tokenizer.unk_token_id]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == ids and again.eos_token_id == tokenizer.eos_token_id
    for alphabet in ("", "aa"):
        with pytest.raises(ValueError, match="alphabet"):
            models.character_tokenizer(alphabet)


def test_saved_models_load_again(model, tokenizer, tmp_path):
    models.save_pretrained(model, tokenizer, tmp_path / "plain")
    again = models.load_model(str(tmp_path / "plain"))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "none").mkdir()
    for load in (models.load_model, models.load_tokenizer):
        with pytest.raises(ValueError, match=r"no config\.json"):
            load(str(tmp_path / "none"))
        with pytest.raises(ValueError, match="is not a directory"):
            load(str(tmp_path / "nowhere"))


def test_lora_trains_adapters_and_saves_a_merged_model(model, tokenizer, tmp_path):
    plain = [p.clone() for p in model.parameters()]
    lora = models.add_lora(model, rank=4, alpha=8, dropout=0.0, target_modules="all-linear", seed=0)
    trained = [p for p in lora.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < sum(p.numel() for p in plain) / 2
    ids, mask = torch.tensor([[4, 5]]), torch.ones(1, 2, dtype=torch.bool)
    models.completion_logprobs(lora, [[3]], ids, mask).logprob.sum().backward()
    with torch.no_grad():
        for p in trained:
            p.add_(0.1)
    want = models.completion_logprobs(lora, [[3]], ids, mask).logprob
    models.save_pretrained(lora, tokenizer, tmp_path)
    merged = models.load_model(str(tmp_path)).eval()
    got = models.completion_logprobs(merged, [[3]], ids, mask).logprob
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_lora_on_the_head_is_refused(model):
    options = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["lm_head"], "seed": 0}
    with pytest.raises(ValueError, match="LoRA on the lm-head"):
        models.lm_head(models.add_lora(model, **options))


def test_vocabulary_mismatch_is_named(model):
    with pytest.raises(
        ValueError, match="tokenizer has 20 tokens but the model's vocabulary only 17"
    ):
        models.check_vocabulary(model, models.character_tokenizer("0123456789abcdefg"))
