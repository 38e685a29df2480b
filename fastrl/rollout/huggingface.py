"""Decoding through Hugging Face's own forward, for models that the native decoder does not know."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fastrl.rollout.generation import Drawn, Turn


class HuggingFaceRows:
    """Rows that decode together, each prompt prefilled once and its cache copied for its rows.

    `hidden` `[M, H]` holds the final hidden states of the last tokens.
    """

    joins = False  # its cache is one tensor, padded to the left: rows begin together

    def __init__(self, model: PreTrainedModel, device: torch.device):
        self._model = model
        self._device = device
        self.hidden = torch.empty(0, device=device)
        self._unread: Tensor | None = None  # tokens that the rows drew last

    def add(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> None:
        """Some rows of each prompt, in place of those there were."""
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        attention = torch.zeros(len(prompts), width, dtype=torch.int64)
        for k, prompt in enumerate(prompts):
            ids[k, width - len(prompt) :] = torch.tensor(prompt)
            attention[k, width - len(prompt) :] = 1
        ids, attention = ids.to(self._device), attention.to(self._device)
        self._cache = DynamicCache(config=self._model.config)
        hidden = self._forward(ids, attention, (attention.cumsum(-1) - 1).clamp(min=0))
        owner = torch.arange(len(prompts)).repeat_interleave(torch.tensor(copies)).to(self._device)
        if len(owner) > len(prompts):
            self._cache.batch_select_indices(owner)
        self.hidden, self._attention, self._unread = hidden[owner], attention[owner], None
        self._lengths = self._attention.sum(-1)

    def _forward(self, ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        out = self._model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        return out.last_hidden_state[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        if len(rows):
            self._cache.batch_select_indices(rows)
            self._attention, self._lengths = self._attention[rows], self._lengths[rows]
            self.hidden = self.hidden[rows]
            self._unread = None if self._unread is None else self._unread[rows]

    def draw(self, turn: Turn) -> Drawn:
        """A token for each row."""
        if self._unread is not None:
            self.step(self._unread)
        drawn = turn.once(self.hidden)
        self._unread = drawn.last()
        return drawn

    def step(self, tokens: Tensor) -> None:
        """Append a token to each row."""
        ones = self._attention.new_ones(len(tokens), 1)
        self._attention = torch.cat([self._attention, ones], dim=1)
        self.hidden = self._forward(
            tokens.unsqueeze(-1), self._attention, self._lengths.unsqueeze(-1)
        )
        self._lengths = self._lengths + 1
