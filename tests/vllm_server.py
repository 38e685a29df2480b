"""A stand-in for a vLLM server on loopback: what `VllmEngine` asks of one, on a real model."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import torch
from transformers import AutoModelForCausalLM

from fastrl.kernels import linear_logprob
from fastrl.models import backbone, lm_head
from fastrl.rollout import RolloutEngine, SamplingParams


class VllmServer(ThreadingHTTPServer):
    """Serves `name`; `faults` maps a path to what answers it instead, once for each in the list."""

    daemon_threads = True

    def __init__(self, model, tokenizer, *, context=32, processed=True, labels=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.name, self.context, self.processed, self.labels = "policy", context, processed, labels
        self.engine, self.tokenizer = RolloutEngine(model, tokenizer), tokenizer
        self.label = None
        self.seen = []  # paths and bodies
        self.keys = set()  # what requests were authorized by
        self.faults = {}
        self.change = lambda path, answer: answer  # of an answer, before it is sent
        self.lock = threading.Lock()

    def answer(self, path, body):
        with self.lock:
            if path == "/v1/models":
                return {"data": [{"id": self.name, "max_model_len": self.context}]}
            if path == "/v1/completions":
                return self.complete(body)
            if path == "/collective_rpc":
                assert body["method"] == "reload_weights"
                loaded = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"])
                self.engine = RolloutEngine(loaded, self.tokenizer)
                return {"results": [None]}
            if path == "/update_weight_version" and self.labels:
                self.label = body["new_version"]
                return {"success": True}
            if path == "/weight_info" and self.labels:
                return {"weight_version": self.label}
            if path in ("/reset_prefix_cache", "/sleep", "/wake_up"):
                return None
        return 404

    def complete(self, body):
        temperature = body["temperature"]
        assert not (temperature == 0 and body.get("n", 1) > 1), "as vLLM, n must be 1 when greedy"
        sampling = SamplingParams(
            temperature,
            max_new_tokens=body["max_tokens"],
            eos_token_id=tuple(body.get("stop_token_ids", ())),
            stop=tuple(body.get("stop", ())),
            seed=body["seed"],
        )
        out = self.engine.generate([body["prompt"]], body.get("n", 1), sampling)
        choices = []
        for row, ids in enumerate(out.completion_lists()):
            told = self.logprobs(body["prompt"], ids, temperature)
            tokens = [f"token_id:{t}" for t in ids]
            best = told[0].topk(max(1, body["logprobs"]))
            top = dict(
                zip([f"token_id:{t}" for t in best.indices], best.values.tolist(), strict=True)
            )
            values = told[torch.arange(len(ids)), ids].tolist()
            choice = {
                "index": row,
                "token_ids": ids,
                "prompt_token_ids": body["prompt"],
                "finish_reason": out.finish_reason[row],
                "stop_reason": None,
                "logprobs": {"tokens": tokens, "token_logprobs": values, "top_logprobs": [top]},
            }
            text = self.tokenizer.decode(ids)
            for stop in sampling.stop:
                if text.endswith(stop):
                    choice["stop_reason"] = stop
            choices.append(choice)
        return {"choices": choices[::-1]}

    def logprobs(self, prompt, ids, temperature):
        model, head = self.engine.model, lm_head(self.engine.model)
        scale = temperature if self.processed and temperature > 0 else 1.0
        with torch.no_grad():
            hidden = backbone(model)(torch.tensor([prompt + ids])).last_hidden_state[0]
        hidden = hidden[len(prompt) - 1 : -1]
        vocab = torch.arange(len(head.weight))
        return linear_logprob(
            hidden[:, None].expand(-1, len(vocab), -1),
            head.weight.detach(),
            vocab.expand(len(ids), -1),
            temperature=scale,
        ).logprob


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.respond(None)

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.respond(json.loads(self.rfile.read(length)) if length else None)

    def respond(self, body):
        path = urlsplit(self.path).path
        self.server.seen.append((self.path, body))
        self.server.keys.add(self.headers.get("Authorization"))
        faults = self.server.faults.get(path, [])
        if faults:
            return faults.pop(0)(self)
        answer = self.server.answer(path, body)
        if isinstance(answer, int):
            return self.send(answer, b"")
        answer = self.server.change(path, answer)
        return self.send(200, b"" if answer is None else json.dumps(answer).encode())

    def send(self, status, payload, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload) if length is None else length))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


def status(code, payload=b"out of memory"):
    return lambda handler: handler.send(code, payload)


def hang(handler):
    time.sleep(5)


def trickle(handler):
    """A byte now and then: no single wait is long, but the answer never ends."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(50):
        time.sleep(0.1)
        try:
            handler.wfile.write(b" ")
            handler.wfile.flush()
        except OSError:
            return


def break_off(handler):
    handler.send(200, b'{"choices": [', length=1000)


def drop(handler):
    handler.connection.close()


@contextmanager
def serving(*args, **options):
    server = VllmServer(*args, **options)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
