"""Rollouts from a vLLM server: its OpenAI-compatible HTTP API behind the engine's interface."""

import math
import os
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastrl.models import lm_head, save_pretrained
from fastrl.rollout.generation import LENGTH, STOP, Completions, progress_bar, row_seeds
from fastrl.rollout.http import JsonServer, ServerError, StatusError
from fastrl.rollout.request import Prompts, Request, check_request
from fastrl.rollout.sampling import GroupStop, Rollouts, SamplingParams
from fastrl.rollout.weights import WeightVersion

SHORT = 30.0  # seconds for an answer that takes no work
UNKNOWN = (404, 405)  # statuses of a server that has no such endpoint


class VllmEngine:
    """Groups of completions from a vLLM server that is given this model's weights.

    Start the server with `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL`, where MODEL has this model's
    architecture and vocabulary, on a machine that sees the folder `weights`. Before rollouts under
    changed weights these are written there, as safetensors in a new folder that appears whole, and
    the server is told to load them and to forget cached prompts. With `update="sleep"` the server
    (`--enable-sleep-mode`) frees its GPU memory between calls of `generate` and loads the weights
    at each.

    A prompt is one request for `group_size` completions, so that the server's prefix cache serves a
    group. Draws depend on (seed, prompt) and on the server, and differ from `RolloutEngine`'s. For
    temperatures other than 0 and 1 the server needs `--logprobs-mode processed_logprobs`, which is
    checked. Every wait ends: `timeout` bounds one request for completions, `update_timeout` the
    loading of weights, in seconds. `concurrency` requests are under way at a time.

    Raises `ServerError` for a server that is down, late or serves another model, and for answers
    without token ids or log-probs, broken off, or from other weights than those handed over.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        server: str,
        weights: str | Path,
        served_model: str | None = None,
        update: Literal["reload", "sleep"] = "reload",
        timeout: float = 600.0,
        update_timeout: float = 600.0,
        concurrency: int = 32,
        retries: int = 2,
        api_key: str | None = None,
    ):
        for name, value, least in (
            ("timeout", timeout, 1e-3),
            ("update_timeout", update_timeout, 1e-3),
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name}={value} must be at least {least:g}")
        if update not in ("reload", "sleep"):
            raise ValueError(f"update={update!r} must be 'reload' or 'sleep'")
        self.model = model
        self.tokenizer = tokenizer
        self._server = JsonServer(server, retries=retries, api_key=api_key)
        self._weights = Path(weights).absolute()
        self._update = update
        self._timeout, self._update_timeout = timeout, update_timeout
        self._concurrency = concurrency
        self._version = WeightVersion(model)
        self._wanted_model = served_model
        self._served: tuple[str, int | None] | None = None  # name, context; once asked
        self._tempered: bool | None = None  # whether log-probs are at the temperature; once asked
        self._run = uuid.uuid4().hex[:12]
        self._written = self._loaded = -1  # weight versions
        self._asleep = False
        self._label: str | None = None  # of the weights, where the server keeps one

    @property
    def weight_version(self) -> int:
        """How often the weights have changed since the engine was made."""
        return self._version.current()

    def weights_changed(self) -> None:
        """Note that the model's parameters were updated."""
        self._version.changed()

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
        """Sample `group_size` completions for each prompt, as `RolloutEngine.generate` does.

        Raises `ValueError` as that does, and for what the server cannot do: `group_stop`, and
        top_k, top_p and min_p, whose untruncated log-probs it does not return.
        """
        sampling = sampling or SamplingParams()
        if group_stop is not None:
            raise ValueError("group_stop needs the in-process engine: the server ends rows alone")
        if sampling.temperature > 0 and (sampling.top_k, sampling.top_p, sampling.min_p) != (
            0,
            1.0,
            0.0,
        ):
            raise ValueError(
                f"top_k={sampling.top_k}, top_p={sampling.top_p}, min_p={sampling.min_p} must be "
                "0, 1, 0: the server returns no untruncated log-probs"
            )
        request = check_request(
            self.model, self.tokenizer, prompts, group_size, sampling, max_new_tokens
        )
        name = self._check_served(request)
        version = self.weight_version
        self._hand_over(version)
        if sampling.temperature not in (0.0, 1.0):
            self._check_temperature(name, request)
        with progress_bar(progress, sum(request.limits) * group_size) as bar:
            out = self._collect(name, request, bar)
        self._check_label()
        if self._update == "sleep":
            self._server.post("/sleep?level=2", timeout=self._update_timeout, repeat=False)
            self._asleep = True
        return out.rollouts(request, version, lm_head(self.model).weight.device)

    def _collect(self, name: str, request: Request, progress: Any) -> Completions:
        size = request.group_size
        out = Completions(torch.tensor(request.limits).repeat_interleave(size))
        pool = ThreadPoolExecutor(min(self._concurrency, len(request.prompts)))
        try:
            waits = {
                pool.submit(self._group, name, request, i): i for i in range(len(request.prompts))
            }
            for done in as_completed(waits):
                i = waits[done]
                for row, (ids, logprobs, reason) in enumerate(done.result(), i * size):
                    n = len(ids)
                    out.tokens[row, :n] = torch.tensor(ids)
                    out.untruncated[row, :n] = torch.tensor(logprobs)
                    if request.sampling.temperature > 0:
                        out.logprobs[row, :n] = out.untruncated[row, :n]
                    out.end(torch.tensor([row]), torch.tensor([n]), reason)
                    progress(n, request.limits[i] - n)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return out

    def _group(self, name: str, request: Request, i: int) -> list[tuple[list[int], Any, int]]:
        """Token ids, log-probs and reason of each completion of a prompt."""
        sampling, size = request.sampling, request.group_size
        greedy = sampling.temperature == 0  # of which the server returns one
        asked = self._body(name, request.prompts[i], sampling.temperature) | {
            "n": 1 if greedy else size,
            "max_tokens": request.limits[i],
            "seed": int(row_seeds(sampling.seed, torch.tensor([i * size]))) % 2**62,
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            "stop_token_ids": request.stop_tokens,
        }
        answer = self._server.post("/v1/completions", asked, timeout=self._timeout, repeat=True)
        choices = _field(answer, "choices", list)
        if len(choices) != asked["n"]:
            raise ServerError(f"prompt {i}: {len(choices)} completions, {asked['n']} were asked")
        choices = sorted(choices, key=lambda c: _field(c, "index", int))
        read = [self._completion(choice, request, i) for choice in choices]
        return read * size if greedy else read

    def _body(self, name: str, prompt: list[int], temperature: float) -> dict[str, Any]:
        # What is left out here would come from the server's generation_config.json.
        return {
            "model": name,
            "prompt": prompt,
            "add_special_tokens": False,
            "temperature": temperature,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,  # the stop tokens say what ends a completion
            "skip_special_tokens": False,
            "logprobs": 0,  # the sampled token's alone
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

    def _completion(self, choice: Any, request: Request, i: int) -> tuple[list[int], Any, int]:
        told = _field(choice, "logprobs", dict)
        values = _field(told, "token_logprobs", list)
        ids = choice.get("token_ids")
        if ids is None:  # before vLLM 0.10.2
            tokens = _field(told, "tokens", list)
            if not all(isinstance(t, str) and t.startswith("token_id:") for t in tokens):
                raise ServerError(
                    "the answer holds no token ids; vLLM returns them (return_token_ids) from "
                    "0.10.2 on"
                )
            ids = [int(t.removeprefix("token_id:")) for t in tokens]
        given = choice.get("prompt_token_ids")
        if given is not None and given != request.prompts[i]:
            raise ServerError(f"prompt {i}: the server read other token ids than it was sent")
        vocab = lm_head(self.model).weight.shape[0]
        if not ids or not all(isinstance(t, int) and 0 <= t < vocab for t in ids):
            raise ServerError(
                f"prompt {i}: a completion is empty or holds ids outside the vocabulary of "
                f"{vocab}: does the server serve another model?"
            )
        if len(values) != len(ids):
            raise ServerError(f"prompt {i}: {len(values)} log-probs for {len(ids)} tokens")
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise ServerError(f"prompt {i}: log-probs that are no numbers: {values[:8]}")
        reason, limit = choice.get("finish_reason"), request.limits[i]
        if reason == "length" and len(ids) == limit:
            return ids, values, LENGTH
        if reason == "stop" and len(ids) <= limit:
            stopped = ids[-1] in request.stop_tokens or choice.get("stop_reason") in (
                request.sampling.stop
            )
            if not stopped:
                raise ServerError(
                    f"prompt {i}: the server stopped at token {ids[-1]}, which ends no completion "
                    "here; start it with --generation-config vllm"
                )
            return ids, values, STOP
        raise ServerError(
            f"prompt {i}: a completion broke off after {len(ids)} of {limit} tokens "
            f"(finish_reason {reason!r})"
        )

    def _check_served(self, request: Request) -> str:
        """The name of the served model, which has to have room for the request."""
        if self._served is None:
            answer = self._server.get("/v1/models", timeout=SHORT)
            models = {_field(m, "id", str): m for m in _field(answer, "data", list)}
            name = self._wanted_model or next(iter(models), "")
            if name not in models:
                raise ServerError(
                    f"{self._server.url} serves {', '.join(models) or 'no model'}, not {name!r}"
                )
            self._served = name, models[name].get("max_model_len")
        name, context = self._served
        most = max(len(p) + n for p, n in zip(request.prompts, request.limits, strict=True))
        if context is not None and most > context:
            raise ServerError(
                f"a prompt and its completion may take {most} tokens, the server's max_model_len "
                f"is {context}"
            )
        return name

    def _check_temperature(self, name: str, request: Request) -> None:
        """Raise unless log-probs follow the temperature: a fourfold one shrinks gaps fourfold."""
        if self._tempered is None:
            told = []
            for temperature in (1.0, 4.0):
                body = self._body(name, request.prompts[0], temperature)
                body |= {"logprobs": 5, "max_tokens": 1, "seed": 0}
                answer = self._server.post(
                    "/v1/completions", body, timeout=self._timeout, repeat=True
                )
                choice = _field(answer, "choices", list)[0]
                told.append(_field(_field(choice, "logprobs", dict), "top_logprobs", list)[0])
            common = sorted(told[0].keys() & told[1].keys(), key=told[0].__getitem__)
            if len(common) < 2:
                raise ServerError("the most likely tokens differ between two temperatures")
            one, four = (t[common[-1]] - t[common[0]] for t in told)
            self._tempered = abs(four - one / 4) < abs(four - one)
        if not self._tempered:
            raise ServerError(
                "the server's log-probs do not follow the temperature; start it with "
                "--logprobs-mode processed_logprobs, or sample at temperature 1"
            )

    def _hand_over(self, version: int) -> None:
        """Make the server sample from the model's weights as they are now."""
        if self._loaded == version and not self._asleep:
            return
        folder = self._weights / f"{self._run}-{version}"
        if self._written != version:
            write_weights(self.model, self.tokenizer, folder)
            self._written = version
        self._loaded = -1
        if self._asleep:
            self._command("/wake_up?tags=weights")
        load = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._command("/collective_rpc", load | {"timeout": self._update_timeout})
        if self._asleep:
            self._command("/wake_up?tags=kv_cache")
            self._asleep = False
        self._command("/reset_prefix_cache?reset_running_requests=true")
        self._label = folder.name
        try:
            self._command("/update_weight_version", {"new_version": self._label})
        except StatusError as error:
            if error.status not in UNKNOWN:
                raise
            self._label = None  # an older server, which cannot say whose weights it holds
        self._loaded = version
        for other in self._weights.glob(f"{self._run}-*"):
            if other != folder:
                shutil.rmtree(other)

    def _command(self, path: str, body: Any = None) -> None:
        try:
            self._server.post(path, body, timeout=self._update_timeout, repeat=False)
        except StatusError as error:
            if error.status in UNKNOWN and "weight_version" not in path:
                raise ServerError(
                    f"{error}; start the server with VLLM_SERVER_DEV_MODE=1 in its environment"
                ) from None
            raise

    def _check_label(self) -> None:
        if self._label is None:
            return
        held = _field(self._server.get("/weight_info", timeout=SHORT), "weight_version", object)
        if held != self._label:
            self._loaded = -1
            raise ServerError(
                f"the server holds weights {held!r}, not {self._label!r}, which it was handed: did "
                "it start anew, or does another run use it?"
            )


def write_weights(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Write model and tokenizer in Hugging Face format to a folder that appears whole."""
    building = folder.with_name(f".{folder.name}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    save_pretrained(model, tokenizer, building)
    for path in building.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def _field(answer: Any, name: str, kind: type) -> Any:
    """answer[name]; `ServerError` unless it is there and of that kind."""
    value = answer.get(name) if isinstance(answer, dict) else None
    if value is None or not isinstance(value, kind):
        raise ServerError(f"the answer holds no {name!r}: {str(answer)[:200]}")
    return value
