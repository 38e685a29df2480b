"""Fused log-probabilities, entropy and sampling from hidden states or logits."""
