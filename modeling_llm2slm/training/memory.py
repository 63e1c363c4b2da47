"""Memory of training and of generation, counted on tensors that have shapes but no storage."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.initialization import no_init_weights

from ..checkpoint_llm2slm import LLM_PREFIX
from ..configuration_llm2slm import LLM2SLMConfig, llm_sizes, quirks_of
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from ..states.without_llm import LLM2SLMWithoutLLM
from .adapters import lora_config


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """
    How a model trains on one device.

    Args:
        batch_size: Examples per device and step.
        prompt_length: Tokens per prompt, padding included.
        output_length: Tokens per target, padding included.
        llm_states: Train on a store of `llm2slm encode`, without the LLM.
        lora: Arguments of [`lora_config`] to train an adapter; `None` trains the whole SLM.
        bf16: Compute in bfloat16 by autocast; weights, gradients and optimizer states stay in float32.
        gradient_checkpointing: Keep only the input of each layer of the SLM, and compute the rest again.
        optimizer: `"adamw"`, two numbers per parameter; or `"adafactor"`, one per row and column of a matrix.
        shards: Devices that share weights, gradients and optimizer states (FSDP); 1 keeps all on each device (DDP).
    """

    batch_size: int
    prompt_length: int
    output_length: int
    llm_states: bool = False
    lora: Mapping[str, Any] | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    shards: int = 1


def training_memory(config: LLM2SLMConfig, setup: TrainingSetup) -> dict[str, int]:
    """
    Return the bytes that one device needs to train an LLM-to-SLM model, not counting those of torch and its libraries.

    Weights, gradients and optimizer states follow from the parameters. Activations are the tensors that a forward
    pass saves for its backward pass, counted on fake tensors, and the logits with their gradients. The frozen LLM
    saves none; the working memory of its widest layer counts as `llm_activations`.

    Args:
        config: The model.
        setup: How it trains.

    Returns:
        Bytes of `llm`, `trained`, `frozen` (SLM weights under LoRA), `gradients`, `optimizer`, `activations`,
        `llm_activations` and `total`.
    """
    model = without_storage(config, setup.llm_states, setup.lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    llm = sum(parameter.nbytes for name, parameter in model.named_parameters() if LLM_PREFIX in name)
    every = sum(parameter.nbytes for parameter in model.parameters())
    weights = sum(parameter.nbytes for parameter in trained)
    memory = {
        "llm": llm // setup.shards,
        "trained": weights // setup.shards,
        "frozen": (every - llm - weights) // setup.shards,
        "gradients": weights // setup.shards,
        "optimizer": _optimizer_bytes(trained, setup.optimizer) // setup.shards,
        "activations": _activations(config, setup),
        "llm_activations": 0 if setup.llm_states else _llm_activations(config, setup.batch_size, setup.prompt_length),
    }
    return {**memory, "total": sum(memory.values())}


def generation_memory(
    config: LLM2SLMConfig, *, batch_size: int, prompt_length: int, output_length: int
) -> dict[str, int]:
    """
    Return the bytes of all weights and of the SLM's KV cache that generation needs.

    Args:
        config: The model.
        batch_size: Prompts per batch, times beams.
        prompt_length: Tokens per prompt.
        output_length: Tokens per output.

    Returns:
        Bytes of `weights`, `cache` and `total`.
    """
    model = without_storage(config, llm_states=False, lora=None)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    slm, quirks = config.get_text_config(decoder=True), quirks_of(config.decoder)
    heads = getattr(slm, "num_key_value_heads", None) or slm.num_attention_heads
    width = getattr(slm, quirks.head_size, None) or slm.hidden_size // slm.num_attention_heads
    positions = prompt_length + output_length
    # An encoder-decoder SLM caches the prompt in its cross-attention, a decoder-only one before the output.
    number_size = 2 if slm.dtype == torch.bfloat16 else 4
    cache = 2 * slm.num_hidden_layers * batch_size * positions * heads * width * number_size
    return {"weights": weights, "cache": cache, "total": weights + cache}


def without_storage(config: LLM2SLMConfig, llm_states: bool = False, lora: Mapping[str, Any] | None = None) -> Any:
    """Return the model as it trains, on the meta device."""
    config = copy.deepcopy(config)
    with torch.device("meta"), no_init_weights():
        model = (LLM2SLMWithoutLLM if llm_states else LLM2SLMForConditionalGeneration)(config).train()
        for part in (model.encoder.llm, model.decoder):
            part.tie_weights()  # which the skipped initialization would do
        object.__setattr__(model.encoder, "check_prompt", lambda *_: None)  # it would read values
        if lora is None:
            return model
        from peft import get_peft_model

        return get_peft_model(model, lora_config(model, **lora)).train()


def _activations(config: LLM2SLMConfig, setup: TrainingSetup) -> int:
    if not setup.gradient_checkpointing:
        return _saved_bytes(config, setup)
    # All but the layers, one layer that is computed again, and the input of each layer.
    layers, width = config.decoder.num_hidden_layers, config.hidden_size * (2 if setup.bf16 else 4)
    inputs = layers * setup.batch_size * (setup.prompt_length + setup.output_length) * width
    return _saved_bytes(_with_one_layer(config), setup) + inputs


def _with_one_layer(config: LLM2SLMConfig) -> LLM2SLMConfig:
    config = copy.deepcopy(config)
    config.decoder.num_hidden_layers = 1
    if (name := quirks_of(config.decoder).decoder_layers) is not None:
        setattr(config.decoder, name, 1)
    return config


def _saved_bytes(config: LLM2SLMConfig, setup: TrainingSetup) -> int:
    """Return the bytes of the tensors that a forward pass saves, without weights, and of the logits' gradients."""
    batch, prompt = setup.batch_size, setup.prompt_length
    model, fake = without_storage(config, llm_states=True, lora=setup.lora), FakeTensorMode()
    make_fake(model, fake)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, Any] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage  # kept alive, so that no other storage gets its id
        return tensor

    with (
        fake,
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=setup.bf16),
    ):
        outputs = model(
            input_ids=torch.zeros(batch, prompt, dtype=torch.long),
            attention_mask=torch.ones(batch, prompt, dtype=torch.long),
            llm_hidden_states=torch.zeros(batch, prompt, config.llm_hidden_size, dtype=torch.bfloat16),
            labels=torch.zeros(batch, setup.output_length, dtype=torch.long),
        )
    # The output keeps its logits while the loss, computed in float32, passes back two gradients of their size.
    logits = outputs.logits.nbytes + 2 * 4 * outputs.logits.numel()
    return sum(storage.nbytes() for storage in saved.values()) + logits


def make_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Replace the tensors of a model on the meta device by fake ones on the CPU, without storage; ties stay ties."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    faked = FakeTensor(fake, tensor.detach().to("meta"), torch.device("cpu"))
                    is_weight = tensors is module._parameters
                    made[id(tensor)] = nn.Parameter(faked, tensor.requires_grad) if is_weight else faked
                if tensor is not None:
                    tensors[name] = made[id(tensor)]


def _llm_activations(config: LLM2SLMConfig, batch: int, prompt: int) -> int:
    """Return the bytes of the widest layer of a frozen LLM: hidden states, feed-forward layer and attention."""
    llm = llm_sizes(config.encoder)
    width = getattr(llm, quirks_of(llm).feed_forward_size, None) or 4 * llm.hidden_size
    numbers = 4 * llm.hidden_size + 2 * width + llm.num_attention_heads * prompt
    return batch * prompt * numbers * (2 if config.encoder_dtype in ("bfloat16", "float16") else 4)


def _optimizer_bytes(trained: list[nn.Parameter], optimizer: str) -> int:
    if optimizer == "adafactor":
        return 4 * sum(sum(p.shape[-2:]) if p.dim() > 1 else p.numel() for p in trained)
    return 2 * sum(parameter.nbytes for parameter in trained)
