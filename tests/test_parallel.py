"""Several processes take the steps of one: every algorithm, replicated models and FSDP2."""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from runs import steady
from safetensors.torch import load_file

from fastrl import train
from fastrl.kernels import native
from fastrl.rollout import RolloutEngine, SamplingParams, join_rollouts
from fastrl.train import CheckpointError, parallel, parse_config
from fastrl.train.algorithms import Context
from fastrl.train.setup import prepare
from fastrl.train.stages import ALGORITHMS, FAMILIES

if dist.is_available():
    from torch.distributed.tensor import DTensor

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

# Adam is then close to gradient descent: rounding in a small gradient stays a small step.
OPTIMIZER = {"lr": 0.5, "eps": 1.0}
# Numbers that two processes cannot share evenly, and micro-batches that leave a rest.
SETTINGS = {
    "sft": {"batch_size": 5},
    "iqlearn": {"batch_size": 5},
    "reward": {"batch_size": 5, "centering": 0.1, "heads": 2},
    "afd": {"prompts_per_step": 3, "group_size": 2},
    "ppo": {"prompts_per_step": 5, "kl_coef": 0.1, "critic_optimizer": OPTIMIZER},
    "gail": {"prompts": "all", "demonstrations_per_step": 7},
    "airl": {"level": "token"},
    "fairl": {"discriminator": "likelihood"},
    "spin": {"batch_size": 5},
    "distillation": {"prompts_per_step": 5},
    "raft": {"prompts_per_step": 3, "group_size": 4},
    "grpo": {"kl_coef": 0.1, "entropy_coef": 0.01, "overlong_buffer": 3},
    "reinforce++": {"kl_coef": 0.1, "updates_per_batch": 2},
    "kto": {"batch_size": 5, "pairs": "samples", "group_size": 3},
}
OF_FAMILY = {
    "GRPO": {"prompts_per_step": 3, "group_size": 4},
    "Adversarial": {
        "prompts_per_step": 3,
        "group_size": 4,
        "discriminator_optimizer": OPTIMIZER,
    },
    "Preference": {"batch_size": 5},
}


def variety(prompts, completions):
    return [sum(map(ord, c)) % 7 / 7 for c in completions]


def values(recipe, algorithm, layout="replicated", **model):
    family = OF_FAMILY.get(ALGORITHMS[algorithm].__name__, {})
    stage = {"algorithm": algorithm, "steps": 2, "micro_batch_size": 4, "eval_every": 2}
    stage |= {"optimizer": OPTIMIZER} | family | SETTINGS.get(algorithm, {})
    if algorithm == "remax":
        stage["group_size"] = 1
    stages = {"only": stage}
    if algorithm == "distillation":  # the policy is its own teacher, after a step
        stages = {"sft": {"steps": 1, "batch_size": 5, "optimizer": OPTIMIZER}} | stages
    gym = recipe["data"]["reasoning_gym"] | {"size": 40, "eval_size": 3}
    return recipe | {
        "model": recipe["model"] | model,
        "data": {"reasoning_gym": gym},
        "rewards": [{"function": "test_parallel:variety"}],
        "stages": stages,
        "parallel": layout,
    }


def _train(rank, settings, folder):
    train.run(parse_config(settings), folder)


def all_weights(run):
    files = sorted(run.glob("final*/**/*.safetensors"))
    return {f"{f.relative_to(run)}/{n}": w for f in files for n, w in load_file(f).items()}


def check_equal(one, two):
    """To rounding: a sharded model runs Hugging Face's layers where a whole one runs ours."""
    assert one.keys() == two.keys()
    for name, w in one.items():
        assert torch.allclose(two[name], w, rtol=1e-4, atol=3e-5), (
            name,
            (two[name] - w).abs().max(),
        )


def compare(ranks, tmp_path, settings):
    train.run(parse_config(settings), tmp_path / "one")
    ranks.run(_train, settings, tmp_path / "two")
    check_equal(all_weights(tmp_path / "one"), all_weights(tmp_path / "two"))
    for a, b in zip(steady(tmp_path / "one"), steady(tmp_path / "two"), strict=True):
        assert a.pop("stage") == b.pop("stage")
        assert max(v for name, v in a.items() if name.endswith("grad_norm")) > 1e-3
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_processes_take_the_steps_of_one(ranks, recipe, tmp_path, algorithm):
    compare(ranks, tmp_path, values(recipe, algorithm))


def test_a_value_head_takes_the_steps_of_one(ranks, recipe, tmp_path):
    settings = values(recipe, "ppo", "fsdp")
    settings["stages"]["only"] |= {"critic": "head", "critic_warmup": 1}
    compare(ranks, tmp_path, settings)


SCORING = {
    "head, int8": {"only": {"discriminator": "head", "scheme": "int8"}},
    "int8 of tokens": {"only": {"level": "token", "scheme": "int8"}},
    "a frozen head": {"reward": {"reward_model": "head", "heads": 2}, "grpo": {"scheme": "bf16"}},
}


@pytest.mark.parametrize("layout", ["replicated", "fsdp"])
@pytest.mark.parametrize("name", SCORING)
def test_scores_are_those_of_one(ranks, recipe, tmp_path, name, layout):
    settings = values(recipe, "gail", layout)
    if "grpo" in SCORING[name]:
        reward, grpo = (values(recipe, a)["stages"]["only"] for a in ("reward", "grpo"))
        settings["stages"] = {"reward": reward, "grpo": grpo | {"reward": "reward"}}
    for stage, more in SCORING[name].items():
        settings["stages"][stage] |= more
    compare(ranks, tmp_path, settings)


@pytest.mark.parametrize("algorithm", [f.model_fields["algorithm"].default for f in FAMILIES])
def test_sharded_models_take_the_steps_of_whole_ones(ranks, recipe, tmp_path, algorithm):
    compare(ranks, tmp_path, values(recipe, algorithm, "fsdp"))


@pytest.mark.parametrize(
    ("algorithm", "model"),
    [
        ("ppo", {"lora": {"rank": 2}, "gradient_checkpointing": True}),
        ("spin", {"lora": {"rank": 2}}),
        ("ppo", {"shared_prefix": "off"}),
    ],
    ids=["lora, checkpointing", "lora", "rows"],
)
def test_sharded_models_of_other_kinds(ranks, recipe, tmp_path, algorithm, model):
    compare(ranks, tmp_path, values(recipe, algorithm, "fsdp", **model))


@pytest.mark.parametrize("layout", ["replicated", "fsdp"])
def test_bfloat16_keeps_float32_masters(ranks, recipe, tmp_path, layout):
    settings = values(recipe, "sft", layout, dtype="bfloat16")
    train.run(parse_config(settings), tmp_path / "one")
    ranks.run(_train, settings, tmp_path / "two")
    one, two = (
        load_file(tmp_path / run / "checkpoints/step-00000002/policy.optimizer.safetensors")
        for run in ("one", "two")
    )
    assert one["master.model.norm.weight"].dtype == torch.float32
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=2e-2, atol=2e-3)


def two_stages(recipe, layout):
    settings = values(recipe, "sft", layout)
    ppo = values(recipe, "ppo")["stages"]["only"]
    return settings | {"stages": settings["stages"] | {"ppo": ppo}, "save_every": 1}


def stop_before(run, step):
    """The run as if it had been killed before a step."""
    shutil.rmtree(run / "final")
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) >= step:
            shutil.rmtree(checkpoint)


def _resume(rank, folder):
    train.resume(folder)


@pytest.mark.parametrize(("layout", "first"), [("replicated", 2), ("fsdp", 1)])
def test_a_run_resumes_on_another_number_of_processes(ranks, recipe, tmp_path, layout, first):
    run = tmp_path / "run"
    settings = two_stages(recipe, layout)
    if first == 1:
        train.run(parse_config(settings), run)
    else:
        ranks.run(_train, settings, run)
    want, rows = all_weights(run), steady(run)
    stop_before(run, 4)
    if first == 1:
        ranks.run(_resume, run)
    else:
        train.resume(run)
    check_equal(want, all_weights(run))
    assert [r["step"] for r in steady(run)] == [r["step"] for r in rows] == [1, 2, 3, 4]
    assert not list(run.rglob("*.partial"))


def _layout(rank, settings):
    setup = prepare(parse_config(settings))
    policy, shards = setup.policy, dict(setup.policy.named_parameters())
    assert all(isinstance(p, DTensor) for p in shards.values())
    held = sum(p.to_local().numel() for p in shards.values())
    total = sum(p.numel() for p in shards.values())
    assert held <= 0.51 * total
    plain = parallel.plain(policy)
    assert sum(p.numel() for p in plain.parameters()) == 0
    with parallel.whole(policy) as model:
        assert model is plain is setup.engine.model
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert sum(p.numel() for p in model.parameters()) == total
        out = setup.engine.generate([[4, 5]], 1, SamplingParams(max_new_tokens=2))
    assert sum(p.numel() for p in plain.parameters()) == 0
    assert out.completion_ids.shape == (1, 2)
    assert [type(p) for p in policy.parameters()] == [type(p) for p in shards.values()]
    return setup.engine.fallback_reason


def test_a_process_holds_a_part_of_a_sharded_model(ranks, recipe):
    reasons = ranks.run(_layout, recipe | {"parallel": "fsdp"})
    assert native.why_missing or reasons == [None, None]


def test_parts_of_rollouts_join_to_the_whole(model):
    prompts, sampling = [[4, 5], [6, 7, 8], [3]], SamplingParams(max_new_tokens=6, seed=3)
    engine = RolloutEngine(model)
    whole = engine.generate(prompts, 2, sampling)
    first = engine.generate(prompts[:1], 2, sampling)
    rest = engine.generate(prompts[1:], 2, sampling, first_row=2)
    joined = join_rollouts([first, rest]).to("cpu")
    for name, value in vars(whole).items():
        if name == "layout":
            assert all(torch.equal(a, b) for a, b in zip(joined.layout, value, strict=True))
        elif isinstance(value, torch.Tensor):
            assert torch.equal(getattr(joined, name), value), name
        else:
            assert getattr(joined, name) == value, name


class Server:
    """An engine that is not in this process, as far as the trainer can see."""

    def __init__(self, engine):
        self.engine, self.asked = engine, []

    def generate(self, prompts, group_size, sampling):
        self.asked.append(len(prompts))
        return self.engine.generate(prompts, group_size, sampling)


def _server(rank, settings):
    setup = prepare(parse_config(settings))
    server, stage = Server(setup.engine), setup.config.stages["only"]
    sampled = Context(replace(setup, engine=server), stage, 0).sample(setup.train[:3], 0, 2)
    assert server.asked == ([3] if rank == 0 else [])
    own = Context(setup, stage, 0).sample(setup.train[:3], 0, 2)
    assert torch.equal(sampled.completion_ids, own.completion_ids)


def test_only_the_first_process_asks_a_server(ranks, recipe):
    ranks.run(_server, values(recipe, "grpo"))


def _shares(rank):
    assert (parallel.rank(), parallel.size()) == (rank, 2)
    assert parallel.span(5) == [slice(0, 2), slice(2, 5)][rank]
    assert parallel.span(0) == slice(0, 0)
    assert parallel.share("abc") == [[("a", True), ("c", True)], [("b", True), ("a", False)]][rank]
    assert parallel.share("") == []
    assert parallel.gather({"of": rank}) == [{"of": 0}, {"of": 1}]
    sums = [torch.full((3,), float(rank + 1)), torch.tensor(0.5), torch.zeros(0)]
    parallel.add_up(sums)
    assert sums[0].tolist() == [3.0, 3.0, 3.0] and sums[1] == 1.0
    assert parallel.first(lambda: f"from {rank}") == "from 0"
    with pytest.raises(CheckpointError, match="disk of 0 is full"):
        parallel.first(lambda: (_ for _ in ()).throw(CheckpointError(f"disk of {rank} is full")))
    torch.manual_seed(7)
    with parallel.own_noise():
        inside = torch.rand(4).tolist()
    assert parallel.gather(inside)[0] != parallel.gather(inside)[1]
    after = parallel.gather(torch.rand(4).tolist())
    assert after[0] == after[1] and after[0] != inside


def test_what_is_shared_out_and_gathered(ranks):
    ranks.run(_shares)


def test_one_process_passes_through():
    assert (parallel.rank(), parallel.size()) == (0, 1)
    assert parallel.span(5) == slice(0, 5) and parallel.gather("x") == ["x"]
    assert parallel.share("ab") == [("a", True), ("b", True)]
    model, state = torch.nn.Linear(2, 2), torch.random.get_rng_state()
    with parallel.own_noise(), parallel.whole(model) as same:
        assert same is parallel.distribute(model, "fsdp") is model
    assert torch.equal(torch.random.get_rng_state(), state)


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "fastrl"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_torchrun_trains_and_one_process_resumes(recipe, tmp_path):
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(two_stages(recipe, "replicated")))
    done = torchrun("train", path, "--set", "parallel=fsdp", "--out", run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("report.html") == 1 and (run / "report.html").is_file()
    want = all_weights(run)
    stop_before(run, 4)
    train.resume(run)
    check_equal(want, all_weights(run))
    assert [r["step"] for r in steady(run)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_failure_of_one_process_ends_all(recipe, tmp_path):
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    settings = values(recipe, "raft") | {"rewards": [{"function": "test_parallel:fails_later"}]}
    path.write_text(yaml.safe_dump(settings))
    done = torchrun("train", path, "--out", run)
    assert done.returncode != 0
    assert "process 1: reward function 'fails_later' raised" in " ".join(done.stderr.split())
    assert not (run / "final").exists()


def fails_later(prompts, completions):
    if len(prompts) > 2 and parallel.rank() == 1:
        raise RuntimeError("the judge is away")
    return [0.0] * len(prompts)
