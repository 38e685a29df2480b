"""Attention of groups of completions that share their prompt."""
