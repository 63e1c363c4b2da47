# Copyright 2026 The modeling-llm2slm authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of an LLM-to-SLM model: full ones, and lean ones that leave out the frozen LLM and name its source."""

import os
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .files_llm2slm import INDEX, fingerprint, first_line, open_weights, shard_names, weight_files


logger = logging.get_logger(__name__)

LLM_PREFIX = "encoder.llm."
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
LACKS_LLM = "{} lacks the LLM: pass `encoder_pretrained_model_name_or_path`."


class LoadRequest(NamedTuple):
    """Arguments of `from_pretrained` that transformers does not pass on to the steps of a load."""

    path: str
    folder: str | None  # of a local checkpoint
    encoder_path: str | None
    encoder_revision: str | None
    any_size: bool
    hub: dict[str, Any]


# Per thread: two may load at once.
_REQUEST: ContextVar[LoadRequest | Literal[False] | None] = ContextVar("llm2slm_load_request", default=None)


class LLM2SLMCheckpointMixin:
    """Loading of full and lean checkpoints, and saving of full ones."""

    def initialize_weights(self: Any) -> None:
        """Initialize weights that were not loaded; the fusion's at the end of a load, when LLM and SLM can run."""
        super().initialize_weights()  # type: ignore[misc]
        weights = self._fusion_weights()
        self._new = {name for name in weights if not getattr(weights[name], "_is_hf_initialized", False)}
        if "projector.linear_1.weight" not in self._new:  # without a mean and a scale, it was trained on H itself
            self._new -= {"projector.mean", "projector.scale"}
        if _REQUEST.get() is None:
            self._initialize_fusion()

    @torch.no_grad()
    def _initialize_fusion(self: Any) -> None:
        weights = self._fusion_weights()
        new = getattr(self, "_new", set()) & weights.keys()  # an adapter may have replaced some
        if any(weights[name].is_meta or not weights[name].is_floating_point() for name in new):
            raise ValueError(
                f"The checkpoint lacks `encoder.{min(new)}`, which cannot be initialized if quantized or offloaded. "
                "Load and save the model once without `quantization_config` and offloading."
            )
        if new:
            loaded = {name: weights[name].clone() for name in weights.keys() - new}
            self.encoder.fusion.initialize(self.encoder)
            for name, weight in loaded.items():
                weights[name].copy_(weight)

    def _fusion_weights(self: Any) -> dict[str, torch.Tensor]:
        state = nn.ModuleDict(self.encoder.new_modules()).state_dict(keep_vars=True)
        return {name: one for name, one in state.items() if isinstance(one, nn.Parameter) or one.is_floating_point()}

    def check_weights(self, weights: Mapping[str, Any], path: str, any_size: bool) -> None:
        """Check the tensors of a checkpoint; the installed package overrides this."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, include_llm: bool | None = None, card: Any = None, **kwargs: Any
    ) -> None:
        """Save a full checkpoint. The installed package also saves lean ones and writes model cards."""
        if include_llm is False or card is not None:
            raise ValueError(
                "`include_llm=False` and `card` need the package: `pip install modeling-llm2slm`, and import it first."
            )
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        encoder_pretrained_model_name_or_path: str | os.PathLike | None = None,
        encoder_revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        r"""
        Load a full or a lean checkpoint, see [`PreTrainedModel.from_pretrained`]. Only safetensors are read. The LLM
        of a lean checkpoint is read from the source in its config, with the `cache_dir`, `token`, `local_files_only`,
        dtype, quantization and `device_map` of the rest, and no code of that source is run.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or the id of a repository.
            encoder_pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*): Another source of the LLM.
            encoder_revision (`str`, *optional*): The revision of that repository.

        Raises:
            OSError: If files are missing or damaged, or the LLM cannot be found.
            ValueError: If the LLM is not the one the model was trained with; the message names both fingerprints.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("`use_safetensors=False` would read pickled weights. Leave it out.")
        path = str(pretrained_model_name_or_path)
        folder = os.path.join(path, kwargs.get("subfolder") or "") if os.path.isdir(path) else None
        if folder is not None and os.path.isfile(index := os.path.join(folder, INDEX)):
            shard_names(Path(index))  # before any of the files is opened
        llm, any_size = encoder_pretrained_model_name_or_path, bool(kwargs.get("ignore_mismatched_sizes"))
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        llm = None if llm is None else str(llm)
        token = _REQUEST.set(LoadRequest(path, folder, llm, encoder_revision, any_size, hub))
        try:
            loaded = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs
            )
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.eval()._initialize_fusion()  # `eval()` records the special ids
            return loaded
        except (AttributeError, KeyError, OverflowError, TypeError) as error:  # no model has such values
            cause = f"a value in one of its JSON files is invalid ({first_line(error)})"
            raise ValueError(f"{path} cannot be loaded: {cause}. Correct it.") from error
        finally:
            _REQUEST.reset(token)

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel, state_dict: Any, checkpoint_files: list[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        # The one step of `from_pretrained` at which the model is complete, on the meta device, and takes no memory.
        request = (_REQUEST.get() or None) if state_dict is None else None
        if request is not None:
            _REQUEST.set(False)  # until the end of `from_pretrained`: the next step, if any, loads an adapter
        if request is not None and request.path != (path := str(model.config.name_or_path)):  # an adapter's base
            request = request._replace(path=path, folder=path if os.path.isdir(path) else None)
        if request is not None and checkpoint_files:
            weights, config = open_weights(checkpoint_files), model.config
            recorded_source, config.llm_source = config.llm_source, _in_memory(config.llm_source, request)
            config.slm_source = _in_memory(config.slm_source, request)
            if config.lean or request.encoder_path:
                state_dict = weights | _llm_weights(model, recorded_source or {}, request)
                checkpoint_files = None
                config.lean = False
            elif not any(name.startswith(LLM_PREFIX) for name in weights):
                raise OSError(LACKS_LLM.format(request.path))
            model.check_weights(state_dict or weights, request.path, request.any_size)
        loaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
        # `missing_keys` has transformers' own names, which may differ from those in the files.
        if request is not None and _new_in_llm(model, loaded[0].missing_keys):
            raise OSError(LACKS_LLM.format(request.path))
        on_disk = loaded[1] or {}  # lacks tied names of tensors that were not read from a file under this name
        for name, source in model.all_tied_weights_keys.items():
            if source in on_disk:
                on_disk.setdefault(name, on_disk[source])
        return loaded


def _new_in_llm(model: Any, missing: Collection[str]) -> list[str]:
    """Return the LLM's parameters that are `missing` in a checkpoint and not tied to one that it holds."""
    if getattr(model, "is_quantized", False):
        return []  # its parameters have other names than the tensors they are made of
    tied = model.all_tied_weights_keys
    held = {tied.get(name, name) for name, _ in model.named_parameters(remove_duplicate=False) if name not in missing}
    of_llm = (LLM_PREFIX + name for name, _ in model.encoder.llm.named_parameters(remove_duplicate=False))
    return [name for name in of_llm if name in missing and tied.get(name, name) not in held]


def is_repo_id(name: str) -> bool:
    """Return whether a text can be the id of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_local(name_or_path: str) -> bool:
    """Return whether a source names a folder by its path."""
    return name_or_path.startswith(".") or os.path.isabs(name_or_path)


def source_files(source: Mapping[str, Any], hub: Mapping[str, Any]) -> list[Path]:
    name = source["name_or_path"]
    arguments = {key: hub[key] for key in HUB_ARGUMENTS if hub.get(key) is not None}
    if source.get("revision"):
        arguments["revision"] = source["revision"]
    return weight_files(name, not is_local(name), source.get("subfolder") or "", **arguments)


def _llm_weights(model: Any, recorded_source: dict[str, Any], request: LoadRequest) -> dict[str, Any]:
    """Return the LLM's tensors under their names in the composite, from the caller's source or else the config's."""
    source = dict(recorded_source)
    if request.encoder_path is not None:
        source |= {"name_or_path": request.encoder_path, "revision": request.encoder_revision, "subfolder": None}
        if os.path.isdir(request.encoder_path):
            source["name_or_path"] = os.path.abspath(request.encoder_path)
        if is_local((model.config.llm_source or {}).get("name_or_path") or "."):
            model.config.llm_source = source  # a repository stays the model's source, whatever copy was read
    else:
        source = _checked_reference(source, request)
    where = f"{source['name_or_path']}" + (f" at {source['revision']}" if source.get("revision") else "")
    logger.warning_once(f"{request.path} is a lean checkpoint: the LLM's weights are read from {where}.")
    weights = open_weights(source_files(source, request.hub))
    names, missing = select_weights(weights, model.encoder.llm)
    if missing and not getattr(model, "is_quantized", False):
        raise OSError(f"{where} is another LLM: it lacks {len(missing)} weights, {missing[0]} among them.")
    tensors = {name: weights[held] for name, held in names.items()}
    _check_fingerprint(tensors, source.get("fingerprint"), where, request.path)
    return {LLM_PREFIX + name: tensor for name, tensor in tensors.items()}


def _check_fingerprint(tensors: Mapping[str, Any], expected: str | None, where: str, checkpoint: str) -> None:
    if expected is not None and (found := fingerprint(tensors)) != expected:
        raise ValueError(
            f"The LLM in {where} has fingerprint {found}, but {checkpoint} was trained with {expected}. Pass the LLM "
            "it was trained with as `encoder_pretrained_model_name_or_path`."
        )


def _checked_reference(source: dict[str, Any], request: LoadRequest) -> dict[str, Any]:
    """Return the source in a config: a repository, or a folder relative to a checkpoint that is local as well."""
    placed = _in_memory(source, request) or {}
    name, subfolder = placed.get("name_or_path"), placed.get("subfolder") or ""
    inside = ".." not in Path(subfolder).parts and not os.path.isabs(subfolder)
    if not name or not (os.path.isabs(name) or is_repo_id(name)) or not inside:
        raise ValueError(
            f"{request.path} leaves out the LLM and names {source.get('name_or_path')!r} as its source, which is "
            "neither a repository nor, in a local checkpoint, a relative path. Pass "
            "`encoder_pretrained_model_name_or_path`."
        )
    return placed


def _in_memory(source: dict[str, Any] | None, request: LoadRequest) -> dict[str, Any] | None:
    """Return a source for memory: a folder absolute, and only if a local checkpoint names it."""
    name = (source or {}).get("name_or_path") or ""
    if source is None or not is_local(name):
        return source
    placed = {key: value for key, value in source.items() if key != "name_or_path"}
    if request.folder is not None and not os.path.isabs(name):
        placed["name_or_path"] = os.path.normpath(os.path.join(os.path.realpath(request.folder), name))
    return placed


def select_weights(weights: Collection[str], llm: PreTrainedModel) -> tuple[dict[str, str], list[str]]:
    """Map an LLM's own names to those in a checkpoint (of the whole model or a part of it), and list missing ones."""
    base, own = f"{llm.base_model_prefix}.", own_names(llm)
    prefixes = ("", LLM_PREFIX, base, "encoder.", f"{base}encoder.")
    prefix = max(prefixes, key=lambda prefix: sum(prefix + name in weights for name in own))
    found, missing = {}, []
    for name in own:
        tied = (target for target, source in llm.all_tied_weights_keys.items() if source == name)
        names = [prefix + alias for alias in (name, *tied)]
        if name == "embed_tokens.weight":  # an encoder alone owns what it shares with the decoder in a whole model
            names.append(f"{prefix.removesuffix('encoder.')}shared.weight")
        held = next((candidate for candidate in names if candidate in weights), None)
        if held is None:
            missing.append(name)
        else:
            found[name] = held
    return found, missing


def own_names(llm: PreTrainedModel) -> list[str]:
    return [name for name in llm.state_dict() if name not in llm.all_tied_weights_keys]
