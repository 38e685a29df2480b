"""llama.cpp in rollouts: a Hugging Face model written as GGUF on the spot, and its C API on it.

Prompts are computed once. Behind one prompt all completions share its keys and values, in the one
buffer that llama.cpp has for sequences with a long common start; behind several each has a copy, in
a buffer of its own, so that none looks through those of the others.
"""

import ctypes
import logging
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

OWN = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
KINDS = ("llama", "qwen2", "qwen3")  # model_type, which is also llama.cpp's name of it


def write(model: PreTrainedModel, path: Path, weights: str) -> None:
    """Writes a model as GGUF, without a tokenizer.

    ``weights`` is the type of its matrices: "F32", "BF16", "Q8_0"; vectors are in float32.
    """
    import gguf

    c = model.config
    if c.model_type not in KINDS:
        raise ValueError(f"the model is a {c.model_type}; it may be one of {', '.join(KINDS)}")
    rope = c.rope_parameters
    if rope["rope_type"] != "default":
        raise ValueError(f"rope_type={rope['rope_type']!r} is not written; only 'default' is")
    out = gguf.GGUFWriter(path, c.model_type)
    out.add_vocab_size(c.vocab_size)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_block_count(c.num_hidden_layers)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    out.add_key_length(width)
    out.add_value_length(width)
    out.add_rope_freq_base(rope["rope_theta"])
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_tokenizer_model("none")

    (kind,) = (k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == c.model_type)
    names = gguf.get_tensor_name_map(kind, c.num_hidden_layers)
    for name, value in model.named_parameters():
        if c.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            # It rotates neighbours there, Hugging Face a head's first half with its second.
            value = value.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
        stored = gguf.GGMLQuantizationType[weights if value.dim() > 1 else "F32"]
        array = gguf.quantize(value.detach().float().numpy(), stored)
        out.add_tensor(names.get_name(name, (".weight", ".bias")), array, raw_dtype=stored)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


class _Batch:
    """Tokens with their positions, each of a sequence; logits are asked for where ``last``."""

    def __init__(self, tokens, positions, sequences, last):
        import llama_cpp

        columns = (tokens, positions, np.ones(len(tokens)), sequences)
        self._arrays = [np.ascontiguousarray(x, dtype=np.int32) for x in columns]
        self._last = np.ascontiguousarray(last, dtype=np.int8)
        # Of each token a pointer to the sequences that it is of.
        own = self._arrays[3]
        self._owners = own.ctypes.data + own.itemsize * np.arange(len(own), dtype=np.uintp)
        pointers = [x.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)) for x in self._arrays[:3]]
        of = self._owners.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)))
        last = self._last.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        tokens, positions, counts = pointers
        self.it = llama_cpp.llama_batch(len(own), tokens, None, positions, counts, of, last)


class LlamaCpp:
    """A model in llama.cpp, on as many threads as PyTorch has.

    There is room for ``group`` completions of ``tokens`` tokens behind each of ``prompts`` prompts
    of ``length``. Matrices have the model's dtype, or ``weights``: see write. Where that is F32,
    keys and values have it too; else they are in float16, which is llama.cpp's default.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: int,
        group: int,
        length: int,
        tokens: int,
        weights: str | None = None,
    ):
        import llama_cpp

        self._c, rows, weights = llama_cpp, prompts * group, weights or OWN[model.dtype]
        if rows > (most := llama_cpp.llama_max_parallel_sequences()):
            raise ValueError(f"{rows} completions at once; llama.cpp has at most {most} sequences")
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        llama_cpp.llama_backend_init()
        # What it has mapped of the file stays after that is gone.
        with TemporaryDirectory(prefix="fastrl-bench-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "model.gguf"
            write(model, path, weights)
            options = llama_cpp.llama_model_default_params()
            loaded = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not loaded:
            raise RuntimeError("llama.cpp did not load the model; it says why on stderr")
        weakref.finalize(self, llama_cpp.llama_model_free, loaded)

        o = llama_cpp.llama_context_default_params()
        o.kv_unified = prompts == 1
        o.n_ctx = length + rows * tokens if o.kv_unified else rows * (length + tokens)
        o.n_batch, o.n_seq_max, o.n_outputs_max = o.n_ctx, rows, rows
        o.n_threads = o.n_threads_batch = torch.get_num_threads()
        f32, f16 = llama_cpp.GGML_TYPE_F32, llama_cpp.GGML_TYPE_F16
        o.type_k = o.type_v = f32 if weights == "F32" else f16
        self._context = llama_cpp.llama_init_from_model(loaded, o)
        if not self._context:
            raise RuntimeError("llama.cpp made no context; it says why on stderr")
        weakref.finalize(self, llama_cpp.llama_free, self._context)  # before the model: last first
        self._memory = llama_cpp.llama_get_memory(self._context)

        c = model.config
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        size = 2 * c.num_hidden_layers * c.num_key_value_heads * width
        self.held = llama_cpp.llama_n_ctx(self._context) * size * (4 if o.type_k == f32 else 2)

    def generate(
        self, prompts: list[list[int]], group: int, tokens: int, temperature: float
    ) -> Tensor:
        """Tokens `[prompts x group, tokens]`, by samplers of its own; at 0 the likeliest."""
        c, count, rows = self._c, len(prompts), len(prompts) * group
        outputs = self._prefill(prompts) * group
        # Completion g of prompt p is sequence g * count + p: the first ones are the prompts'.
        for sequence in range(count, rows):
            c.llama_memory_seq_cp(self._memory, sequence % count, sequence, -1, -1)
        lengths = np.array([len(prompt) for prompt in prompts] * group)
        drawn = np.empty((tokens, rows), dtype=np.int32)
        samplers = [self._sampler(sequence, temperature) for sequence in range(rows)]
        try:
            for step in range(tokens):
                if step:
                    outputs = range(rows)
                    self._decode(drawn[step - 1], lengths + step - 1, outputs, np.ones(rows))
                of = zip(samplers, outputs, strict=True)
                drawn[step] = [c.llama_sampler_sample(s, self._context, i) for s, i in of]
        finally:
            for sampler in samplers:
                c.llama_sampler_free(sampler)
        by_prompt = drawn.reshape(tokens, group, count).transpose(2, 1, 0)
        return torch.from_numpy(by_prompt.reshape(rows, tokens)).long()

    def logits(self, prompt: list[int]) -> Tensor:
        """Logits `[V]`, float32, of the token behind a prompt."""
        (last,) = self._prefill([prompt])
        model = self._c.llama_get_model(self._context)
        size = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(model))
        found = self._c.llama_get_logits_ith(self._context, last)
        return torch.from_numpy(np.ctypeslib.as_array(found, (size,)).copy())

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        """Forgets all, computes the prompts; their last tokens' places in the batch."""
        self._c.llama_memory_clear(self._memory, False)
        lengths = [len(prompt) for prompt in prompts]
        last = np.cumsum(lengths) - 1
        asked = np.zeros(sum(lengths))
        asked[last] = 1
        positions = np.concatenate([np.arange(n) for n in lengths])
        sequences = np.repeat(np.arange(len(prompts)), lengths)
        self._decode(np.concatenate(prompts), positions, sequences, asked)
        return last.tolist()

    def _decode(self, tokens, positions, sequences, last) -> None:
        batch = _Batch(tokens, positions, sequences, last)
        if code := self._c.llama_decode(self._context, batch.it):
            raise RuntimeError(f"llama_decode returned {code}")

    def _sampler(self, seed: int, temperature: float):
        c = self._c
        chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        if temperature == 0:
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_greedy())
            return chain
        if temperature != 1:
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_temp(temperature))
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_dist(seed))
        return chain
