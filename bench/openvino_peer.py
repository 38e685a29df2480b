"""OpenVINO GenAI in rollouts: a Hugging Face model exported on the spot, and a pipeline on it.

The export is what OpenVINO's own tools make of a decoder-only model, its forward traced with the
cache as state, in float32; it computes in the model's dtype. The pipeline is the one with
continuous batching: it computes a prompt once for all completions of a request and keeps its keys
and values once, and each completion reads them for itself.
"""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

BATCHED = 4096  # tokens of prompts in one forward


class _Tensors(nn.Module):
    """A causal LM as a function of tensors alone: its cache comes in and goes out as such."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, beam_idx, *past):
        past = [x.index_select(0, beam_idx) for x in past]
        cache = DynamicCache(config=self.model.config)
        for layer, keys, values in zip(cache.layers, past[::2], past[1::2], strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values  # an update would join them to an empty tensor
        key = torch.arange(attention_mask.shape[1])
        query = torch.arange(input_ids.shape[1]) + past[0].shape[2]
        seen = (key <= query[:, None]) & attention_mask.bool()[:, None, None]
        out = self.model(
            input_ids=input_ids,
            attention_mask=seen,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        return out.logits, *present


@torch.no_grad()
def export(model: PreTrainedModel, folder: Path) -> None:
    """Writes a float32 model as OpenVINO GenAI reads it, without a tokenizer."""
    import openvino
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    c = model.config
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rows, tokens, before = 2, 4, 3  # traced with; any others will do
    cached = [
        torch.zeros(rows, c.num_key_value_heads, before, width)
        for _ in range(2 * c.num_hidden_layers)
    ]
    example = (
        torch.ones(rows, tokens, dtype=torch.int64),
        torch.ones(rows, before + tokens, dtype=torch.int64),
        torch.arange(before, before + tokens).expand(rows, tokens).contiguous(),
        torch.arange(rows, dtype=torch.int32),
        *cached,
    )
    traced = torch.jit.trace(_Tensors(model), example, check_trace=False)
    graph = openvino.convert_model(traced, example_input=example)

    kinds = [f"{i}.{kind}" for i in range(c.num_hidden_layers) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", "beam_idx"]
    shapes = [[-1, -1]] * 3 + [[-1]] + [[-1, c.num_key_value_heads, -1, width]] * len(kinds)
    inputs += [f"past_key_values.{kind}" for kind in kinds]
    outputs = ["logits", *(f"present.{kind}" for kind in kinds)]
    for port, name, shape in zip(graph.inputs, inputs, shapes, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
    for port, name in zip(graph.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, dict(zip(inputs[4:], outputs[1:], strict=True)))
    # The state begins with no positions, of as many rows as there are inputs.
    shape_of = opset13.shape_of(graph.input("input_ids"), output_type="i64")
    count = opset13.gather(shape_of, opset13.constant([0]), opset13.constant(0))
    sizes = [opset13.constant(np.array([n])) for n in (c.num_key_value_heads, 0, width)]
    nothing = opset13.broadcast(opset13.constant(np.float32(0)), opset13.concat([count, *sizes], 0))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([nothing])
    graph.validate_nodes_and_infer_types()
    openvino.save_model(graph, folder / "openvino_model.xml", compress_to_fp16=False)
    c.to_json_file(folder / "config.json")


PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class OpenVino:
    """A model in OpenVINO GenAI, in its float32 or bfloat16 on as many threads as PyTorch has.

    ``cache`` is the type of keys and values: None, as the model, or "u8", OpenVINO's default.
    """

    def __init__(self, model: PreTrainedModel, cache: str | None):
        import openvino_genai

        if model.dtype not in PRECISIONS:
            raise ValueError(f"the model is {model.dtype}; it must be float32 or bfloat16")
        precision = PRECISIONS[model.dtype]
        wide = model if precision == "f32" else copy.deepcopy(model).float()
        schedule = openvino_genai.SchedulerConfig()
        schedule.max_num_batched_tokens = BATCHED
        schedule.enable_prefix_caching = False
        threads = torch.get_num_threads()
        properties = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": cache or precision,
            "INFERENCE_NUM_THREADS": threads,
            "sampler_num_threads": threads,
        }
        # What it has mapped of the files stays after they are gone.
        with TemporaryDirectory(prefix="fastrl-bench-", ignore_cleanup_errors=True) as folder:
            export(wide, Path(folder))
            self._pipeline = openvino_genai.ContinuousBatchingPipeline(
                folder, schedule, "CPU", properties
            )
        self._requests = openvino_genai.GenerationConfig

    def generate(
        self, prompts: list[list[int]], group: int, tokens: int, temperature: float
    ) -> Tensor:
        """Tokens `[prompts x group, tokens]`; at a temperature of 0 each row is its own request."""
        import openvino

        request = self._requests(max_new_tokens=tokens, ignore_eos=True)
        if temperature:
            request.do_sample, request.temperature = True, temperature
            request.num_return_sequences = group
        else:
            prompts = [p for p in prompts for _ in range(group)]
        ids = [openvino.Tensor(np.array([prompt])) for prompt in prompts]
        found = self._pipeline.generate(ids, [request] * len(ids))
        return torch.tensor([row for result in found for row in result.m_generation_ids])
