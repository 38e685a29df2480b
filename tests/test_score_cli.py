"""`fastrl score`: a file of pairs, killed and continued, and mistakes named."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY
from reward_models import tiny
from typer.testing import CliRunner

from fastrl.cli import app
from fastrl.models import build_model, character_tokenizer, save_pretrained
from fastrl.reward import QuantizedRewardModel
from fastrl.reward.stream import score_file

TEXT = "0123456789+-= "
SHAPE = TINY["model"]["architecture"] | {"tie_embeddings": True, "vocab_size": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(folder)
    character_tokenizer(TEXT).save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"{i // 3}+1=", "completion": str(i), "note": i} for i in range(40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" + "\n" * (i % 7 == 0) for i, r in enumerate(rows)))
    return path


def score(*arguments):
    result = CliRunner().invoke(app, ["score", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_the_models(folder, pairs, tmp_path):
    code, output = score(folder, pairs, "--out", tmp_path / "scores.jsonl")
    assert code == 0 and "40 scores" in output
    model = QuantizedRewardModel.from_pretrained(folder, "int8")
    given = [json.loads(line) for line in pairs.read_text().splitlines() if line]
    want = model.score(*([r[k] for r in given] for k in ("prompt", "completion")))
    assert [r["score"] for r in rows(tmp_path / "scores.jsonl")] == want.tolist()


def test_a_stopped_file_goes_on_to_the_same_bytes(folder, pairs, tmp_path):
    out = tmp_path / "scores.jsonl"
    model = QuantizedRewardModel.from_pretrained(folder, "int8", batch_tokens=8)
    assert score_file(model, pairs, out) == 40
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in (b"", lines[0], b"".join(lines[:17]), whole[: len(whole) // 2], whole):
        out.write_bytes(kept)
        assert score_file(model, pairs, out) == 40 - kept.count(b"\n")
        assert out.read_bytes() == whole


def test_nothing_is_lost_on_a_kill(folder, pairs, tmp_path):
    """Killed after its first write to the file; then only whole, right lines are there."""
    with pairs.open("a") as file:
        for i in range(3000):
            file.write(json.dumps({"prompt": f"{i}+1=", "completion": str(i + 1)}) + "\n")
    out = tmp_path / "scores.jsonl"
    command = [sys.executable, "-m", "fastrl", "score", folder, pairs, "--out", out]
    command += ["--batch-tokens", "16"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not (out.exists() and out.stat().st_size) and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    made = out.read_bytes().count(b"\n")
    assert 0 < made < 3040
    with pairs.open("rb") as file:
        some = [line for line in file if line.strip()][: made + 20]
    pairs.write_bytes(b"".join(some))
    code, output = score(folder, pairs, "--out", out)
    assert code == 0 and f"20 new scores, {made + 20} in all" in output
    clean = tmp_path / "clean.jsonl"
    assert score(folder, pairs, "--out", clean)[0] == 0
    assert out.read_bytes() == clean.read_bytes()


def test_scores_of_other_pairs_or_settings_are_not_continued(folder, pairs, tmp_path):
    out = tmp_path / "scores.jsonl"
    assert score(folder, pairs, "--out", out)[0] == 0
    before = out.read_bytes()
    code, output = score(folder, pairs, "--out", out, "--scheme", "bf16")
    assert code == 2 and "line 1 is not the score of line 1 of" in output
    changed = tmp_path / "changed.jsonl"
    changed.write_text(pairs.read_text().replace('"12"', '"13"'))
    code, output = score(folder, changed, "--out", out)
    assert code == 2 and "line 13 is not the score of line" in output
    changed.write_text("".join(pairs.read_text().splitlines(keepends=True)[:9]))
    code, output = score(folder, changed, "--out", out)
    assert code == 2 and "has fewer lines" in output
    assert out.read_bytes() == before
    (tmp_path / "other").write_text("not scores\n")
    code, output = score(folder, pairs, "--out", tmp_path / "other")
    assert code == 2 and "not a score that was written here" in output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: not JSON in UTF-8"),
        ("[]", "line 3: must be a JSON object with prompt and completion"),
        ('{"prompt": "1"}', "line 3: must be a JSON object with prompt and completion"),
        ('{"prompt": 1, "completion": "1"}', "line 3: prompt and completion must both be"),
        ('{"prompt": "", "completion": ""}', "line 3: it has no token at all"),
        ('{"prompt": [200], "completion": []}', "line 3: it holds token 200"),
    ],
)
def test_a_bad_line_is_named_and_those_before_are_kept(folder, tmp_path, line, message):
    path, out = tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl"
    good = '{"prompt": "1+1=", "completion": "2"}\n'
    path.write_text(2 * good + line + "\n")
    code, output = score(folder, path, "--out", out)
    assert code == 2 and message in output and "Traceback" not in output
    assert len(rows(out)) == 2


def test_a_run_and_its_policy_point_to_its_reward_model(folder, pairs, tmp_path):
    run = tmp_path / "run"
    tiny().save_pretrained(run / "final-reward")
    lm = build_model(character_tokenizer(TEXT), **SHAPE, seed=0)
    save_pretrained(lm, character_tokenizer(TEXT), run / "final")
    for given, why in ((run, "holds no config.json"), (run / "final", "not a reward model")):
        code, output = score(given, pairs, "--out", tmp_path / "scores.jsonl")
        assert code == 2 and why in output, output
        assert output.endswith(f"; did you mean '{run}/final-reward'?")


def test_options(folder, pairs, tmp_path):
    out = tmp_path / "scores.jsonl"
    options = ("--keep-bf16", "down_proj", "--keep-bf16", "layers.0", "--smooth", pairs)
    code, output = score(folder, pairs, "--out", out, *options)
    assert code == 0, output
    model = QuantizedRewardModel.from_pretrained(folder, "float32")
    given = [json.loads(line) for line in pairs.read_text().splitlines() if line]
    want = model.score(*([r[k] for r in given] for k in ("prompt", "completion")))
    got = torch.tensor([r["score"] for r in rows(out)])
    assert (got - want).std() < 0.1 * want.std()


def test_several_heads(pairs, tmp_path):
    tiny(num_labels=3).save_pretrained(tmp_path / "model")
    character_tokenizer(TEXT).save_pretrained(tmp_path / "model")
    assert score(tmp_path / "model", pairs, "--out", tmp_path / "all.jsonl")[0] == 0
    assert score(tmp_path / "model", pairs, "--out", tmp_path / "one", "--ensemble", "mean")[0] == 0
    for all_, one in zip(rows(tmp_path / "all.jsonl"), rows(tmp_path / "one"), strict=True):
        assert sum(all_["score"]) / 3 == pytest.approx(one["score"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "PAIRS"], "nowhere"),
        (["MODEL", "nowhere.jsonl"], "pairs file 'nowhere.jsonl' does not exist"),
        (["MODEL", "PAIRS", "--scheme", "int3"], "scheme='int3' is unknown"),
        (["MODEL", "PAIRS", "--scheme", "bitsandbytes"], "bitsandbytes quantized none"),
        (["MODEL", "PAIRS", "--ensemble", "median"], "ensemble='median' is unknown"),
        (["MODEL", "PAIRS", "--smooth", "no.jsonl"], "smooth file 'no.jsonl' does not exist"),
    ],
)
def test_mistakes_are_named(folder, pairs, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    named = {"MODEL": folder, "PAIRS": pairs}
    code, output = score(*(named.get(a, a) for a in arguments), "--out", "scores.jsonl")
    assert code == 2 and message in output and "Traceback" not in output
    assert not (tmp_path / "scores.jsonl").exists()
