"""Recipes: what is accepted, and what is refused with which words."""

import pytest
import yaml

from fastrl.train import ConfigError, load_recipe, parse_config, shipped_recipes
from fastrl.train.recipe import dump_config


def test_shipped_recipes_load_and_round_trip(tmp_path):
    assert {"arithmetic", "hf_grpo"} <= set(shipped_recipes())
    for name in shipped_recipes():
        config = load_recipe(name)
        path = tmp_path / "again.yaml"
        path.write_text(dump_config(config))
        assert load_recipe(str(path)) == config


def test_overrides(tmp_path, recipe):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    config = load_recipe(
        str(path),
        ["seed=7", "stages.grpo.optimizer.lr=1e-3", "rewards.0.weight=2", "model.dtype=bfloat16"],
    )
    assert config.seed == 7 and config.stages["grpo"].optimizer.lr == 1e-3
    assert config.rewards[0].weight == 2 and config.model.dtype == "bfloat16"
    for bad, message in (
        ("seed", "must look like key.path=value"),
        ("name.x=1", "'name' is not a section"),
        ("rewards.9.weight=1", "is not a section"),
        ("seed=[", "not YAML"),
        ("sead=1", "unknown key 'sead'; did you mean 'seed'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_recipe(str(path), [bad])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("sede",), 1, "unknown key 'sede'; did you mean 'seed'"),
        (
            ("model", "architecture", "hiden_size"),
            8,
            "unknown key .*hiden_size.*did you mean 'hidden_size'",
        ),
        (
            ("stages", "grpo", "groupsize"),
            8,
            "unknown key 'stages.grpo.groupsize'; did you mean 'group_size'",
        ),
        (
            ("stages", "grpo", "optimizer"),
            {"learning_rate": 1},
            "unknown key 'stages.grpo.optimizer.learning_rate'",
        ),
        (
            ("stages", "grpo", "max_completion_length"),
            8,
            "unknown key 'stages.grpo.max_completion_length'; "
            "did you mean 'max_completion_length' at the top level?",
        ),
        (
            ("data", "max_completion_length"),
            8,
            "did you mean 'max_completion_length' at the top level?",
        ),
        (("stages", "grpo", "lr"), 1, r"did you mean 'stages\.grpo\.optimizer\.lr'\?"),
        (("group_size",), 8, r"unknown key 'group_size'; did you mean 'stages\.STAGE\.group_size'"),
        (("stages", "sft", "group_size"), 8, "known keys: algorithm, batch_size, data"),
        (("model", "path_to"), 8, "unknown key 'model.path_to'; did you mean 'path'"),
        (("model", "hidden_size"), 8, r"did you mean 'model\.architecture\.hidden_size'"),
        (("rewards", 0, "treshold"), 1, r"'rewards\.0\.treshold'; did you mean 'threshold'"),
        (
            ("stages", "grpo", "group_size"),
            1,
            "stages.grpo: group_size=1 must be at least 2 for advantage=.grpo.",
        ),
        (("stages", "grpo", "reduction"), "sum", "stages.grpo.reduction.*got 'sum'"),
        (("stages", "warm"), {"algorithm": "ppoo", "steps": 1}, "algorithm 'ppoo' is unknown"),
        (("stages", "sft", "steps"), None, "stages.sft.steps"),
        (("stages",), {}, "stages"),
        (("name",), "a/b", "name"),
        (("rewards",), [], "rewards is empty"),
        (("model", "path"), "x", "give either path"),
        (("model", "alphabet"), None, "needs alphabet or tokenizer"),
        (("data", "train_file"), "x.jsonl", "give one of reasoning_gym and train_file"),
        (("model", "architecture", "num_kv_heads"), 3, "must be a multiple of num_kv_heads=3"),
        (("trackers",), ["tensorbord"], "trackers"),
        (("stages", "sft", "optimizer"), {"lr": float("inf")}, "stages.sft.optimizer.lr: .*finite"),
        (("stages", "sft", "optimizer"), {"betas": [0.9, 1.5]}, "stages.sft.optimizer.betas.1"),
        (("model", "device"), "meta", "model.device"),
    ],
)
def test_bad_recipes_are_named(recipe, path, value, message):
    at = recipe
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        parse_config(recipe)


def test_a_stage_set_to_null_is_left_out(recipe):
    recipe["stages"]["sft"] = None
    assert list(parse_config(recipe).stages) == ["grpo"]


def test_dropout_with_several_updates_is_refused(recipe):
    recipe["model"]["lora"] = {"dropout": 0.1}
    recipe["stages"]["grpo"]["updates_per_batch"] = 2
    with pytest.raises(ConfigError, match=r"updates_per_batch=2 needs model\.lora\.dropout=0"):
        parse_config(recipe)


def test_unreadable_recipes(tmp_path):
    with pytest.raises(ConfigError, match=r"neither a file nor .*; did you mean 'arithmetic'"):
        load_recipe("arithmetik")
    with pytest.raises(ConfigError, match=r"one of afd, airl, arithmetic, cispo, .*spin$"):
        load_recipe("zzz")
    path = tmp_path / "r.yaml"
    for text, message in (("a: [", "not YAML"), ("- 1", "must be a mapping")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_recipe(str(path))


def test_a_recipe_extends_another(tmp_path, recipe):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe))
    child = {
        "extends": "base.yaml",
        "name": "child",
        "model": {"architecture": {"num_layers": 1}},
        "stages": {"grpo": None, "gspo": {"extends": "grpo", "steps": 2}, "sft": {"steps": 9}},
    }
    path = tmp_path / "child.yaml"
    path.write_text(yaml.safe_dump(child, sort_keys=False))
    config, base = load_recipe(str(path), ["seed=3"]), parse_config(recipe)
    assert list(config.stages) == ["grpo", "gspo", "sft"] and config.seed == 3
    assert config.stages["grpo"] == base.stages["grpo"]
    assert config.stages["sft"] == base.stages["sft"].model_copy(update={"steps": 9})
    assert config.stages["gspo"].group_size == 4 and config.stages["gspo"].loss == "gspo"
    assert config.model.architecture.num_layers == 1
    assert config.model.architecture.hidden_size == base.model.architecture.hidden_size
    assert config.data == base.data and config.name == "child"
    (tmp_path / "base.yaml").write_text("extends: child.yaml\n")
    with pytest.raises(ConfigError, match="no recipe, or itself in the end"):
        load_recipe(str(path))
    path.write_text("extends: nowhere\nname: x\n")
    with pytest.raises(ConfigError, match="'nowhere' is neither a file nor a shipped recipe"):
        load_recipe(str(path))
