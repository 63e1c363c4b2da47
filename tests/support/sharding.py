"""Sharding a composite over processes with FSDP2, for those who train without `Trainer`."""

from __future__ import annotations

from typing import Any

from modeling_llm2slm import LLM2SLMForConditionalGeneration


def shard(model: LLM2SLMForConditionalGeneration, **kwargs: Any) -> LLM2SLMForConditionalGeneration:
    """
    Shards a composite in place with `torch.distributed.fsdp.fully_shard`: each layer of LLM and SLM is a unit, and all
    that lies outside of layers, embeddings among it, is the last one. A frozen LLM may have a dtype of its own.

    Args:
        model: The model, the same in every process, of which there has to be a group.
        kwargs: Arguments of `fully_shard`, such as `mesh`, `mp_policy` and `reshard_after_forward`.

    Returns:
        The model. `generate`, `encode_prompt` and `encode_llm` are made to gather weights as `forward` does.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    names = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module, **kwargs)
    fully_shard(model, **kwargs)
    for name in ("generate", "encode_prompt", "encode_llm"):
        register_fsdp_forward_method(model, name)
    return model
