"""TRL's trainers, a step at a time: each waits inside its own loop, in a thread, to be let go."""

import threading

import torch

from fastrl.models import load_model


class Stepper:
    """A trainer whose loop stops after every step; `step` lets it go for one."""

    def __init__(self, case):
        self.case = case
        self.trainer = self.make(case)
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.running: threading.Thread | None = None
        self.error: BaseException | None = None
        from transformers import TrainerCallback

        stepper = self

        class Turns(TrainerCallback):
            # The rollouts of step n + 1 are made before its on_step_begin, so a step lasts from
            # end to end.
            def on_step_end(self, *_, **__):
                stepper.done.release()
                stepper.go.acquire()

        self.trainer.add_callback(Turns())

    @property
    def networks(self):
        return {"policy": self.trainer.model}

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


def arguments(case):
    return {
        "output_dir": str(case.folder),
        "max_steps": 10**6,
        "learning_rate": case.lr,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


class GRPO(Stepper):
    def make(self, case):
        import trl
        from datasets import Dataset

        return trl.GRPOTrainer(
            load_model(str(case.folder / "model")),
            reward_funcs=lambda prompts, completions, **_: case.reward(prompts, completions),
            args=trl.GRPOConfig(
                **arguments(case),
                num_generations=case.group,
                per_device_train_batch_size=case.rows,
                max_completion_length=case.tokens,
                beta=0.0,
            ),
            train_dataset=Dataset.from_list([{"prompt": e.prompt} for e in case.examples]),
            processing_class=case.tokenizer,
        )

    def losses(self, fixed):
        from fastrl.bench.naive import group_advantages

        self.trainer.current_gradient_accumulation_steps = 1
        prompts = torch.tensor(fixed.prompts)
        inputs = {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": fixed.ids,
            "completion_mask": fixed.mask.long(),
            "advantages": group_advantages(fixed.rewards, self.case.group).squeeze(1),
            "old_per_token_logps": fixed.old,
            "num_items_in_batch": fixed.mask.sum(),
        }
        return {"policy": self.trainer._compute_loss(self.trainer.model, inputs)}


class DPO(Stepper):
    def make(self, case):
        import trl
        from datasets import Dataset

        return trl.DPOTrainer(
            load_model(str(case.folder / "model")),
            args=trl.DPOConfig(
                **arguments(case),
                per_device_train_batch_size=case.examples_per_step,
                beta=0.1,
                max_length=None,
            ),
            train_dataset=Dataset.from_list(case.pairs),
            processing_class=case.tokenizer,
        )

    def losses(self, fixed):
        from fastrl.bench.naive import pad

        ranked = [(e.prompt_ids, e.ranked_ids[side]) for side in (0, 1) for e in fixed.examples]
        rows = pad(*map(list, zip(*ranked, strict=True)))
        mask = torch.zeros_like(rows.ids)
        mask[:, -rows.mask.shape[1] :] = rows.mask
        inputs = {
            "input_ids": rows.ids,
            "attention_mask": rows.attention,
            "completion_mask": mask,
        }
        return {"preference": self.trainer.compute_loss(self.trainer.model, inputs)}


ALGORITHMS = {"grpo": GRPO, "dpo": DPO}
