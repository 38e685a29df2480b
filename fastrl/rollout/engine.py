"""The rollout engine: generation in process, on the trainer's own parameters."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastrl.kernels import Samples
from fastrl.models import backbone, lm_head
from fastrl.rollout import generation
from fastrl.rollout.cache import Branch
from fastrl.rollout.decoder import (
    Decoder,
    Decodes,
    NativeRows,
    UnsupportedModel,
    fingerprint,
)
from fastrl.rollout.device import DeviceDecoder
from fastrl.rollout.huggingface import HuggingFaceRows
from fastrl.rollout.sampling import GroupLayout, GroupStop, Rollouts, SamplingParams

Prompts = Sequence[str | Sequence[int]]
CHECKED = 8  # tokens that the native decoder and Hugging Face's forward are compared on


class RolloutEngine:
    """Generates groups of completions; the prompt of a group is prefilled once.

    Llama, Mistral, Qwen2, Qwen3 and Gemma 2 decode natively, on the parameters where they lie,
    after one comparison with the model's own forward: on a CPU in C++, on a GPU with Triton under
    CUDA graphs. Other models decode through that forward, with one warning on a CPU;
    `fallback_reason` says why, and is None otherwise.

    `weight_version` counts changes of the weights, and every batch of rollouts and every branch
    carries it. In-place writes to parameters and moves of them are noticed, and so is
    `weights_changed`; writes past autograd, such as to `parameter.data`, need that call. At most
    `max_rows` completions are decoded at a time.
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
        self.fallback_reason: str | None = None
        self._version = 0
        self._seen = fingerprint(model)
        self._read: list[int] | None = None  # addresses of the parameters that _decoder reads
        self._decoder: Decodes | None = None

    @property
    def weight_version(self) -> int:
        """How often the weights have changed since the engine was made."""
        now = fingerprint(self.model)
        if now != self._seen:
            self._seen = now
            self._version += 1
        return self._version

    def weights_changed(self) -> None:
        """Note that the model's parameters were updated."""
        self._seen = fingerprint(self.model)
        self._version += 1

    @torch.no_grad()
    def _find_decoder(self) -> Decodes | None:
        """The native decoder of the model as it is now, or None."""
        addresses = [address for address, _ in self._seen]
        if addresses == self._read:
            return self._decoder
        warned = self.fallback_reason is not None
        self._read, self._decoder, self.fallback_reason = addresses, None, None
        try:
            kind = Decoder if self._device().type == "cpu" else DeviceDecoder
            decoder: Decodes = kind(self.model)
            self._check(decoder)
            self._decoder = decoder
        except UnsupportedModel as error:
            self.fallback_reason = str(error)
            if not warned and self._device().type == "cpu":
                warnings.warn(
                    f"rollouts decode through Hugging Face's slower forward: {error}",
                    RuntimeWarning,
                    stacklevel=4,
                )
        return self._decoder

    def _check(self, decoder: Decodes) -> None:
        """Compare with the model's own forward: a subclass or a hook may have changed it."""
        model = backbone(self.model)
        limits = CHECKED, lm_head(self.model).weight.shape[0], self._context() or CHECKED
        ids = list(range(min(limits)))
        was_training = self.model.training
        self.model.eval()
        tokens = torch.tensor([ids], device=self._device())
        want = model(input_ids=tokens, use_cache=False).last_hidden_state[0, -1]
        self.model.train(was_training)
        where, positions = decoder.place(decoder.prefill([ids[:-1]], 0))
        got = decoder.run(tokens[0, -1:], positions, where)[0]
        gap = (got.float() - want.float()).abs().max() / want.float().abs().max().clamp(min=1.0)
        if not gap < (1e-3 if want.dtype == torch.float32 else 5e-2):
            raise UnsupportedModel(f"its hidden states differ from the native ones by {gap:.2g}")

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        group_size: int = 1,
        sampling: SamplingParams | None = None,
        *,
        max_new_tokens: Sequence[int] | None = None,
        group_stop: GroupStop | None = None,
        progress: bool = False,
    ) -> Rollouts:
        """Sample `group_size` completions for each prompt.

        prompts are strings (with a tokenizer) or lists of token ids; max_new_tokens, one for each
        prompt, replaces that of `sampling`. Whenever completions of a group end while others go on,
        `group_stop` is asked which of these to end too. progress shows a bar with tokens per
        second. Raises `ValueError` for empty prompts, for prompts that leave no room for
        `max_new_tokens` in the model's context, for ids outside the vocabulary, for strings or stop
        strings without a tokenizer, and for `group_stop` with groups of more than `max_rows`.
        """
        sampling = sampling or SamplingParams()
        if group_stop is not None and group_size > self.max_rows:
            raise ValueError(
                f"group_stop needs whole groups, but group_size={group_size} is more than "
                f"max_rows={self.max_rows}"
            )
        prompt_ids = self._encode(prompts, group_size, sampling)
        if not prompt_ids:
            raise ValueError("prompts is empty; give at least one")
        limits = [sampling.max_new_tokens] * len(prompt_ids)
        if max_new_tokens is not None:
            limits = list(max_new_tokens)
            if min(limits, default=1) < 1:
                raise ValueError(f"max_new_tokens={limits} must each be at least 1")
        self._check_prompts(prompt_ids, limits)
        rows = [ids for ids in prompt_ids for _ in range(group_size)]
        row_limits = torch.tensor(limits, device=self._device()).repeat_interleave(group_size)
        ending = generation.Ending(
            self._stop_tokens(sampling),
            self.tokenizer,
            group_size,
            group_stop,
        )
        at_once = max(self.max_rows // group_size * group_size, min(self.max_rows, group_size))
        version, decoder = self.weight_version, self._find_decoder()
        was_training = self.model.training
        self.model.eval()
        try:
            with generation.progress_bar(progress, int(row_limits.sum())) as bar:
                parts = [
                    generation.generate(
                        self._start(decoder, rows[i : i + at_once]),
                        lm_head(self.model),
                        sampling,
                        i,
                        row_limits[i : i + at_once],
                        ending,
                        bar,
                    )
                    for i in range(0, len(rows), at_once)
                ]
        finally:
            self.model.train(was_training)
        counts = torch.cat([part[3] for part in parts])
        steps = int(counts.max())
        tokens, logprobs, untruncated = (
            torch.cat([nn.functional.pad(part[k], (0, steps - part[k].shape[1])) for part in parts])
            for k in range(3)
        )
        return Rollouts(
            prompt_ids=rows,
            completion_ids=tokens,
            completion_mask=torch.arange(steps, device=counts.device) < counts.unsqueeze(-1),
            logprobs=logprobs,
            untruncated_logprobs=untruncated,
            finish_reason=[generation.REASONS[r] for part in parts for r in part[4].tolist()],
            layout=GroupLayout(tuple(map(len, prompt_ids)), tuple(counts.tolist()), group_size),
            weight_version=version,
        )

    @torch.no_grad()
    def prefill(self, prompt: str | Sequence[int]) -> Branch:
        """The prompt's keys and values, and in `hidden` where its last token left it.

        With `fork`, `rewind`, `step` and `sample`, trees of completions can be grown. Raises
        `ValueError` as `generate` does, `RuntimeError` with the reason for a model that does not
        decode natively.
        """
        (ids,) = self._encode([prompt], 1, SamplingParams())
        self._check_prompts([ids], [0])
        return self._native().prefill([ids], self._version)[0]

    def fork(self, branch: Branch, at: int | None = None) -> Branch:
        """A branch of the first `at` tokens (all of them by default), without a copy."""
        return branch.fork(at)

    def rewind(self, branch: Branch, to: int) -> None:
        """Forget all but the first `to` tokens of the branch."""
        branch.rewind(to)

    @torch.no_grad()
    def step(self, branches: Sequence[Branch], tokens: Tensor) -> Tensor:
        """Append a token `[M]` int64 to each branch; final hidden states `[M, H]`.

        Raises `ValueError` for branches named twice or made under other weights, for tokens outside
        the vocabulary, and for branches as long as the model's context.
        """
        decoder, vocab = self._native(), lm_head(self.model).weight.shape[0]
        if not branches or tokens.shape != (len(branches),) or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens must be int64 of shape [{len(branches)}], one for each of at least one "
                f"branch, got {tokens.dtype} {list(tokens.shape)}"
            )
        if len({id(b) for b in branches}) < len(branches):
            raise ValueError("branches holds a branch twice; fork it to go two ways")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
            raise ValueError(f"tokens holds ids outside the vocabulary of {vocab}")
        for b in branches:
            if b.weight_version != self._version:
                raise ValueError(
                    f"a branch is of weight_version={b.weight_version}, the weights are of "
                    f"{self._version}; prefill it again"
                )
        context = self._context()
        if context is not None and max(b.length for b in branches) >= context:
            raise ValueError(f"a branch fills the model's context of {context}")
        layout, positions = decoder.place(branches)
        hidden = decoder.run(tokens.contiguous(), positions, layout)
        for branch, h in zip(branches, hidden, strict=True):
            branch.length += 1
            branch.hidden = h
        return hidden

    @torch.no_grad()
    def sample(
        self, hidden: Tensor, sampling: SamplingParams, *, seeds: Tensor, positions: Tensor
    ) -> Samples:
        """A token and its log-probs for each hidden state `[M, H]`.

        seeds and positions `[M]` int64 decide the draw: equal ones draw alike.
        """
        return generation.draw(hidden, lm_head(self.model), sampling, seeds, positions)

    def _native(self) -> Decodes:
        _ = self.weight_version  # notices changed weights
        decoder = self._find_decoder()
        if decoder is None:
            raise RuntimeError(f"branches need the native decoder: {self.fallback_reason}")
        return decoder

    def _start(self, decoder: Decodes | None, rows: list[list[int]]) -> generation.Rows:
        unique = [i for i in range(len(rows)) if i == 0 or rows[i] is not rows[i - 1]]
        copies = [b - a for a, b in zip(unique, [*unique[1:], len(rows)], strict=True)]
        prompts = [rows[i] for i in unique]
        if decoder is None:
            return HuggingFaceRows(backbone(self.model), self._device(), prompts, copies)
        roots = decoder.prefill(prompts, self._version)
        branches = [r.fork() for r, n in zip(roots, copies, strict=True) for _ in range(n)]
        return NativeRows(decoder, branches)

    def _device(self) -> torch.device:
        return lm_head(self.model).weight.device

    def _context(self) -> int | None:
        return getattr(backbone(self.model).config, "max_position_embeddings", None)

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
        return [
            self.tokenizer(p, add_special_tokens=True)["input_ids"]  # type: ignore[misc]
            if isinstance(p, str)
            else list(p)
            for p in prompts
        ]

    def _check_prompts(self, prompt_ids: list[list[int]], limits: Sequence[int]) -> None:
        if len(limits) != len(prompt_ids):
            raise ValueError(
                f"max_new_tokens holds {len(limits)} limits for {len(prompt_ids)} prompts"
            )
        context, vocab = self._context(), lm_head(self.model).weight.shape[0]
        for i, (ids, limit) in enumerate(zip(prompt_ids, limits, strict=True)):
            if not ids:
                raise ValueError(f"prompt {i} is empty; give it at least one token")
            if not 0 <= min(ids) <= max(ids) < vocab:
                raise ValueError(f"prompt {i} holds token ids outside the vocabulary of {vocab}")
            if context is not None and len(ids) + limit > context:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens and max_new_tokens={limit}: "
                    f"more than the model's context of {context}"
                )

    def _stop_tokens(self, sampling: SamplingParams) -> list[int]:
        eos = sampling.eos_token_id
        if sampling.ignore_eos:
            return []
        if eos is None:
            eos = getattr(self.tokenizer, "eos_token_id", None)
        if eos is None:
            eos = backbone(self.model).config.eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
