"""Mixed adapters: a batch in which each prompt has its own adapter of peft (`generate(adapter_names=...)`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


BASE = "__base__"  # peft's name for no adapter
# The modules that peft can train in full and mix.
MIXED_MODULES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def mixed_adapters(model: nn.Module, inputs: Any, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """
    While `generate()` runs, give each adapted layer one adapter name for each row that it computes.

    peft gives its layers one name for each beam, or for each prompt within `get_encoder()`. But one row of a prompt
    may stand for all its beams, the encoder of the SLM is not part of `get_encoder()`, and samples have rows too.

    Args:
        model: The model, with the hooks of peft.
        inputs: The first argument of `generate()`.
        kwargs: Its other arguments.

    Raises:
        ValueError: If the number of names is not that of the prompts, or peft cannot mix these adapters.
    """
    modules = model.modules() if getattr(model, "peft_config", None) else ()
    layers = {layer: names for layer in modules for names in _hooks(layer).values()}
    if not layers:
        yield
        return
    try:
        prompts, beams = _count(inputs, kwargs), kwargs.get("num_beams")
        names = max(layers.values(), key=len)
        names = names[:: beams if isinstance(beams, int) and beams > 1 else 1]
        if len(names) != prompts:
            raise ValueError(
                f"`adapter_names` has {len(names)} names for {prompts} prompts. Pass one name for each prompt."
            )
        for layer in layers:
            _check_can_mix(layer, {*names} - {BASE})
        with _named_rows(list(layers), names):
            yield
    except BaseException:
        for layer in layers:  # peft's own hooks would stay, and name the rows of the next call
            for key in _hooks(layer):
                layer._forward_pre_hooks.pop(key)
                layer._forward_pre_hooks_with_kwargs.pop(key)
        raise


def _hooks(layer: nn.Module) -> dict[int, list[str]]:
    """Return the adapter names in the hooks that peft has put on a layer, by the keys of the hooks."""
    hooks = {key: getattr(hook, "keywords", {}) for key, hook in layer._forward_pre_hooks.items()}
    return {key: keywords["adapter_names"] for key, keywords in hooks.items() if "adapter_names" in keywords}


def _count(inputs: Any, kwargs: Mapping[str, Any]) -> int:
    """Return the number of prompts in the arguments of `generate()`."""
    states = kwargs.get("encoder_outputs")
    given = (inputs, kwargs.get("input_ids"), kwargs.get("llm_hidden_states"), None if states is None else states[0])
    return next((len(prompt) for prompt in given if prompt is not None), 0)


@contextmanager
def _named_rows(layers: list[nn.Module], names: list[str]) -> Iterator[None]:
    """Repeat the `names` of the prompts for the rows of each layer's input; those of one prompt are adjacent."""

    def name_rows(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        copies = len(args[0]) // len(names)
        return args, {**kwargs, "adapter_names": [name for name in names for _ in range(copies)]}

    hooks = [layer.register_forward_pre_hook(name_rows, with_kwargs=True) for layer in layers]
    # A check of peft refuses DoRA, although its layers mix it.
    flags = [flags for layer in layers if (flags := getattr(layer, "use_dora", None))]
    before = [dict(one) for one in flags]
    try:
        for one in flags:
            one.clear()
        yield
    finally:
        for one, was in zip(flags, before, strict=True):
            one.update(was)
        for hook in hooks:
            hook.remove()


def _check_can_mix(layer: Any, names: set[str]) -> None:
    """Raise `ValueError` if peft cannot mix adapters in a module that some of them train in full."""
    if not hasattr(layer, "original_module"):
        return
    if not isinstance(layer.original_module, MIXED_MODULES):
        raise ValueError(
            f"Adapters that train a whole {type(layer.original_module).__name__} cannot be mixed in a batch. Name its "
            "linear layers in `modules_to_save`, as `lora_config` does."
        )
    if missing := {*names, *layer.active_adapters} - {*layer.modules_to_save}:
        raise ValueError(
            f"{', '.join(map(repr, sorted(missing)))} cannot be mixed with adapters that train other modules in full. "
            "Use adapters with the same `modules_to_save`."
        )
