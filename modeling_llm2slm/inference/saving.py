"""Saving and uploading an LLM-to-SLM model: full checkpoints, and lean ones that leave out the frozen LLM."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import PreTrainedModel

from ..checkpoint_llm2slm import LLM_PREFIX, is_local, is_repo_id, own_names, select_weights, source_files
from ..data.atomic import atomic_write
from ..files_llm2slm import INDEX, WEIGHTS, fingerprint, first_line, open_weights
from .model_card import has_card_by_hand, write_model_card


UPLOADED_CLASS = "modeling_llm2slm.LLM2SLMForConditionalGeneration"
UPLOAD_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike,
    include_llm: bool | None = None,
    push_to_hub: bool = False,
    card: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """See [`LLM2SLMForConditionalGeneration.save_pretrained`]."""
    if push_to_hub and kwargs.get("distributed_checkpoint"):
        raise ValueError("A distributed checkpoint is not uploaded. Leave out `push_to_hub`, and upload its folder.")
    hub = {name: kwargs.pop(name) for name in UPLOAD_ARGUMENTS if name in kwargs} if push_to_hub else {}
    repo_id = hub.pop("repo_id", Path(save_directory).name)
    written = save(model, Path(save_directory), include_llm, repo_id if push_to_hub else None, card, **kwargs)
    if push_to_hub and written:
        upload(model, Path(save_directory), repo_id, written, token=kwargs.get("token"), **hub)


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    include_llm: bool | None = None,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
    token: bool | str | None = None,
    **kwargs: Any,
) -> str:
    """See [`LLM2SLMForConditionalGeneration.push_to_hub`]."""
    with TemporaryDirectory() as folder:
        target = Path(folder, repo_id.rpartition("/")[2])
        written = save(model, target, include_llm, repo_id, {"tags": tags}, max_shard_size=max_shard_size)
        return upload(model, target, repo_id, written, token=token, **kwargs) if written else ""


def save(
    model: Any,
    target: Path,
    include_llm: bool | None,
    repo_id: str | None,
    card: Mapping[str, Any] | None,
    **kwargs: Any,
) -> list[str]:
    """Save to a folder, to keep or to upload to `repo_id`. Return the files that this process has written."""
    adapter = adapter_of(model)
    include_llm = adapter is not None or (model.include_llm if include_llm is None else include_llm)
    if repo_id is None and model.uploaded is not None and target.resolve().is_relative_to(model.uploaded[0]):
        repo_id = model.uploaded[1]
    if repo_id is not None and not include_llm:
        check_source_is_public(model.config.llm_source or {})
    with _described(model, target, include_llm, public=repo_id is not None), as_uploaded(model):
        if not (kwargs.get("is_main_process", True) and _is_first()) or kwargs.get("distributed_checkpoint"):
            PreTrainedModel.save_pretrained(model, target, **kwargs)
            return []
        with atomic_write(target) as folder:
            PreTrainedModel.save_pretrained(model, folder, **kwargs)
            details = {"name": repo_id or target.name, "adapter": adapter, **(card or {})}
            write_model_card(model, folder, target, **details)
            return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def upload(
    model: Any,
    folder: Path,
    repo_id: str,
    written: list[str],
    token: bool | str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    **commit: Any,
) -> str:
    """Send the files of a checkpoint in one commit. A card that somebody wrote for the repository stays."""
    holds_weights = any(name in (WEIGHTS, INDEX) for name in written)  # those of an adapter have other names
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    keep = has_card_by_hand(repo_id, token)
    commit.setdefault("commit_message", "Upload model")
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        allow_patterns=written,
        ignore_patterns=["README.md"] if keep else None,
        # Weights of an earlier upload: a whole file would be loaded instead of new shards.
        delete_patterns=[WEIGHTS, INDEX, "model-*-of-*.safetensors"] if holds_weights else None,
        **commit,
    )


def adapter_of(model: Any) -> Any:
    """Return the config of the adapter that `model.add_adapter` has added; `save_pretrained` saves it alone."""
    return model.peft_config[model.active_adapters()[0]] if model._hf_peft_config_loaded else None


def _is_first() -> bool:
    """Return whether this process is the one that writes a checkpoint."""
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not group or torch.distributed.get_rank() == 0


@contextmanager
def _described(model: Any, target: Path, include_llm: bool, public: bool) -> Iterator[None]:
    """While a checkpoint is written, make the config describe it, and leave out the LLM's weights if it is lean."""
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
    # `_auto_class` names one Auto class only.
    config.auto_map = {**(getattr(config, "auto_map", None) or {}), "AutoModel": UPLOADED_CLASS}
    llm_dtype = model.encoder.llm.dtype
    config.encoder_dtype = None if llm_dtype == model.dtype else str(llm_dtype).removeprefix("torch.")
    try:
        yield
    finally:
        (config.llm_source, config.slm_source), config.lean = sources, False
        model._keys_to_ignore_on_save = ignored


@contextmanager
def as_uploaded(instance: Any) -> Iterator[None]:
    """
    Give a model or a processor the class whose code an upload carries: transformers saves the file that defines the
    class, and the files it imports. FSDP2 gives a model yet another class, without a file.
    """
    current = type(instance)
    instance.__class__ = next(base for base in current.__mro__ if vars(base).get("_auto_class"))
    try:
        yield
    finally:
        instance.__class__ = current


def _as_written(source: dict[str, Any] | None, target: Path, public: bool) -> dict[str, Any] | None:
    """Return a source as the config at `target` holds it: a folder relative to it, and no folder if it is uploaded."""
    if source is None or not is_local(source.get("name_or_path") or ""):
        return source
    relative = os.path.relpath(os.path.realpath(source["name_or_path"]), os.path.realpath(target))
    name = {} if public else {"name_or_path": relative if relative.startswith(".") else f"./{relative}"}
    return {key: value for key, value in source.items() if key != "name_or_path"} | name


def check_source_is_public(source: Mapping[str, Any]) -> None:
    if _is_folder(source):
        raise ValueError(
            f"The LLM comes from the folder {source['name_or_path']}, which nobody else has: a lean checkpoint on "
            "the Hub has to name a repository. Upload the LLM too, with `include_llm=True`."
        )


def _is_folder(source: Mapping[str, Any]) -> bool:
    """Return whether a source is a folder. Without a fingerprint, it may have the form of a repository."""
    name = source.get("name_or_path") or ""
    return is_local(name) or (not source.get("fingerprint") and os.path.isdir(name))


def check_not_replaced(source: Mapping[str, Any] | None, target: str | Path, emptied: bool = False) -> None:
    """Raise `ValueError` if a lean checkpoint at `target`, which may be `emptied` first, would replace its LLM."""
    source = source or {}
    place = Path(source.get("name_or_path") or "", source.get("subfolder") or "").resolve()
    folder = Path(target).resolve()
    if _is_folder(source) and (place == folder or (emptied and place.is_relative_to(folder))):
        raise ValueError(
            f"The LLM is in {place}, which a lean checkpoint in {target} would replace. Choose another folder."
        )


def lean_source(model: Any, at_hand: bool = True) -> dict[str, Any]:
    """
    Return the source that a lean checkpoint of a model would load its LLM from.

    Args:
        model: The model.
        at_hand: Whether a folder with a known fingerprint has to exist. A training continues while it is out of reach.

    Raises:
        ValueError: If it would find no LLM or another one: the LLM trains, has no known source, or has changed.
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
    known = bool(source.get("fingerprint"))  # else the caller named it
    if _is_folder(source):
        source["name_or_path"] = os.path.abspath(name)
    if not os.path.isdir(name) and (is_local(name) or not is_repo_id(name)) and (at_hand or not known):
        raise ValueError(
            f"A lean checkpoint could not read the LLM from {name}: there is no such folder. Name its folder or "
            'repository: `model.config.llm_source = {"name_or_path": ...}`.'
        )
    found = _fingerprint_in_memory(model.encoder.llm)
    if not known:
        source["fingerprint"] = _fingerprint_of_named(source, model.encoder.llm) or found
    if found is not None and found != source["fingerprint"]:
        raise ValueError(
            f"The LLM has fingerprint {found}, but that of {name} is {source['fingerprint']}: it was changed, or is "
            "another one, and a lean checkpoint would lose it. Save it too, with `include_llm=True`."
        )
    return source


def _fingerprint_in_memory(llm: PreTrainedModel) -> str | None:
    """
    Return the LLM's fingerprint, or `None` if its values are not those of the files (float16, quantized) or not in the
    memory of this process (offloaded, FSDP2).
    """
    state = llm.state_dict()
    tensors = {name: state[name] for name in own_names(llm)}
    exact = (torch.float32, torch.bfloat16, torch.float64)
    if any(tensor.is_meta or tensor.dtype not in exact or hasattr(tensor, "to_local") for tensor in tensors.values()):
        return None
    return fingerprint(tensors)


def locate_llm(source: Mapping[str, Any], llm: PreTrainedModel, hub: Mapping[str, Any]) -> dict[str, Any]:
    """
    Open the tensors of an LLM where a source has them on this machine. Raise `OSError` if there are no files, and
    `ValueError` if a lean checkpoint would not find a tensor in them.
    """
    weights = open_weights(source_files(source, {**hub, "local_files_only": True}))
    names, missing = select_weights(weights, llm)
    if missing:
        raise ValueError(f"it has no {missing[0]} by this name")
    return {name: weights[held] for name, held in names.items()}


def _fingerprint_of_named(source: dict[str, Any], llm: PreTrainedModel) -> str | None:
    """
    Return the fingerprint of a source's files, or `None` if they are not on this machine. Raise `ValueError` if a lean
    checkpoint could not read the LLM from them.
    """
    if not all(parameter.is_floating_point() for parameter in llm.parameters()):
        return None  # a quantized LLM has tensors of other names
    name = source["name_or_path"]
    try:
        return fingerprint(locate_llm(source, llm, {}))
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and not is_local(name):
            return None  # a repository that is not in the cache
        raise ValueError(
            f"A lean checkpoint could not read this LLM from {name}, as {first_line(error).removesuffix('.')}: name "
            "the place that holds it, or save it again, with `model.encoder.llm.save_pretrained(folder, "
            "save_original_format=False)`, and name that folder."
        ) from error
