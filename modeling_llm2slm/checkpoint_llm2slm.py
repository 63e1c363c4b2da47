# Copyright 2026 The modeling-llm2slm authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Checkpoints of an LLM-to-SLM model: full ones, and lean ones that leave out the frozen LLM and say where it comes from.
"""

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.utils import logging

from .files_llm2slm import (
    INDEX,
    WEIGHTS,
    StoredTensor,
    atomic_write,
    fingerprint,
    first_line,
    locate_tensors,
    open_weights,
    shape_of,
    shard_names,
    weight_files,
)


logger = logging.get_logger(__name__)

LLM_PREFIX = "encoder.llm."
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
UPLOAD_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")
# Fewer new parameters than this are no danger, whatever a config says: 256 MB in float32.
FREE_PARAMETERS = 2**26
FREE_BYTES = 2**32  # masks and the like, which are in no file


class LoadRequest(NamedTuple):
    """What `from_pretrained` was asked for, where transformers does not hand it on."""

    path: str
    folder: str | None  # of a local checkpoint
    encoder_path: str | None
    encoder_revision: str | None
    any_size: bool
    hub: dict[str, Any]


# Per thread: two may load at once.
_REQUEST: ContextVar[LoadRequest | None] = ContextVar("llm2slm_load_request", default=None)


class LLM2SLMCheckpointMixin:
    """Saving, loading and uploading, with or without the LLM."""

    # What `save_pretrained` does where it is not told: `Trainer` tells it nothing.
    include_llm: bool = True
    # The module that writes model cards, where the package is installed; remote code writes none.
    model_cards: ClassVar[Any] = None

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
        [`PreTrainedModel.from_pretrained`], full and lean checkpoints alike. Weights are read from safetensors only.

        The LLM of a lean checkpoint is read from where its config says, with the same `cache_dir`, `token`,
        `local_files_only`, dtype, quantization and `device_map` as the rest. No code of that place is ever run.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or the id of a repository.
            encoder_pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*):
                Folder or repository to read the LLM from, in place of what the config says.
            encoder_revision (`str`, *optional*): The revision of that repository.

        Raises:
            OSError: If files are missing or damaged, or the LLM cannot be found.
            ValueError: If the LLM is another one than the model was trained with; the message names both fingerprints.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("`use_safetensors=False` would read pickled weights. Leave it out.")
        path = str(pretrained_model_name_or_path)
        folder = os.path.join(path, kwargs.get("subfolder") or "") if os.path.isdir(path) else None
        if folder is not None and os.path.isfile(index := os.path.join(folder, INDEX)):
            shard_names(Path(index))  # before any of the files is opened
        llm = encoder_pretrained_model_name_or_path
        request = LoadRequest(
            path=path,
            folder=folder,
            encoder_path=None if llm is None else str(llm),
            encoder_revision=encoder_revision,
            any_size=bool(kwargs.get("ignore_mismatched_sizes")),
            hub={name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None},
        )
        token = _REQUEST.set(request)
        try:
            loaded = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs
            )
            (loaded[0] if isinstance(loaded, tuple) else loaded).eval()  # takes note of the generation config
            return loaded
        except (AttributeError, KeyError, OverflowError, TypeError) as error:  # values that no model is made of
            raise ValueError(f"{path} cannot be loaded: {type(error).__name__}, {first_line(error)}") from error
        finally:
            _REQUEST.reset(token)

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel, state_dict: Any, checkpoint_files: list[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        # The one step of `from_pretrained` at which the model is complete, on the meta device, and no memory is taken.
        request = _REQUEST.get() if state_dict is None else None
        if request is not None and checkpoint_files:
            weights, config = open_weights(checkpoint_files), model.config
            told, config.llm_source = config.llm_source, _in_memory(config.llm_source, request)
            config.slm_source = _in_memory(config.slm_source, request)
            if config.lean or request.encoder_path:
                state_dict, checkpoint_files = weights | _llm_weights(model, told or {}, request), None
                config.lean = False
            elif not any(name.startswith(LLM_PREFIX) for name in weights):
                raise OSError(_lacks_llm(request))
            _check_sizes(model, state_dict or weights, request)
        loaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
        # By the names that transformers gave what it read, which are not always those in the files.
        if request is not None and _new_in_llm(model, loaded[0].missing_keys):
            raise OSError(_lacks_llm(request))
        on_disk = loaded[1] or {}  # of tensors that did not come from a file by this name, it lacks the tied names
        for name, source in model.all_tied_weights_keys.items():
            if source in on_disk:
                on_disk.setdefault(name, on_disk[source])
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        include_llm: bool | None = None,
        push_to_hub: bool = False,
        card: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        r"""
        [`PreTrainedModel.save_pretrained`], with a model card. Either all of it is written or nothing: a crash leaves
        an earlier checkpoint in `save_directory` as it was.

        Args:
            save_directory (`str` or `os.PathLike`): The folder to write to.
            include_llm (`bool`, *optional*):
                `False` writes a lean checkpoint: the projector and the SLM, and in the config where the LLM comes
                from, with the fingerprint of its weights. Defaults to `model.include_llm`, which is `True` unless set.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Upload what was written, with `repo_id` and the other arguments of `push_to_hub`.
            card (`dict`, *optional*): What the model card shall say, see [`model_card`].
            kwargs: Arguments of [`PreTrainedModel.save_pretrained`].

        Raises:
            ValueError: If a lean checkpoint could not be loaded again: the LLM has no known source, or has changed.
        """
        if push_to_hub and kwargs.get("distributed_checkpoint"):
            raise ValueError(
                "A distributed checkpoint is not uploaded. Leave out `push_to_hub`, and upload its folder."
            )
        hub = {name: kwargs.pop(name) for name in UPLOAD_ARGUMENTS if name in kwargs} if push_to_hub else {}
        repo_id = hub.pop("repo_id", Path(save_directory).name)
        written = self._save(Path(save_directory), include_llm, repo_id if push_to_hub else None, card, **kwargs)
        if push_to_hub and written:
            self._upload(Path(save_directory), repo_id, written, token=kwargs.get("token"), **hub)

    def _save(
        self,
        target: Path,
        include_llm: bool | None,
        repo_id: str | None,
        card: Mapping[str, Any] | None,
        **kwargs: Any,
    ) -> list[str]:
        """
        Save to a folder, for oneself or for `repo_id`; returns the names of the files, of which a process other than
        the first has none.
        """
        include_llm = self.include_llm if include_llm is None else include_llm
        if repo_id is not None and not include_llm:
            _check_source_is_public(self)
        with _described(self, target, include_llm, public=repo_id is not None), _of_its_own_class(self):
            if not (kwargs.get("is_main_process", True) and _is_first()) or kwargs.get("distributed_checkpoint"):
                super().save_pretrained(target, **kwargs)  # type: ignore[misc]
                return []
            with atomic_write(target) as folder:
                super().save_pretrained(folder, **kwargs)  # type: ignore[misc]
                if self.model_cards is not None:
                    details = {"name": repo_id or target.name, **(card or {})}
                    self.model_cards.write_model_card(self, folder, target, **details)
                return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        include_llm: bool | None = None,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
        token: bool | str | None = None,
        **kwargs: Any,
    ) -> str:
        r"""
        Upload the model with its code and card in one commit. What an interrupted upload has sent is not sent again.

        Args:
            repo_id (`str`): The repository; it is created if it does not exist.
            include_llm (`bool`, *optional*): As in `save_pretrained`.
            max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): As in `save_pretrained`.
            tags (`list[str]`, *optional*): Further tags of the model card.
            token (`bool` or `str`, *optional*): Defaults to the one of `hf auth login`.
            kwargs: `commit_message`, `commit_description`, `private`, `revision` (a branch), `create_pr`.

        Returns:
            `str`: The address of the commit; of several processes, an empty text on all but the first, which uploads.
        """
        with TemporaryDirectory() as folder:
            target = Path(folder, repo_id.rpartition("/")[2])
            written = self._save(target, include_llm, repo_id, {"tags": tags}, max_shard_size=max_shard_size)
            return self._upload(target, repo_id, written, token=token, **kwargs) if written else ""

    def _upload(
        self,
        folder: Path,
        repo_id: str,
        written: list[str] | None = None,
        token: bool | str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        **commit: Any,
    ) -> str:
        """Send the files of a checkpoint in one commit; a card that somebody wrote for the repository stays."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        keep = self.model_cards is not None and self.model_cards.has_card_by_hand(repo_id, token)
        commit.setdefault("commit_message", "Upload model")
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            allow_patterns=written,
            ignore_patterns=["README.md"] if keep else None,
            # An earlier upload's weights: a whole file would be loaded in place of new shards.
            delete_patterns=[WEIGHTS, INDEX, "model-*-of-*.safetensors"],
            **commit,
        )


def _is_first() -> bool:
    """Whether this is the process that transformers has write a checkpoint."""
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not group or torch.distributed.get_rank() == 0


def _lacks_llm(request: LoadRequest) -> str:
    return f"{request.path} lacks the LLM: pass `encoder_pretrained_model_name_or_path`."


def _new_in_llm(model: Any, missing: Collection[str]) -> list[str]:
    """The LLM's parameters that are `missing` in a checkpoint, and tied to none that is there."""
    if getattr(model, "is_quantized", False):
        return []  # its parameters have other names than what they are made of
    tied = model.all_tied_weights_keys
    held = {tied.get(name, name) for name, _ in model.named_parameters(remove_duplicate=False) if name not in missing}
    of_llm = (LLM_PREFIX + name for name, _ in model.encoder.llm.named_parameters(remove_duplicate=False))
    return [name for name in of_llm if name in missing and tied.get(name, name) not in held]


def record_sources(model: Any, paths: Sequence[Any], hub: Sequence[dict[str, Any]]) -> None:
    """
    Write into the config of a new composite where its parts come from.

    Args:
        model: The composite.
        paths: Folder or repository of LLM and SLM; `None` for a model that was given loaded.
        hub: The arguments each was loaded with (`revision`, `subfolder`, `cache_dir`, `token`, ...).
    """
    sources = []
    for part, path, kwargs in zip((model.encoder.llm, model.decoder), paths, hub, strict=True):
        path = path or part.config.name_or_path
        sources.append(describe_source(str(path), **kwargs) if path else None)
    model.config.llm_source = _with_fingerprint(sources[0], model.encoder.llm, hub[0])
    model.config.slm_source = sources[1]


def _with_fingerprint(
    source: dict[str, Any] | None, llm: PreTrainedModel, hub: Mapping[str, Any]
) -> dict[str, Any] | None:
    """A source with the fingerprint of what is there, or `None` if a lean checkpoint could not be loaded with it."""
    if source is None:
        return None
    try:
        located = _locate(source, llm, hub)
    except (OSError, ValueError, KeyError) as error:  # in pickle, or under names that transformers changes
        logger.info(f"There will be no lean checkpoints with the LLM of {source['name_or_path']}: {error}")
        return None
    return {**source, "fingerprint": fingerprint(located)}


def _locate(source: Mapping[str, Any], llm: PreTrainedModel, hub: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """
    The tensors of an LLM where a source has them on this machine. `OSError` if there are no files, `ValueError` if a
    lean checkpoint would not find a tensor in them.
    """
    located = locate_tensors(_source_files(source, {**hub, "local_files_only": True}))
    names, missing = _select(located, llm)
    if missing:
        raise ValueError(f"it has no {missing[0]} by this name")
    return {name: located[held] for name, held in names.items()}


def describe_source(path: str, **kwargs: Any) -> dict[str, Any] | None:
    """
    Where a model comes from: `name_or_path`, absolute for a folder, with the `revision` of a repository as a commit
    where the cache knows it. `None` for what is neither.
    """
    where = {"subfolder": kwargs["subfolder"]} if kwargs.get("subfolder") else {}
    if os.path.isdir(path):
        return {"name_or_path": os.path.abspath(path), **where}
    if _is_local(path) or not is_repo_id(path):
        return None
    return {"name_or_path": path, "revision": _commit(path, kwargs) or kwargs.get("revision"), **where}


def is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _commit(repo_id: str, kwargs: Mapping[str, Any]) -> str | None:
    """The commit of what was just loaded, as the cache knows it."""
    config = try_to_load_from_cache(
        repo_id,
        "/".join(filter(None, (kwargs.get("subfolder"), "config.json"))),
        cache_dir=kwargs.get("cache_dir"),
        revision=kwargs.get("revision"),
    )
    parts = Path(config).parts if isinstance(config, str) else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def _is_local(name_or_path: str) -> bool:
    return name_or_path.startswith(".") or os.path.isabs(name_or_path)


def _is_folder(source: Mapping[str, Any]) -> bool:
    """Whether a source is a folder: one that a caller named, so without a fingerprint, may look like a repository."""
    name = source.get("name_or_path") or ""
    return _is_local(name) or (not source.get("fingerprint") and os.path.isdir(name))


def _source_files(source: Mapping[str, Any], hub: Mapping[str, Any]) -> list[Path]:
    name = source["name_or_path"]
    on_hub = not _is_local(name)
    arguments = {key: hub[key] for key in HUB_ARGUMENTS if hub.get(key) is not None}
    if on_hub and source.get("revision"):
        arguments["revision"] = source["revision"]
    return weight_files(name, on_hub, source.get("subfolder") or "", **(arguments if on_hub else {}))


def _llm_weights(model: Any, told: dict[str, Any], request: LoadRequest) -> dict[str, Any]:
    """The LLM's tensors under their names in the composite, from where the caller or else the config told."""
    source = dict(told)
    if request.encoder_path is not None:
        source |= {"name_or_path": request.encoder_path, "revision": request.encoder_revision, "subfolder": None}
        if os.path.isdir(request.encoder_path):
            source["name_or_path"] = os.path.abspath(request.encoder_path)
        if _is_local((model.config.llm_source or {}).get("name_or_path") or "."):
            model.config.llm_source = source  # a repository stays what the model names, whatever copy was read
    else:
        source = _checked_reference(source, request)
    where = f"{source['name_or_path']}" + (f" at {source['revision']}" if source.get("revision") else "")
    logger.warning_once(f"{request.path} is a lean checkpoint: the LLM's weights are read from {where}.")
    files = _source_files(source, request.hub)
    weights = open_weights(files)
    names, missing = _select(weights, model.encoder.llm)
    if missing and not getattr(model, "is_quantized", False):
        raise OSError(f"{where} is another LLM: it lacks {len(missing)} weights, {missing[0]} among them.")
    _check_fingerprint(files, names, source.get("fingerprint"), where, request.path)
    return {LLM_PREFIX + name: weights[held] for name, held in names.items()}


def _check_fingerprint(
    files: list[Path], names: Mapping[str, str], expected: str | None, where: str, checkpoint: str
) -> None:
    if expected is None:
        return
    located = locate_tensors(files)
    found = fingerprint({name: located[held] for name, held in names.items()})
    if found != expected:
        raise ValueError(
            f"The LLM in {where} has fingerprint {found}, but {checkpoint} was trained with {expected}. Pass the LLM "
            "it was trained with as `encoder_pretrained_model_name_or_path`."
        )


def _checked_reference(source: dict[str, Any], request: LoadRequest) -> dict[str, Any]:
    """The LLM that a config refers to: a repository, or a folder given relative to a checkpoint that is local too."""
    placed = _in_memory(source, request) or {}
    name = placed.get("name_or_path")
    inside = ".." not in Path(placed.get("subfolder") or "").parts and not os.path.isabs(placed.get("subfolder") or "")
    if not name or not (os.path.isabs(name) or is_repo_id(name)) or not inside:
        raise ValueError(
            f"{request.path} leaves out the LLM and says {source.get('name_or_path')!r} of where it is, which is "
            "neither a repository nor, in a local checkpoint, a relative path. Pass "
            "`encoder_pretrained_model_name_or_path`."
        )
    return placed


def _in_memory(source: dict[str, Any] | None, request: LoadRequest) -> dict[str, Any] | None:
    """A source as a loaded model holds it: a folder absolute, and only if a local checkpoint names it relatively."""
    name = (source or {}).get("name_or_path") or ""
    if source is None or not _is_local(name):
        return source
    placed = {key: value for key, value in source.items() if key != "name_or_path"}
    if request.folder is not None and not os.path.isabs(name):
        placed["name_or_path"] = os.path.normpath(os.path.join(os.path.realpath(request.folder), name))
    return placed


def _select(weights: Collection[str], llm: PreTrainedModel) -> tuple[dict[str, str], list[str]]:
    """
    What an LLM needs of a checkpoint, by its own names the names there, and what is missing. The checkpoint is one of
    its family, with head and decoder or without, or one of a composite that it is in.
    """
    base, own = f"{llm.base_model_prefix}.", _own_names(llm)
    prefixes = ("", LLM_PREFIX, base, "encoder.", f"{base}encoder.")
    prefix = max(prefixes, key=lambda prefix: sum(prefix + name in weights for name in own))
    found, missing = {}, []
    for name in own:
        names = [prefix + alias for alias in (name, *_tied_to(name, llm))]
        if name == "embed_tokens.weight":  # an encoder alone has of its own what a whole model shares
            names.append(f"{prefix.removesuffix('encoder.')}shared.weight")
        held = next((candidate for candidate in names if candidate in weights), None)
        if held is None:
            missing.append(name)
        else:
            found[name] = held
    return found, missing


def _tied_to(name: str, llm: PreTrainedModel) -> list[str]:
    return [target for target, source in llm.all_tied_weights_keys.items() if source == name]


def _own_names(llm: PreTrainedModel) -> list[str]:
    return [name for name in llm.state_dict() if name not in llm.all_tied_weights_keys]


def _fingerprint_in_memory(llm: PreTrainedModel) -> str | None:
    """
    `None` where the values in memory are not those of the files: in float16, quantized, or not in memory at all, or
    only a share of them (FSDP2), which one process cannot read without the others.
    """
    state = llm.state_dict()
    tensors = {name: state[name] for name in _own_names(llm)}
    exact = (torch.float32, torch.bfloat16, torch.float64)
    if any(tensor.is_meta or tensor.dtype not in exact or hasattr(tensor, "to_local") for tensor in tensors.values()):
        return None
    return fingerprint(tensors)


def _check_sizes(model: PreTrainedModel, weights: Mapping[str, Any], request: LoadRequest) -> None:
    """
    Raise `ValueError` where a tensor has another shape than its parameter, and where the config makes far more
    parameters than the files hold, which would be made up.
    """
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    other = [name for name in parameters if name in weights and shape_of(weights[name]) != parameters[name]]
    if other and not request.any_size and not getattr(model, "is_quantized", False):
        name = other[0]
        raise ValueError(
            f"{name} has shape {shape_of(weights[name])} in the weights of {request.path}, but {parameters[name]} by "
            "its config. Correct the sizes in config.json."
        )
    missing = parameters.keys() - weights.keys() - model.all_tied_weights_keys.keys()
    new = {name: math.prod(parameters[name]) for name in [*missing, *other]}
    held = sum(math.prod(shape_of(tensor)) for tensor in weights.values())
    masks = sum(tensor.nbytes for name, tensor in model.named_buffers() if name not in parameters)
    if sum(new.values()) > held + FREE_PARAMETERS or masks > FREE_BYTES:
        raise ValueError(
            f"{request.path} holds {held:,} parameters, but its config asks for {sum(new.values()):,} others and for "
            f"{masks:,} bytes of masks. Correct the sizes in config.json."
        )


@contextmanager
def _described(model: Any, target: Path, include_llm: bool, public: bool) -> Iterator[None]:
    """While a checkpoint is written: a config that describes it, and the names of what is left out."""
    config, ignored = model.config, model._keys_to_ignore_on_save
    sources = config.llm_source, config.slm_source
    if not include_llm:
        config.llm_source = lean_source(model, at_hand=False)
        check_not_replaced(config.llm_source, target)
        names = [name for name in model.state_dict() if name.startswith(LLM_PREFIX)]
        model._keys_to_ignore_on_save = {*(ignored or ()), *names}
    config.llm_source, config.slm_source = (
        _as_written(source, target, public) for source in (config.llm_source, config.slm_source)
    )
    config.lean = not include_llm
    llm_dtype = model.encoder.llm.dtype
    config.encoder_dtype = None if llm_dtype == model.dtype else str(llm_dtype).removeprefix("torch.")
    try:
        yield
    finally:
        (config.llm_source, config.slm_source), config.lean = sources, False
        model._keys_to_ignore_on_save = ignored


@contextmanager
def _of_its_own_class(model: Any) -> Iterator[None]:
    """transformers saves the code of a model's class, which is one of torch's making while FSDP2 shards it."""
    sharded = type(model)
    if sharded.__module__.startswith("torch.distributed."):
        model.__class__ = next(base for base in sharded.__bases__ if issubclass(base, PreTrainedModel))
    try:
        yield
    finally:
        model.__class__ = sharded


def _as_written(source: dict[str, Any] | None, target: Path, public: bool) -> dict[str, Any] | None:
    """A source as the config at `target` tells it: folders relative to it, and not at all where others read it."""
    if source is None or not _is_local(source.get("name_or_path") or ""):
        return source
    relative = os.path.relpath(os.path.realpath(source["name_or_path"]), os.path.realpath(target))
    name = {} if public else {"name_or_path": relative if relative.startswith(".") else f"./{relative}"}
    return {key: value for key, value in source.items() if key != "name_or_path"} | name


def check_not_replaced(source: Mapping[str, Any] | None, target: str | Path, emptied: bool = False) -> None:
    """Raise `ValueError` where a lean checkpoint at `target`, which may be `emptied` first, replaces its LLM."""
    name = (source or {}).get("name_or_path") or ""
    place, folder = Path(name, (source or {}).get("subfolder") or "").resolve(), Path(target).resolve()
    if _is_folder(source or {}) and (place == folder or (emptied and place.is_relative_to(folder))):
        raise ValueError(
            f"The LLM is in {place}, which a lean checkpoint in {target} would replace. Choose another folder."
        )


def lean_source(model: Any, at_hand: bool = True) -> dict[str, Any]:
    """
    Where a lean checkpoint of a model would find its LLM.

    Args:
        model: The model.
        at_hand: Whether a folder that is known by its fingerprint has to be there. A training whose LLM is out of
            reach for a moment goes on.

    Raises:
        ValueError: If it would find none or another one: the LLM trains, has no known source, or has changed.
    """
    if not model.config.freeze_llm:
        raise ValueError("The LLM trains (`freeze_llm=False`): save it too, with `include_llm=True`.")
    source = dict(model.config.llm_source or {})
    name = source.get("name_or_path")
    if not name:
        raise ValueError(
            "It is not known where the LLM comes from. Save it too, with `include_llm=True`, or name its folder or "
            'repository: `model.config.llm_source = {"name_or_path": ...}`.'
        )
    known = bool(source.get("fingerprint"))  # else named by the caller
    if _is_folder(source):
        source["name_or_path"] = os.path.abspath(name)
    if not os.path.isdir(name) and (_is_local(name) or not is_repo_id(name)) and (at_hand or not known):
        raise ValueError(
            f"A lean checkpoint could not read the LLM from {name}: there is no such folder. Name its folder or "
            'repository: `model.config.llm_source = {"name_or_path": ...}`.'
        )
    found = _fingerprint_in_memory(model.encoder.llm)
    if not known:
        source["fingerprint"] = _fingerprint_of_named(source, model.encoder.llm) or found
    expected = source["fingerprint"]
    if found is not None and found != expected:
        raise ValueError(
            f"The LLM has fingerprint {found}, but that of {name} is {expected}: it was changed, or is another one, "
            "and a lean checkpoint would lose it. Save it too, with `include_llm=True`."
        )
    return source


def _fingerprint_of_named(source: dict[str, Any], llm: PreTrainedModel) -> str | None:
    """
    The fingerprint of files at hand, `None` where they are not. Raise `ValueError` where a lean checkpoint could not
    read the LLM from them.
    """
    if not all(parameter.is_floating_point() for parameter in llm.parameters()):
        return None  # quantized, its tensors have names of their own
    name = source["name_or_path"]
    try:
        return fingerprint(_locate(source, llm, {}))
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and not _is_local(name):
            return None  # a repository that is not in the cache
        raise ValueError(
            f"A lean checkpoint could not read this LLM from {name}, as {first_line(error).removesuffix('.')}: name "
            "the place that holds it, or save it anew, with `model.encoder.llm.save_pretrained(folder, "
            "save_original_format=False)`, and name that folder."
        ) from error


def _check_source_is_public(model: Any) -> None:
    source = model.config.llm_source or {}
    if _is_folder(source):
        raise ValueError(
            f"The LLM comes from the folder {source['name_or_path']}, which nobody else has: a lean checkpoint on "
            "the Hub has to name a repository. Upload the LLM too, with `include_llm=True`."
        )
