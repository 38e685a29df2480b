"""The rollout engine: generation in process, on the trainer's own parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from fastrl.kernels import linear_sample
from fastrl.models import backbone, lm_head
from fastrl.rollout.sampling import GroupLayout, Rollouts, SamplingParams

Prompts = Sequence[str] | Sequence[Sequence[int]]


class RolloutEngine:
    """Generates groups of completions; the prompt of a group is prefilled once.

    `weight_version` counts the calls of `weights_changed`, and every batch of rollouts carries it.
    At most `max_rows` completions are decoded at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_rows: int = 256,
    ):
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows} must be at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.weight_version = 0

    def weights_changed(self) -> None:
        """Note that the model's parameters were updated."""
        self.weight_version += 1

    @torch.no_grad()
    def generate(
        self, prompts: Prompts, group_size: int = 1, sampling: SamplingParams | None = None
    ) -> Rollouts:
        """Sample `group_size` completions for each prompt.

        prompts are strings (with a tokenizer) or lists of token ids. Raises `ValueError` for empty
        prompts, for prompts that leave no room for `max_new_tokens` in the model's context, for ids
        outside the vocabulary, and for strings or stop strings without a tokenizer.
        """
        sampling = sampling or SamplingParams()
        prompt_ids = self._encode(prompts, group_size, sampling)
        rows = [ids for ids in prompt_ids for _ in range(group_size)]
        was_training = self.model.training
        self.model.eval()
        try:
            parts = [
                self._decode(rows[i : i + self.max_rows], i, sampling)
                for i in range(0, len(rows), self.max_rows)
            ]
        finally:
            self.model.train(was_training)
        if not parts:
            raise ValueError("prompts is empty; give at least one")
        tokens, logprobs, untruncated, count, stopped = (
            torch.cat(c) for c in zip(*parts, strict=True)
        )
        steps = int(count.max())
        mask = torch.arange(steps, device=count.device) < count.unsqueeze(-1)
        return Rollouts(
            prompt_ids=rows,
            completion_ids=tokens[:, :steps],
            completion_mask=mask,
            logprobs=logprobs[:, :steps],
            untruncated_logprobs=untruncated[:, :steps],
            finish_reason=["stop" if s else "length" for s in stopped.tolist()],
            layout=GroupLayout(tuple(map(len, prompt_ids)), tuple(count.tolist()), group_size),
            weight_version=self.weight_version,
        )

    def _device(self) -> torch.device:
        return lm_head(self.model).weight.device

    def _encode(
        self, prompts: Prompts, group_size: int, sampling: SamplingParams
    ) -> list[list[int]]:
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of strings or of token ids, got one string")
        if group_size < 1:
            raise ValueError(f"group_size={group_size} must be at least 1")
        if self.tokenizer is None and (sampling.stop or any(isinstance(p, str) for p in prompts)):
            raise ValueError(
                "text prompts and stop strings need a tokenizer: RolloutEngine(model, tokenizer)"
            )
        encoded = [
            self.tokenizer(p, add_special_tokens=True)["input_ids"]  # type: ignore[misc]
            if isinstance(p, str)
            else list(p)
            for p in prompts
        ]
        context = getattr(backbone(self.model).config, "max_position_embeddings", None)
        vocab = lm_head(self.model).weight.shape[0]
        for i, ids in enumerate(encoded):
            if not ids:
                raise ValueError(f"prompt {i} is empty; give it at least one token")
            if not 0 <= min(ids) <= max(ids) < vocab:
                raise ValueError(f"prompt {i} holds token ids outside the vocabulary of {vocab}")
            if context is not None and len(ids) + sampling.max_new_tokens > context:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens and "
                    f"max_new_tokens={sampling.max_new_tokens}: "
                    f"more than the model's context of {context}"
                )
        return encoded

    def _stop_tokens(self, sampling: SamplingParams) -> list[int]:
        eos = sampling.eos_token_id
        if sampling.ignore_eos:
            return []
        if eos is None:
            eos = getattr(self.tokenizer, "eos_token_id", None)
        if eos is None:
            eos = backbone(self.model).config.eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    def _decode(self, rows: list[list[int]], first_row: int, sampling: SamplingParams):
        """Tokens, log-probs and untruncated ones `[rows, max_new_tokens]`, lengths, stopped."""
        device, model, head = self._device(), backbone(self.model), lm_head(self.model)
        unique = [i for i in range(len(rows)) if i == 0 or rows[i] is not rows[i - 1]]
        copies = torch.tensor([*unique[1:], len(rows)]) - torch.tensor(unique)
        width = max(len(rows[i]) for i in unique)
        ids = torch.zeros(len(unique), width, dtype=torch.int64)
        attention = torch.zeros(len(unique), width, dtype=torch.int64)
        for k, i in enumerate(unique):
            ids[k, width - len(rows[i]) :] = torch.tensor(rows[i])
            attention[k, width - len(rows[i]) :] = 1
        ids, attention, copies = ids.to(device), attention.to(device), copies.to(device)

        cache = DynamicCache(config=model.config)
        hidden = model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        owner = torch.arange(len(unique), device=device).repeat_interleave(copies)
        if len(unique) < len(rows):
            cache.batch_select_indices(owner)
        hidden, attention = hidden[owner], attention[owner]
        lengths = attention.sum(-1)

        stop_tokens = torch.tensor(self._stop_tokens(sampling), dtype=torch.int64, device=device)
        row = torch.arange(first_row, first_row + len(rows), device=device)
        seeds = row_seeds(sampling.seed, row)
        shape = (len(rows), sampling.max_new_tokens)
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        logprobs = torch.zeros(shape, device=device)
        untruncated = torch.zeros(shape, device=device)
        count = torch.full((len(rows),), sampling.max_new_tokens, device=device)
        stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
        live = torch.arange(len(rows), device=device)
        for step in range(sampling.max_new_tokens):
            drawn = linear_sample(
                hidden,
                head.weight,
                seeds=seeds[live],
                positions=torch.full_like(live, step),
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                **head.arguments(),
            )
            tokens[live, step] = drawn.token
            logprobs[live, step] = drawn.logprob
            untruncated[live, step] = drawn.untruncated_logprob
            done = torch.isin(drawn.token, stop_tokens)
            if sampling.stop:
                done |= self._ends_with_stop(tokens[live, : step + 1], sampling.stop).to(device)
            finished = live[done]
            stopped[finished], count[finished] = True, step + 1
            if step + 1 == sampling.max_new_tokens or len(finished) == len(live):
                break
            if len(finished):
                keep = torch.nonzero(~done).squeeze(-1)
                cache.batch_select_indices(keep)
                live, attention, lengths = live[keep], attention[keep], lengths[keep]
                token = drawn.token[keep]
            else:
                token = drawn.token
            attention = torch.cat([attention, attention.new_ones(len(live), 1)], dim=1)
            hidden = model(
                input_ids=token.unsqueeze(-1),
                attention_mask=attention,
                position_ids=(lengths + step).unsqueeze(-1),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        return tokens, logprobs, untruncated, count, stopped

    def _ends_with_stop(self, tokens: Tensor, stop: tuple[str, ...]) -> Tensor:
        # A stop string ends in the newest token, so that token and enough before it decide.
        reach = max(len(s) for s in stop) + 8
        tail = tokens[:, -reach:].tolist()
        before = [t[:-1] for t in tail]
        texts = self.tokenizer.batch_decode(tail)  # type: ignore[union-attr]
        earlier = self.tokenizer.batch_decode(before)  # type: ignore[union-attr]
        return torch.tensor(
            [
                any(s in text and text.count(s) > old.count(s) for s in stop)
                for text, old in zip(texts, earlier, strict=True)
            ]
        )


def row_seeds(seed: int, row: Tensor) -> Tensor:
    """One int64 stream per row, mixed so that neighbouring seeds share none."""
    from fastrl.kernels.logprob.reference import splitmix64

    wrapped = (seed + 2**63) % 2**64 - 2**63
    return splitmix64(splitmix64(torch.full_like(row, wrapped)) + row)
