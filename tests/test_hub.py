"""Where a model comes from, with no network: a hub on loopback, one that is gone, and its cache."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from fastrl import models
from fastrl.hub import find_model
from fastrl.reward import QuantizedRewardModel, RewardModelError

# What the hub says of a file: its status, and its own name of an error.
ANSWERS = {
    "/some/model/resolve/main/config.json": (200, None),
    "/some/tokenizer/resolve/main/config.json": (404, "EntryNotFound"),
    "/no/model/resolve/main/config.json": (401, "RepoNotFound"),
    "/busy/model/resolve/main/config.json": (503, None),
}


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.server.asked.append(self.path)
        status, error = ANSWERS[self.path]
        self.send_response(status)
        self.send_header("ETag", '"1"')
        if error is not None:
            self.send_header("X-Error-Code", error)
        self.end_headers()

    def log_message(self, *_):
        pass


def place(port, monkeypatch, folder):
    """The hub on a port of this machine, with an empty cache."""
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A hub on loopback, in the place of the real one, and an empty cache; what it was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    place(server.server_address[1], monkeypatch, tmp_path)
    yield server.asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def gone(monkeypatch, tmp_path):
    """No hub: nothing listens, and nobody may wait for it to come back."""

    def wait(seconds):
        raise AssertionError(f"waits {seconds} s to try again")

    place(9, monkeypatch, tmp_path)
    monkeypatch.setattr("time.sleep", wait)
    return tmp_path / "cache"


def test_the_hub_is_asked_once(asked):
    assert find_model("some/model") == "some/model"
    assert find_model("some/tokenizer") == "some/tokenizer"
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/model", "has none of that name, or none that may be read without `hf auth login`"),
        ("busy/model", "the hub cannot be asked: .*503"),
        ("a/b/c", "not how names on the Hugging Face hub look"),
    ],
)
def test_what_is_not_to_be_had_is_an_error_at_once(name, message, asked):
    with pytest.raises(ValueError, match=message) as raised:
        find_model(name)
    assert repr(name) in str(raised.value) and len(asked) <= 1


@pytest.mark.parametrize("load", [models.load_tokenizer, models.load_model, models.load_scorer])
def test_without_a_network_the_error_names_the_way_out(load, gone):
    with pytest.raises(ValueError, match=r"the hub cannot be asked.*`hf download some/model --lo"):
        load("some/model")
    with pytest.raises(RewardModelError, match=r"Recipes with model\.architecture"):
        QuantizedRewardModel.from_pretrained("some/model")


def test_without_a_network_the_cache_serves(gone, recipe):
    tokenizer = models.character_tokenizer("0123456789")
    shape = recipe["model"]["architecture"] | {"tie_embeddings": True, "vocab_size": None}
    model = models.build_model(tokenizer, **shape, seed=0)
    kept = gone / "models--some--model"
    models.save_pretrained(model, tokenizer, kept / "snapshots" / "0123")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0123")
    assert find_model("some/model") == str(kept / "snapshots" / "0123")
    assert models.load_tokenizer("some/model").get_vocab() == tokenizer.get_vocab()
    again = models.load_model("some/model")
    assert again.lm_head.weight.equal(model.lm_head.weight)


def test_a_directory_is_found_in_the_home_folder_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert find_model("~/model") == str(tmp_path / "model")


def test_a_teacher_is_looked_for_before_any_work(recipe, tmp_path):
    from fastrl.train import loop, parse_config

    recipe["stages"] = {"distillation": {"steps": 1, "teacher": str(tmp_path / "none")}}
    with pytest.raises(ValueError, match="none' is not a directory"):
        loop.prepare(parse_config(recipe))
