"""Quantized reward models on disk: the same scores, the size of the scheme, named errors."""

import json

import pytest
import torch
from reward_models import pairs, tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from fastrl import files
from fastrl.cli import app
from fastrl.models import character_tokenizer
from fastrl.reward import Checkpoint, QuantizedRewardModel, RewardModelError
from fastrl.reward.saved import FILE

PROMPTS, COMPLETIONS = pairs()
load = QuantizedRewardModel.from_pretrained


def quantized(family="qwen3", scheme="int8", dtype=torch.float32, heads=1, **arguments):
    return load(Checkpoint.of(tiny(family, dtype, num_labels=heads)), scheme, **arguments)


@pytest.mark.parametrize(
    ("family", "scheme", "arguments"),
    [
        ("qwen3", "int8", {}),
        ("qwen2", "int8", {"smooth": [list(range(2, 30))], "dtype": torch.bfloat16}),
        ("gemma2", "int8", {"smooth": [[2, 3, 4], [5, 6, 7, 8]], "keep_bf16": ["down_proj"]}),
        ("llama3", "nf4", {"nested": True, "skip": ["score", "layers.0"], "heads": 3}),
        ("gemma2", "nf4", {"compute": "bf16"}),
        ("mistral", "int4", {"group": 32}),
        ("qwen3", "fp8", {}),
        ("qwen3", "bf16", {}),
        ("gemma2", "float32", {}),
    ],
)
def test_scores_are_the_same_bits(family, scheme, arguments, tmp_path):
    model = quantized(family, scheme, **arguments)
    model.save_pretrained(tmp_path / "saved")
    for again in (load(tmp_path / "saved"), load(tmp_path / "saved", scheme)):
        got = again.score(PROMPTS, COMPLETIONS)
        assert torch.equal(got, model.score(PROMPTS, COMPLETIONS)) and got.isfinite().all()
        assert again.fingerprint() == model.fingerprint() and again.nbytes == model.nbytes
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / f / FILE) for f in ("saved", "again"))
    assert first.keys() == second.keys()
    assert all(
        torch.equal(first[n], second[n]) and first[n].dtype == second[n].dtype for n in first
    )


def test_what_is_recorded(tmp_path):
    arguments = {"keep_bf16": ["layers.0", "o_proj"], "smooth": [[2, 3], [4, 5, 6]]}
    quantized(scheme="int4", group=32, **arguments).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["quantization_config"] == {
        "quant_method": "fastrl",
        "version": 1,
        "scheme": "int4",
        "skip": ["score"],
        "keep_bf16": ["layers.0", "o_proj"],
        "options": {"group": 32},
        "smooth": 5,
    }
    saved = load(tmp_path / "saved")
    assert saved.recorded == config["quantization_config"] and saved.scheme == "int4"
    assert saved.layers[0].linears["mlp.up_proj"].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("scheme", "arguments", "bits"),
    [
        ("int8", {}, 8 + 32 / 128),  # a float32 scale for each row of 128
        ("nf4", {}, 4 + 32 / 64 + 32 / 128),  # one for each block of 64 as well
        ("nf4", {"nested": True}, 4 + 8 / 64 + 32 / (64 * 256) + 32 / 128),
        ("int4", {"group": 128}, 4 + 32 / 128 + 32 / 128),
        ("fp8", {}, 8 + 32 / 128),
        ("bf16", {}, 16),
    ],
)
def test_the_size_is_the_schemes(scheme, arguments, bits, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = load(Checkpoint.of(tiny("llama", **sizes)), scheme, **arguments)
    model.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / FILE)
    linear = [n for n in tensors if ".mlp." in n or ".self_attn." in n]
    stored = sum(
        tensors[n].nbytes for n in linear if not n.endswith((".bias", ".config", ".code", "_code"))
    )
    weights = model.spec.layers * 7 * 128 * 128
    assert stored * 8 == pytest.approx(weights * bits, rel=1e-3)
    little = ("config", "layernorm.weight", ".bias")  # what nbytes leaves out
    stored = sum(t.nbytes for n, t in tensors.items() if not n.endswith(little))
    assert stored == model.nbytes


def test_bitsandbytes_models(tmp_path):
    from test_reward_bitsandbytes import blobs

    tensors, config = blobs("nf4", nested=True)
    model = QuantizedRewardModel.from_bitsandbytes(tensors, config=config)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(again.score(PROMPTS, COMPLETIONS), model.score(PROMPTS, COMPLETIONS))
    assert again.scheme == "nf4"


def test_the_command_line_takes_it(tmp_path):
    tokenizer = character_tokenizer("0123456789+-= ")
    model = quantized("qwen2", "nf4", tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "saved")
    rows = [{"prompt": "1+2=", "completion": c} for c in ("3", "4", "33")]
    pairs_file = tmp_path / "pairs.jsonl"
    pairs_file.write_text("".join(json.dumps(r) + "\n" for r in rows))

    def score(out, *more):
        given = [tmp_path / "saved", pairs_file, "--out", tmp_path / out, *more]
        return CliRunner().invoke(app, ["score", *map(str, given)])

    result = score("scores.jsonl")
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    want = model.score(["1+2="] * 3, ["3", "4", "33"])
    assert [json.loads(line)["score"] for line in lines] == want.tolist()
    assert (
        "0 new scores, 3 in all" in score("scores.jsonl", "--scheme", "nf4").output
    )  # the same model
    result = score("others.jsonl", "--scheme", "int8")
    assert result.exit_code == 2 and "already, as 'nf4'" in " ".join(result.output.split())


def test_nothing_is_written_by_half(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("fastrl.reward.saved.save_file", full)
    with pytest.raises(files.WriteError, match=r"cannot write .*No space left"):
        quantized().save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        quantized().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not empty"):
        quantized().save_pretrained(tmp_path / "mine.txt")
    (tmp_path / "empty").mkdir()
    quantized().save_pretrained(tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "mine.txt"]


def test_hugging_face_does_not_take_it_for_floats(tmp_path):
    quantized().save_pretrained(tmp_path / "saved")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")


@pytest.fixture
def folder(tmp_path):
    quantized(scheme="int8").save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def changed(folder, **tensors):
    """The directory with other tensors; None takes one out."""
    stored = load_file(folder / FILE) | tensors
    save_file({n: t for n, t in stored.items() if t is not None}, folder / FILE)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{UP}.data": None}, f"'{UP}' is missing"),
        ({f"{UP}.scale": None}, "layers.1.mlp.up_proj.*no 'weight.scale'"),
        ({f"{UP}.scale": torch.full((7,), 1.0)}, "up_proj.*scale must be torch.float32"),
        ({f"{UP}.config": torch.tensor([7], dtype=torch.uint8)}, "model.layers.1.mlp.up_proj"),
        ({f"{UP}.config": torch.tensor([0.5])}, "model.layers.1.mlp.up_proj"),
        ({"score.weight": None}, "without its score head"),
        ({"model.norm.weight": torch.full((48,), torch.nan)}, "model.norm.weight.* 48 values"),
        ({"model.layers.0.mlp.down_proj.gain": torch.ones(3)}, "has no place"),
        ({"model.layers.0.self_attn.q_proj.input_scale": torch.ones(3)}, r"shape \(3,\)"),
    ],
)
def test_bad_tensors_are_named(folder, tensors, message):
    changed(folder, **tensors)
    with pytest.raises(RewardModelError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"version": 2}, "version 2, this fastrl reads 1"),
        ({"scheme": None}, "scheme None, not a name"),
        ({"scheme": "nf4"}, "weights are int8, but its config says 'nf4'"),
        ({"quant_method": "gptq"}, "quantized by 'gptq', which is not read"),
    ],
)
def test_bad_sections_are_named(folder, section, message):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= section
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RewardModelError, match=message):
        load(folder)


def test_bad_directories_are_named(folder):
    with pytest.raises(RewardModelError, match="quantized by fastrl, not bitsandbytes"):
        QuantizedRewardModel.from_bitsandbytes(folder)
    whole = (folder / FILE).read_bytes()
    for size in (0, 100, len(whole) - 1):
        (folder / FILE).write_bytes(whole[:size])
        with pytest.raises(RewardModelError, match="does not open"):
            load(folder)
    (folder / FILE).unlink()
    with pytest.raises(RewardModelError, match=r"holds no \*\.safetensors"):
        load(folder)
    for text in ("{", "[1]", "{}"):
        (folder / "config.json").write_text(text)
        with pytest.raises(RewardModelError, match="config cannot be read"):
            load(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "nf4"}, "scheme='nf4', but .* is quantized already, as 'int8'"),
        ({"keep_bf16": ["down_proj"]}, "keep_bf16 has no use"),
        ({"smooth": [[1, 2]]}, "smooth has no use"),
        ({"skip": ["score", "layers.0"]}, "skip has no use"),
        ({"group": 32}, "group has no use"),
        ({"scheme": "int7"}, "'int7' is unknown"),
    ],
)
def test_settings_that_would_change_it_are_refused(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(folder, **arguments)
