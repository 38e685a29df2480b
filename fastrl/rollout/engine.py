"""The rollout engine: generation in process, on the trainer's own parameters."""

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastrl.kernels import Samples
from fastrl.models import backbone, lm_head
from fastrl.rollout import generation
from fastrl.rollout.architecture import UnsupportedModel
from fastrl.rollout.cache import Branch
from fastrl.rollout.decoder import Decoder
from fastrl.rollout.device import DeviceDecoder
from fastrl.rollout.huggingface import HuggingFaceRows
from fastrl.rollout.int8 import Int8Linears
from fastrl.rollout.native import CpuRows, Decodes, NativeRows
from fastrl.rollout.request import Prompts, check_prompts, check_request, context_length, encode
from fastrl.rollout.sampling import GroupStop, Rollouts, SamplingParams
from fastrl.rollout.weights import WeightVersion

CHECKED = 8  # tokens that the native decoder and Hugging Face's forward are compared on


class RolloutEngine:
    """Generates groups of completions; the prompt of a group is prefilled once.

    Llama, Mistral, Qwen2, Qwen3 and Gemma 2, with LoRA adapters or without, decode natively, on the
    parameters where they lie, after one comparison with the model's own forward: on a CPU in C++,
    on a GPU with Triton under CUDA graphs. Other models decode through that forward, with one
    warning on a CPU; `fallback_reason` says why, and is None otherwise.

    `weight_version` counts changes of the weights, and every batch of rollouts and every branch
    carries it. In-place writes to parameters and moves of them are noticed, on a CPU also those of
    PyTorch's fused optimizers, as are adapters that are switched, scaled, disabled or merged; other
    writes past autograd, such as to a part of `parameter.data`, need `weights_changed`. At most
    `max_rows` completions are decoded at a time; where some end, waiting groups take their places.

    scheme="int8" (on a CPU, for models that decode natively) takes the products of the projections
    and of the lm-head in int8, as `quantized_linear` does: each row of a weight and each row of
    activations has its scale. Log-probs are those of the model so rounded, which is what was
    sampled from; the trainer's differ, and `losses.mismatch_weights` corrects for that. It keeps
    int8 copies of these weights, `int8_nbytes` in all, quantized again when the weights change.
    Embedding, norms, attention and adapters are as without it. Another scheme raises `ValueError`,
    and so do, when they are used, a model that cannot have it and weights with NaN or infinities.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_rows: int = 256,
        scheme: Literal["int8"] | None = None,
    ):
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows} must be at least 1")
        if scheme not in (None, "int8"):
            raise ValueError(f"scheme={scheme!r} is unknown; use 'int8' or None")
        self.model = model
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.scheme = scheme
        self.fallback_reason: str | None = None
        self._version = WeightVersion(model)
        self._made_for: tuple | None = None  # parameters' addresses and adapters: _decoder's
        self._decoder: Decodes | None = None
        self._int8: Int8Linears | None = None
        self._quantized: int | None = None  # the version that it was made from
        self._changed = False  # weights, by what we were told, since then

    @property
    def weight_version(self) -> int:
        """How often the weights have changed since the engine was made."""
        return self._version.current()

    def weights_changed(self) -> None:
        """Note that the model's parameters were updated."""
        self._version.changed()
        self._changed = True

    @property
    def int8_nbytes(self) -> int:
        """Bytes of int8 copies of weights, none before the first use."""
        return self._int8.nbytes if self._int8 else 0

    def _find_decoder(self, version: int) -> Decodes | None:
        """The native decoder of the model as it is now, at a weight_version, or None."""
        if (places := self._version.places()) != self._made_for:
            self._make_decoder(places)
        if self._int8 is not None and version != self._quantized:
            self._quantized = None
            self._int8.refresh(self._changed)
            self._quantized, self._changed = version, False
        return self._decoder

    @torch.no_grad()
    def _make_decoder(self, places: tuple) -> None:
        warned = self.fallback_reason is not None
        self._made_for = self._decoder = self._int8 = self._quantized = self.fallback_reason = None
        on_cpu = self._device().type == "cpu"
        if self.scheme and not on_cpu:
            raise ValueError(
                f"scheme={self.scheme!r} needs a CPU; the model is on {self._device()}"
            )
        try:
            decoder: Decodes = (Decoder if on_cpu else DeviceDecoder)(self.model)
            self._check(decoder)
            if self.scheme:
                self._int8 = Int8Linears()
                decoder = Decoder(self.model, self._int8)
            self._decoder = decoder
        except UnsupportedModel as error:
            if self.scheme:
                raise ValueError(
                    f"scheme={self.scheme!r} needs a model that decodes natively: {error}"
                ) from error
            self.fallback_reason = str(error)
            if not warned and on_cpu:
                warnings.warn(
                    f"rollouts decode through Hugging Face's slower forward: {error}",
                    RuntimeWarning,
                    stacklevel=6,
                )
        self._made_for = places

    def _check(self, decoder: Decodes) -> None:
        """Compare with the model's own forward: a subclass or a hook may have changed it."""
        model = backbone(self.model)
        limits = CHECKED, lm_head(self.model).weight.shape[0], context_length(self.model) or CHECKED
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
        first_row: int = 0,
        progress: bool = False,
    ) -> Rollouts:
        """Sample `group_size` completions for each prompt.

        prompts are strings (with a tokenizer) or lists of token ids; max_new_tokens, one for each
        prompt, replaces that of `sampling`. Whenever completions of a group end while others go on,
        `group_stop` is asked which of these to end too. first_row is the number of the first
        completion, where these are a part of more: what is drawn depends on it. progress shows a
        bar with tokens per second. Raises `ValueError` for empty prompts, for prompts that leave no
        room for `max_new_tokens` in the model's context, for ids outside the vocabulary, for
        strings or stop strings without a tokenizer, and for `group_stop` with groups of more than
        `max_rows`.
        """
        if group_stop is not None and group_size > self.max_rows:
            raise ValueError(
                f"group_stop needs whole groups, but group_size={group_size} is more than "
                f"max_rows={self.max_rows}"
            )
        request = check_request(
            self.model,
            self.tokenizer,
            prompts,
            group_size,
            sampling or SamplingParams(),
            max_new_tokens,
        )
        ending = generation.Ending(request.stop_tokens, self.tokenizer, group_size, group_stop)
        version = self.weight_version
        decoder = self._find_decoder(version)
        rows: generation.Rows
        if decoder is None:
            rows = HuggingFaceRows(backbone(self.model), self._device())
        else:
            rows = (NativeRows if isinstance(decoder, DeviceDecoder) else CpuRows)(decoder, version)
        was_training = self.model.training
        if decoder is None:  # others compute what it computes in eval mode
            self.model.eval()
        try:
            with generation.progress_bar(progress, sum(request.limits) * group_size) as bar:
                completions = generation.generate(
                    rows, lm_head(self.model), request, ending, self.max_rows, first_row, bar
                )
        finally:
            if decoder is None:
                self.model.train(was_training)
        return completions.rollouts(request, version, self._device())

    @torch.no_grad()
    def prefill(self, prompt: str | Sequence[int]) -> Branch:
        """The prompt's keys and values, and in `hidden` where its last token left it.

        With `fork`, `rewind`, `step` and `sample`, trees of completions can be grown. Raises
        `ValueError` as `generate` does, `RuntimeError` with the reason for a model that does not
        decode natively.
        """
        (ids,) = encode(self.tokenizer, [prompt], SamplingParams())
        check_prompts(self.model, [ids], [0])
        decoder, version = self._native()
        return decoder.prefill([ids], version)[0]

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
        (decoder, version), vocab = self._native(), lm_head(self.model).weight.shape[0]
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
            if b.weight_version != version:
                raise ValueError(
                    f"a branch is of weight_version={b.weight_version}, the weights are of "
                    f"{version}; prefill it again"
                )
        context = context_length(self.model)
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

        seeds and positions `[M]` int64 decide the draw: equal ones draw alike. Raises `ValueError`
        as `linear_sample` does.
        """
        head = lm_head(self.model)
        if self.scheme is None:
            return generation.draw(hidden, head, sampling, seeds, positions)
        decoder, _ = self._native()
        assert isinstance(decoder, Decoder)
        return decoder.draw(hidden, head, sampling, seeds, positions)

    def _native(self) -> tuple[Decodes, int]:
        version = self.weight_version
        decoder = self._find_decoder(version)
        if decoder is None:
            raise RuntimeError(f"branches need the native decoder: {self.fallback_reason}")
        return decoder, version

    def _device(self) -> torch.device:
        return lm_head(self.model).weight.device
