"""A new LLM-to-SLM model from a pretrained LLM and a pretrained SLM, and where the two come from."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoint_llm2slm import HUB_ARGUMENTS, is_local, is_repo_id
from ..configuration_llm2slm import LLM2SLMConfig
from ..files_llm2slm import fingerprint
from ..fusion_llm2slm import fusion_of
from ..parts_llm2slm import keep_layers, llm_class, reader_of, slm_class
from ..states.fingerprints import tokenizer_fingerprint
from .saving import locate_llm


logger = logging.get_logger(__name__)

REPOSITORY_ARGUMENTS = (*HUB_ARGUMENTS, "revision", "subfolder")
# The fields of a config that the caller chooses: not the parts, their origin and their dtypes.
OWN_FIELDS = set(LLM2SLMConfig.__annotations__) - {
    "decoder", "encoder", "encoder_dtype", "is_encoder_decoder", "lean", "llm_source", "slm_source", "sub_configs",
    "use_cache",
}  # fmt: skip


def build_from_pretrained(model_class: Any, llm: Any, slm: Any, **kwargs: Any) -> Any:
    """See [`LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained`], whose class is `model_class`."""
    config_kwargs = {key: kwargs.pop(key) for key in OWN_FIELDS & kwargs.keys()}
    encoder_kwargs, decoder_kwargs = (pop_prefixed(kwargs, prefix) for prefix in ("encoder_", "decoder_"))
    if kwargs:
        raise ValueError(
            f"Unknown arguments: {', '.join(kwargs)}. Prefix an argument with `encoder_` for the LLM or "
            f"`decoder_` for the SLM, or use one of the configuration: {', '.join(sorted(OWN_FIELDS))}."
        )
    if "shared_tokenizer" not in config_kwargs:
        config_kwargs["shared_tokenizer"] = have_same_tokenizer(llm, slm, encoder_kwargs, decoder_kwargs)
    if (given := encoder_kwargs.get("model")) is not None:
        llm_config = given.config
    else:
        llm_config, encoder_kwargs = _load_config(llm, "encoder", encoder_kwargs)
    decoder = load_slm(slm, decoder_kwargs)
    config = LLM2SLMConfig(encoder=llm_config, decoder=decoder.config, **config_kwargs)
    encoder = load_llm(llm, config, encoder_kwargs)
    config.dtype = decoder.dtype
    if encoder.dtype != decoder.dtype:
        config.encoder_dtype = str(encoder.dtype).removeprefix("torch.")
    model = model_class(config, encoder=encoder, decoder=decoder)
    for module in model.encoder.new_modules().values():
        module.to(device=encoder.device, dtype=decoder.dtype)
    model.encoder.fusion.initialize(model.encoder)
    config.llm_source = _with_fingerprint(_source_of(encoder, llm, encoder_kwargs), encoder, encoder_kwargs)
    config.slm_source = _source_of(decoder, slm, decoder_kwargs)
    return model.eval()


def pop_prefixed(kwargs: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Remove the arguments with a prefix from `kwargs`, and return them without the prefix."""
    return {key.removeprefix(prefix): kwargs.pop(key) for key in list(kwargs) if key.startswith(prefix)}


def load_llm(name_or_path: str | None, composite: LLM2SLMConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load the LLM: the model in `kwargs`, else from `name_or_path`, without the layers that no fusion reads."""
    given, fusion = kwargs.get("model"), fusion_of(composite)
    layers = fusion.llm_layer
    if given is not None:
        llm = reader_of(_check_class(given, "encoder", functools.partial(llm_class, has_head=fusion.llm_has_head)))
        if layers is None:
            return llm
        tensors = [*llm.parameters(), *llm.buffers()]  # the caller's model keeps its layers; the copy shares tensors
        return keep_layers(copy.deepcopy(llm, {id(tensor): tensor for tensor in tensors}), layers)
    config = composite.encoder
    auto_class = llm_class(config, fusion.llm_has_head)
    if layers is None or type(config) not in auto_class._model_mapping:
        llm = reader_of(auto_class.from_pretrained(name_or_path, config=config, **kwargs))
        return keep_layers(llm, layers)

    model_class = auto_class._model_mapping[type(config)]

    class CutModel(model_class):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            reader = keep_layers(reader_of(self), layers)
            self._keys_to_ignore_on_load_unexpected = reader._keys_to_ignore_on_load_unexpected

    llm = CutModel.from_pretrained(name_or_path, config=config, **kwargs)
    llm.__class__ = model_class
    return reader_of(llm)


def load_slm(name_or_path: str | None, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load the SLM: the model in `kwargs`, else from `name_or_path`."""
    if kwargs.get("model") is not None:
        return _check_class(kwargs["model"], "decoder", slm_class)
    config, kwargs = _load_config(name_or_path, "decoder", kwargs)
    return slm_class(config).from_pretrained(name_or_path, config=config, **kwargs)


def _check_class(model: PreTrainedModel, part: str, find_class: Callable[[Any], Any]) -> PreTrainedModel:
    expected = find_class(model.config)._model_mapping[type(model.config)]
    if not isinstance(model, expected):
        raise ValueError(f"`{part}_model` is a {type(model).__name__}. Pass a {expected.__name__}.")
    return model


def _load_config(
    name_or_path: str | None, part: str, kwargs: dict[str, Any]
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Load the config of a part. Return it with the arguments that its weights still need."""
    if name_or_path is None:
        raise ValueError(f"Pass `{part}_pretrained_model_name_or_path`, or a loaded model as `{part}_model`.")
    # Run no code of the part and read no pickle unless the caller asks for it.
    kwargs = {"trust_remote_code": False, "use_safetensors": True} | kwargs
    config, unused = kwargs.pop("config", None), kwargs
    if config is None:
        config, unused = AutoConfig.from_pretrained(name_or_path, return_unused_kwargs=True, **kwargs)
    # Arguments that changed the config are used up; those of the repository (revision, token, ...) are needed again.
    return config, {key: value for key, value in kwargs.items() if key in unused or not hasattr(config, key)}


def have_same_tokenizer(
    llm: str | None, slm: str | None, encoder_kwargs: Mapping[str, Any], decoder_kwargs: Mapping[str, Any]
) -> bool:
    """Return whether two checkpoints have the same tokenizer, by content; `False` if one of them is missing."""
    tokenizers = []
    for path, kwargs in ((llm, encoder_kwargs), (slm, decoder_kwargs)):
        if path is None:
            return False
        hub = {key: kwargs[key] for key in (*REPOSITORY_ARGUMENTS, "trust_remote_code") if key in kwargs}
        try:
            tokenizers.append(AutoTokenizer.from_pretrained(path, **hub))
        except (OSError, ValueError, TypeError) as error:
            logger.info(f"`shared_tokenizer` is set to False, as no tokenizer loads from {path}: {error}")
            return False
    return are_same_tokenizer(*tokenizers)


def are_same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Return whether two tokenizers give every text the same ids: same vocabulary, rules and special tokens."""
    return tokenizer_fingerprint(first) == tokenizer_fingerprint(second)


def _source_of(model: PreTrainedModel, path: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    path = path or model.config.name_or_path  # a model that was given loaded
    return describe_source(str(path), **kwargs) if path else None


def describe_source(path: str, **kwargs: Any) -> dict[str, Any] | None:
    """
    Describe where a model comes from.

    Args:
        path: A folder, or the id of a repository.
        kwargs: The arguments it was loaded with (`revision`, `subfolder`, `cache_dir`, ...).

    Returns:
        `name_or_path` (absolute for a folder), `subfolder` and the `revision` of a repository, as a commit if the
        cache knows it. `None` if `path` is neither.
    """
    where = {"subfolder": kwargs["subfolder"]} if kwargs.get("subfolder") else {}
    if os.path.isdir(path):
        return {"name_or_path": os.path.abspath(path), **where}
    if is_local(path) or not is_repo_id(path):
        return None
    return {"name_or_path": path, "revision": _commit(path, kwargs) or kwargs.get("revision"), **where}


def _commit(repo_id: str, kwargs: Mapping[str, Any]) -> str | None:
    """Return the commit of a model that was just loaded, as the cache knows it."""
    config = try_to_load_from_cache(
        repo_id,
        "/".join(filter(None, (kwargs.get("subfolder"), "config.json"))),
        cache_dir=kwargs.get("cache_dir"),
        revision=kwargs.get("revision"),
    )
    parts = Path(config).parts if isinstance(config, str) else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def _with_fingerprint(
    source: dict[str, Any] | None, llm: PreTrainedModel, hub: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Add the fingerprint of the files to a source. Return `None` if a lean checkpoint could not be loaded from it."""
    if source is None:
        return None
    try:
        return {**source, "fingerprint": fingerprint(locate_llm(source, llm, hub))}
    except (OSError, ValueError, KeyError) as error:  # pickled, or under names that transformers changes
        logger.info(f"There will be no lean checkpoints with the LLM of {source['name_or_path']}: {error}")
        return None
