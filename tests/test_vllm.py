"""Rollouts from a vLLM server, against a stand-in on loopback that samples from real weights."""

import copy
import json
import time

import pytest
import torch
from safetensors.torch import load_file
from vllm_server import break_off, drop, hang, serving, status, trickle

from fastrl import train
from fastrl.models import add_lora, completion_logprobs
from fastrl.rollout import RolloutEngine, SamplingParams, ServerError, VllmEngine

PROMPTS = ["1+2=", "12 - 7=", "3"]
SAMPLING = SamplingParams(max_new_tokens=6, seed=3)


@pytest.fixture
def server(model, tokenizer):
    stale = copy.deepcopy(model)  # other weights than the trainer's
    with torch.no_grad():
        for p in stale.parameters():
            p.mul_(1.5)
    with serving(stale, tokenizer) as up:
        yield up


@pytest.fixture
def engine(server, model, tokenizer, tmp_path):
    return VllmEngine(
        model, tokenizer, server=server.url, weights=tmp_path / "w", timeout=20, update_timeout=20
    )


def asked(server, path):
    return [body for p, body in server.seen if p.partition("?")[0] == path]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_trainers_weights(engine, model, temperature):
    sampling = SamplingParams(temperature, max_new_tokens=6, seed=3)
    out = engine.generate(PROMPTS, 4, sampling)
    again = completion_logprobs(
        model, out.prompt_ids, out.completion_ids, out.completion_mask, temperature=temperature
    )
    assert (again.logprob - out.logprobs)[out.completion_mask].abs().max() < 1e-5
    assert torch.equal(out.logprobs, out.untruncated_logprobs)
    assert out.logprobs.dtype == torch.float32 and out.completion_ids.dtype == torch.int64
    assert out.layout.group_size == 4 and out.layout.prompt_lengths == (4, 7, 1)
    assert list(out.layout.completion_lengths) == out.completion_mask.sum(-1).tolist()
    assert len({tuple(ids) for ids in out.completion_lists()}) > 6
    for ids, reason in zip(out.completion_lists(), out.finish_reason, strict=True):
        assert (ids[-1] == 1) == (reason == "stop") and (reason == "stop" or len(ids) == 6)
    same = engine.generate(PROMPTS, 4, sampling)
    assert torch.equal(same.completion_ids, out.completion_ids)


def test_greedy_equals_the_engine_in_process(engine, server, model, tokenizer):
    sampling = SamplingParams(temperature=0, max_new_tokens=6)
    limits = [3, 6, 2]
    want = RolloutEngine(model, tokenizer).generate(PROMPTS, 2, sampling, max_new_tokens=limits)
    out = engine.generate(PROMPTS, 2, sampling, max_new_tokens=limits)
    assert torch.equal(out.completion_ids, want.completion_ids)
    assert out.finish_reason == want.finish_reason
    torch.testing.assert_close(
        out.untruncated_logprobs, want.untruncated_logprobs, rtol=0, atol=1e-5
    )
    assert torch.equal(out.logprobs, want.logprobs)
    body = asked(server, "/v1/completions")[0]
    assert (body["n"], body["temperature"], body["ignore_eos"]) == (1, 0, True)


def test_stop_strings(engine, tokenizer):
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True, stop=("1", "23"), seed=1)
    out = engine.generate(PROMPTS, 8, sampling)
    texts = tokenizer.batch_decode(out.completion_lists())
    assert {"stop", "length"} >= set(out.finish_reason) and "stop" in out.finish_reason
    for text, reason in zip(texts, out.finish_reason, strict=True):
        assert (reason == "stop") == text.endswith(("1", "23"))


def test_weights_are_handed_over_when_they_change(engine, server, model, tmp_path):
    for version in range(3):
        if version > 0:
            with torch.no_grad():
                model.model.norm.weight.mul_(1.1)
        for _ in range(2):
            out = engine.generate(PROMPTS, 2, SAMPLING)
            assert out.weight_version == engine.weight_version == version
        again = completion_logprobs(model, out.prompt_ids, out.completion_ids, out.completion_mask)
        assert (again.logprob - out.logprobs)[out.completion_mask].abs().max() < 1e-5
    loads = asked(server, "/collective_rpc")
    assert len(loads) == 3 and len({body["kwargs"]["weights_path"] for body in loads}) == 3
    resets = [p for p, _ in server.seen if p.startswith("/reset_prefix_cache")]
    assert resets == ["/reset_prefix_cache?reset_running_requests=true"] * 3
    (folder,) = (tmp_path / "w").iterdir()  # the others are gone, and nothing half-written is left
    assert str(folder) == loads[-1]["kwargs"]["weights_path"]
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(saved["model.norm.weight"], model.model.norm.weight)
    engine.weights_changed()
    assert engine.weight_version == 3


def test_sleep_between_calls(server, model, tokenizer, tmp_path):
    engine = VllmEngine(
        model, tokenizer, server=server.url, weights=tmp_path, update="sleep", timeout=20
    )
    engine.generate(PROMPTS, 2, SAMPLING)
    del server.seen[:]
    engine.generate(PROMPTS, 2, SAMPLING)
    paths = [p for p, _ in server.seen if not p.startswith("/v1")]
    assert paths == [
        "/wake_up?tags=weights",
        "/collective_rpc",
        "/wake_up?tags=kv_cache",
        "/reset_prefix_cache?reset_running_requests=true",
        "/update_weight_version",
        "/weight_info",
        "/sleep?level=2",
    ]


def test_lora_is_handed_over_merged(server, model, tokenizer, tmp_path):
    lora = add_lora(
        copy.deepcopy(model), rank=2, alpha=4, dropout=0.0, target_modules=["q_proj"], seed=0
    )
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    engine = VllmEngine(lora, tokenizer, server=server.url, weights=tmp_path)
    out = engine.generate(PROMPTS, 2, SAMPLING)
    again = completion_logprobs(lora, out.prompt_ids, out.completion_ids, out.completion_mask)
    assert (again.logprob - out.logprobs)[out.completion_mask].abs().max() < 1e-5


def test_an_older_server_names_tokens_in_its_log_probs(model, tokenizer, tmp_path):
    with serving(model, tokenizer, labels=False) as server:

        def older(path, answer):
            for choice in answer["choices"] if path == "/v1/completions" else ():
                del choice["token_ids"], choice["prompt_token_ids"]
            return answer

        server.change = older
        engine = VllmEngine(model, tokenizer, server=server.url, weights=tmp_path)
        out = engine.generate(PROMPTS, 2, SAMPLING)
        again = completion_logprobs(model, out.prompt_ids, out.completion_ids, out.completion_mask)
        assert (again.logprob - out.logprobs)[out.completion_mask].abs().max() < 1e-5


def test_log_probs_without_the_temperature_are_refused(model, tokenizer, tmp_path):
    with serving(model, tokenizer, processed=False) as server:
        engine = VllmEngine(model, tokenizer, server=server.url, weights=tmp_path)
        engine.generate(PROMPTS, 2, SAMPLING)
        with pytest.raises(ServerError, match="--logprobs-mode processed_logprobs"):
            engine.generate(PROMPTS, 2, SamplingParams(0.7, max_new_tokens=6))


def changed(**fields):
    """An answer with these fields of its first choice replaced; None removes one."""

    def change(path, answer):
        for choice in answer["choices"][-1:] if path == "/v1/completions" else ():
            for name, value in fields.items():
                holder = choice["logprobs"] if name in choice["logprobs"] else choice
                holder[name] = value(holder[name]) if callable(value) else value
        return answer

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(token_logprobs=lambda v: v[:-1]), r"log-probs for \d tokens"),
        (changed(token_logprobs=lambda v: [None, *v[1:]]), "log-probs that are no numbers"),
        (changed(token_logprobs=lambda v: [float("nan"), *v[1:]]), "log-probs that are no numbers"),
        (changed(token_ids=lambda v: [999, *v[1:]]), "outside the vocabulary of 17"),
        (changed(token_ids=[]), "a completion is empty"),
        (changed(token_ids=None, tokens=["a"]), "no token ids; vLLM returns them"),
        (changed(logprobs=None), "the answer holds no 'logprobs'"),
        (changed(prompt_token_ids=[3]), "read other token ids than it was sent"),
        (changed(finish_reason="abort"), r"broke off after \d of 6 tokens"),
        (changed(finish_reason=None), "broke off"),
        (
            changed(
                finish_reason="length",
                token_ids=lambda v: v[:1],
                token_logprobs=lambda v: v[:1],
            ),
            "broke off after 1 of 6 tokens",
        ),
        (
            changed(
                finish_reason="stop",
                token_ids=lambda v: [5],
                token_logprobs=lambda v: v[:1],
            ),
            "stopped at token 5.*--generation-config vllm",
        ),
        (lambda path, a: {"choices": a["choices"][1:]} if "choices" in (a or {}) else a, "1 compl"),
        (lambda path, a: [] if path == "/v1/completions" else a, "holds no 'choices'"),
        (lambda path, a: {"data": []} if path == "/v1/models" else a, "serves no model"),
        (
            lambda path, a: {"weight_version": "other"} if path == "/weight_info" else a,
            "the server holds weights 'other', not '",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(engine, server, change, message):
    server.change = change
    with pytest.raises(ServerError, match=message):
        engine.generate(PROMPTS[:1], 2, SAMPLING)


def test_waits_end(server, model, tokenizer, tmp_path):
    for path, fault, patience in (
        ("/v1/completions", hang, {"timeout": 0.4}),
        ("/v1/completions", trickle, {"timeout": 0.4}),
        ("/collective_rpc", hang, {"update_timeout": 0.4}),
    ):
        engine = VllmEngine(model, tokenizer, server=server.url, weights=tmp_path, **patience)
        server.faults = {path: [fault]}
        start = time.monotonic()
        with pytest.raises(ServerError, match=f"{path}: no whole answer within 0.4 s"):
            engine.generate(PROMPTS, 2, SAMPLING)
        assert time.monotonic() - start < 4.5  # not the 5 s for which the server is silent
        assert not server.faults[path]  # and not asked again


def test_what_may_be_repeated_is(engine, server):
    engine._server._pause = 0.01
    want = engine.generate(PROMPTS, 2, SAMPLING)
    server.faults = {"/v1/completions": [status(503), drop, break_off]}
    got = engine.generate(PROMPTS, 2, SAMPLING)
    assert torch.equal(got.completion_ids, want.completion_ids)
    server.faults = {"/v1/completions": [status(503)] * 20}
    with pytest.raises(ServerError, match="status 503"):
        engine.generate(PROMPTS[:1], 2, SAMPLING)
    assert len(server.faults["/v1/completions"]) == 17
    for fault, message in (
        (status(500), "status 500: out of memory"),
        (status(200, b"<html>"), "the answer is no JSON: '<html>'"),
    ):
        server.faults = {"/v1/completions": [fault]}
        with pytest.raises(ServerError, match=message):
            engine.generate(PROMPTS[:1], 2, SAMPLING)
    # Weights that may or may not have been loaded are not loaded twice, but again next time.
    engine.weights_changed()
    server.faults = {"/collective_rpc": [drop]}
    with pytest.raises(ServerError, match="/collective_rpc: is the server up"):
        engine.generate(PROMPTS, 2, SAMPLING)
    before = len(asked(server, "/collective_rpc"))
    engine.generate(PROMPTS, 2, SAMPLING)
    assert len(asked(server, "/collective_rpc")) == before + 1


def test_servers_that_cannot_serve_are_named(server, model, tokenizer, tmp_path):
    def ask(message, **options):
        options = {"server": server.url, "weights": tmp_path, "retries": 0} | options
        with pytest.raises(ServerError, match=message):
            VllmEngine(model, tokenizer, **options).generate(PROMPTS, 2, SAMPLING)

    ask("is the server up", server="http://127.0.0.1:9")
    ask("serves policy, not 'other'", served_model="other")
    server.faults = {"/collective_rpc": [status(404)]}
    ask("VLLM_SERVER_DEV_MODE=1")
    server.context = 8
    ask("may take 13 tokens, the server's max_model_len is 8")
    assert not any(path.startswith("/v1/completions") for path, _ in server.seen)


def test_bad_settings_are_named(engine, server, model, tmp_path):
    for options, message in (
        ({"server": "localhost:8000"}, "server='localhost:8000' must be an address"),
        ({"timeout": 0.0}, "timeout=0"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"retries": -1}, "retries=-1"),
        ({"update": "restart"}, "update='restart'"),
    ):
        with pytest.raises(ValueError, match=message):
            VllmEngine(model, **({"server": server.url, "weights": tmp_path} | options))
    with pytest.raises(ValueError, match=r"top_p=0.9.*untruncated"):
        engine.generate(PROMPTS, 2, SamplingParams(top_p=0.9))
    with pytest.raises(ValueError, match="group_stop needs the in-process engine"):
        engine.generate(PROMPTS, 2, SAMPLING, group_stop=lambda group: True)
    with pytest.raises(ValueError, match="prompts is empty"):
        engine.generate([], 2, SAMPLING)
    assert not server.seen


def test_the_key_is_sent_and_progress_shown(server, model, tokenizer, tmp_path, capsys):
    engine = VllmEngine(model, tokenizer, server=server.url, weights=tmp_path, api_key="k")
    out = engine.generate([[4, 5]], 2, SAMPLING, progress=True)
    assert server.keys == {"Bearer k"} and out.prompt_ids == [[4, 5]] * 2
    assert "tokens/s" in capsys.readouterr().out


def test_a_recipe_names_the_server(server, recipe, tmp_path):
    recipe["rollout"] = {"server": server.url, "weights": str(tmp_path / "w")}
    del recipe["stages"]["sft"]
    server.engine = None  # until weights come
    folder = train.run(train.Config(**recipe), out=str(tmp_path / "run"))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    mismatch = [value for step in steps for key, value in step.items() if "mismatch" in key]
    assert mismatch and max(map(abs, mismatch)) < 1e-4
    assert len(asked(server, "/collective_rpc")) >= 3
