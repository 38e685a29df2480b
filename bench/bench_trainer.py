"""One GRPO step of this trainer against TRL's GRPOTrainer: same model, data and settings.

Qwen3 of 0.8M parameters, a group of G completions of up to `tokens` tokens for each prompt,
float32. TRL's trainer waits in a thread inside its own loop and is let go for a step at a time. The
two are comparable where the loss of a fixed batch agrees to 1e-5: that is the gate.
"""

import atexit
import tempfile
import threading
from pathlib import Path

import torch

from fastrl import losses, train
from fastrl.bench.bench_rollout import TINY, weights
from fastrl.bench.race import Race, Variant, Work, within
from fastrl.models import completion_logprobs, load_model
from fastrl.train import loop
from fastrl.train.algorithms import Context
from fastrl.train.checkpoints import Progress
from fastrl.train.optimizer import Optimizer

STEP = "step"
PROMPT = 9  # characters of a sum, about
RECIPE = {
    "name": "bench",
    "model": {
        "alphabet": "0123456789+-= ",
        "architecture": {"hidden_size": 128, "num_layers": 4, "intermediate_size": 384},
    },
    "data": {
        "reasoning_gym": {
            "task": "chain_sum",
            "options": {"min_terms": 3, "max_terms": 3, "min_digits": 2, "max_digits": 2},
            "prompt": "{expression}=",
            "size": 512,
            "eval_size": 0,
        }
    },
    "rewards": [{"function": "fastrl.bench.bench_trainer:digits"}],
}


def digits(prompts, completions, **_):
    """A reward that differs within every group, so that no row of the batch is idle."""
    return [c.count("3") + 0.1 * c.count("7") + 0.01 * len(c) for c in completions]


class Case:
    """What both trainers start from; the folder goes with the process."""

    def __init__(self, shape):
        rows = shape["prompts"] * shape["G"]
        stage = {
            "steps": 1000,
            "prompts_per_step": shape["prompts"],
            "group_size": shape["G"],
            "micro_batch_size": rows,
            "eval_every": 1000,
            "optimizer": {"lr": 1e-4},
        }
        sizes = {"max_completion_length": shape["tokens"], "stages": {"grpo": stage}}
        torch.manual_seed(0)
        self.setup = loop.prepare(train.parse_config(RECIPE | sizes))
        self.rows, self.group, self.tokens = rows, shape["G"], shape["tokens"]
        folder = tempfile.TemporaryDirectory(prefix="fastrl-bench-")
        atexit.register(folder.cleanup)
        self.folder = Path(folder.name)
        self.setup.policy.save_pretrained(self.folder / "model")
        self.steppers = {}

    def stepper(self, kind):
        if kind not in self.steppers:
            self.steppers[kind] = kind(self)
        return self.steppers[kind]


class Ours:
    def __init__(self, case):
        self.setup, self.folder = case.setup, case.folder
        self.stage = case.setup.config.stages["grpo"]
        optimizer = Optimizer(case.setup.policy, self.stage.optimizer, self.stage.steps)
        self.work = loop.Work(Context(case.setup, self.stage, seed=0), {"policy": optimizer})
        self.progress = Progress(stage="grpo")

    def log(self, *_):
        """Takes the place of the tracker."""

    def step(self):
        self.progress = loop._step(self.work, self.progress, self, self.folder)

    def loss(self, batch):
        weights = losses.token_weights(batch["mask"], "dapo")
        given = (batch["logprobs"], batch["old"], batch["advantages"], batch["mask"], weights)
        return losses.policy_loss(*given)[0].item()


class Theirs:
    def __init__(self, case):
        import trl
        from datasets import Dataset
        from transformers import TrainerCallback

        args = trl.GRPOConfig(
            output_dir=str(case.folder),
            max_steps=10**6,
            num_generations=case.group,
            per_device_train_batch_size=case.rows,
            max_completion_length=case.tokens,
            learning_rate=1e-4,
            beta=0.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        self.trainer = trl.GRPOTrainer(
            load_model(str(case.folder / "model")),
            reward_funcs=lambda prompts, completions, **_: digits(prompts, completions),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": e.prompt} for e in case.setup.train]),
            processing_class=case.setup.tokenizer,
        )
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.running: threading.Thread | None = None
        self.error: BaseException | None = None
        stepper = self

        class Turns(TrainerCallback):
            # The rollouts of step n + 1 are made before its on_step_begin, so a step lasts from
            # end to end.
            def on_step_end(self, *_, **__):
                stepper.done.release()
                stepper.go.acquire()

        self.trainer.add_callback(Turns())

    def _run(self):
        try:
            self.go.acquire()
            self.trainer.train()
        except BaseException as error:
            self.error = error
        finally:
            self.done.release()

    def step(self):
        if self.running is None:
            self.running = threading.Thread(target=self._run, daemon=True)
            self.running.start()
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def loss(self, batch):
        self.trainer.current_gradient_accumulation_steps = 1
        inputs = {
            "prompt_ids": batch["prompts"],
            "prompt_mask": torch.ones_like(batch["prompts"]),
            "completion_ids": batch["ids"],
            "completion_mask": batch["mask"].long(),
            "advantages": batch["advantages"],
            "old_per_token_logps": batch["old"],
            "num_items_in_batch": batch["mask"].sum(),
        }
        return self.trainer._compute_loss(self.trainer.model, inputs).item()


def fixed_batch(case):
    """Random tokens and advantages, and log-probs of the model that both start from."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 17, (case.rows, case.tokens), generator=g)
    lengths = torch.randint(1, case.tokens + 1, (case.rows, 1), generator=g)
    mask = torch.arange(case.tokens) < lengths
    prompts = torch.randint(3, 17, (case.rows, PROMPT), generator=g)
    model = load_model(str(case.folder / "model"))
    with torch.no_grad():
        logprobs = completion_logprobs(model, prompts.tolist(), ids, mask).logprob
    return {
        "prompts": prompts,
        "ids": ids,
        "mask": mask,
        "advantages": torch.randn(case.rows, generator=g),
        "logprobs": logprobs,
        "old": logprobs + 0.1 * torch.randn(logprobs.shape, generator=g),
    }


class Trainer(Race):
    op = "trainer"
    about = "a GRPO step: rollouts, rewards, forward, backward, update"
    modes = (STEP,)
    defaults = {"prompts": 16, "G": 8, "tokens": 32}
    grids = {"quick": [{"prompts": 4, "tokens": 8}], "default": [{}]}

    def variants(self, device):
        theirs = {"TRL GRPOTrainer": Variant(Theirs, "trl")} if device.type == "cpu" else {}
        return {"fastrl": Variant(Ours), **theirs}

    def draw(self, shape, device):
        return Case(shape)

    def before(self, variant, inputs, mode):
        return inputs.stepper(variant.function)

    def call(self, variant, inputs, mode):
        return inputs.step

    def gate(self, variant, inputs, shape):
        """The loss of a fixed batch, in float64 by the formula of DAPO (2503.14476)."""
        batch = fixed_batch(inputs)
        ratio = (batch["logprobs"] - batch["old"]).double().exp()
        a = batch["advantages"].double()[:, None]
        term = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        want = -(term * batch["mask"]).sum() / batch["mask"].sum()
        got = variant.function(inputs).loss(batch)
        return within({"loss": abs(got - want.item())}, 1e-5)

    def small(self, shape):
        return {"prompts": 1, "G": 2, "tokens": 2}

    def work(self, shape, mode):
        """The forward for every token of a rollout and three times that for training."""
        layers, head, itemsize, dtype = weights("tiny", TINY["num_hidden_layers"])
        rows = shape["prompts"] * shape["G"]
        tokens = rows * shape["tokens"] + shape["prompts"] * PROMPT
        passes = shape["tokens"] + 3 + 7  # decoding; forward and backward; Adam
        return Work(
            8.0 * tokens * (layers + head), float(passes * (layers + head) * itemsize), dtype
        )


RACE = Trainer()
