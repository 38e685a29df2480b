import copy

import pytest
import torch

TINY = {
    "name": "tiny",
    "model": {
        "alphabet": "0123456789+-= ",
        "architecture": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 16,
            "intermediate_size": 64,
            "context_length": 32,
        },
    },
    "data": {
        "reasoning_gym": {
            "task": "chain_sum",
            "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            "prompt": "{expression}=",
            "size": 200,
            "eval_size": 16,
        }
    },
    "rewards": [{"function": "reasoning_gym"}],
    "max_completion_length": 5,
    "stages": {
        "sft": {"steps": 3, "batch_size": 8, "eval_every": 2},
        "grpo": {"steps": 3, "prompts_per_step": 4, "group_size": 4, "eval_every": 2},
    },
    "save_every": 2,
}


@pytest.fixture
def recipe():
    """A recipe's values that train in a second; the test may change them."""
    return copy.deepcopy(TINY)


@pytest.fixture(autouse=True)
def _apart():
    """Each test has the same seed, and whatever number of threads it sets for itself."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ranks():
    """Two processes that run a function side by side; see ranks.py."""
    from ranks import Ranks

    both = Ranks()
    yield both
    both.end()


@pytest.fixture(scope="session")
def tokenizer():
    from fastrl.models import character_tokenizer

    return character_tokenizer(TINY["model"]["alphabet"])


@pytest.fixture
def model(tokenizer):
    from fastrl.models import build_model

    return build_model(
        tokenizer, **TINY["model"]["architecture"], tie_embeddings=True, vocab_size=None, seed=0
    ).eval()
