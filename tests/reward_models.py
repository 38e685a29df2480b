"""Tiny reward models with random weights, one of each family, and pairs to score."""

import torch
from families import FAMILIES, SIZES, VOCAB
from transformers import (
    Gemma2ForSequenceClassification,
    LlamaForSequenceClassification,
    MistralForSequenceClassification,
    Qwen2ForSequenceClassification,
    Qwen3ForSequenceClassification,
)

CLASSES = {
    "llama": LlamaForSequenceClassification,
    "llama3": LlamaForSequenceClassification,
    "mistral": MistralForSequenceClassification,
    "qwen2": Qwen2ForSequenceClassification,
    "qwen3": Qwen3ForSequenceClassification,
    "gemma2": Gemma2ForSequenceClassification,
}


def tiny(family="qwen3", dtype=torch.float32, **changes):
    """In eval mode, with no weight at 0 or 1 and attention far from uniform."""
    _, config, options = FAMILIES[family]
    arguments = {"num_labels": 1, "attn_implementation": "eager"} | SIZES | options | changes
    torch.manual_seed(0)
    model = CLASSES[family](config(**arguments)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
            else:
                p.normal_(std=0.2)
    return model.to(dtype)


def pairs():
    """Prompts and completions as ids: shared prompts apart from each other, empty completions."""
    g = torch.Generator().manual_seed(1)

    def draw(n):
        return torch.randint(2, VOCAB, (n,), generator=g).tolist()

    long, short, other = draw(13), draw(1), draw(30)
    prompts = [long, long, short, other, long, other, []]
    return prompts, [draw(n) for n in (4, 0, 7, 1, 12, 0, 3)]


def truth(model, prompts, completions):
    """Hugging Face's own scores `[B, K]`, each pair alone and unpadded."""
    with torch.no_grad():
        rows = [
            model(torch.tensor([p + c])).logits[0]
            for p, c in zip(prompts, completions, strict=True)
        ]
    return torch.stack(rows)
