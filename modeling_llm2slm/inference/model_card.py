"""The model card of an LLM-to-SLM model, written from its config, its training report and its evaluations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import yaml_dump

from ..data.records import without_folders, without_secrets
from ..fusion_llm2slm import fusion_of
from ..settings import METRICS, Metric
from .parts import count_parameters, decoding_modules


MARK = "<!-- Written again on every save. Delete this line to keep your own text. -->"
# transformers (two texts) and peft write these into the cards that they generate.
GENERIC = (
    "This model card has been automatically generated",
    "This model card has been generated automatically",
    "<!-- Provide a quick summary of what the model is/does. -->",
)
TRAINING_HEADING = "## Training procedure"  # in the card of a Trainer
PAPER = "https://arxiv.org/abs/2402.16844"
EVAL_RESULTS = ".eval_results/llm2slm.yaml"  # leaderboards of data sets on the Hub read the files of this folder


@dataclass(frozen=True, kw_only=True)
class CardDetails:
    """
    Contents of a card that the model's config does not have.

    Args:
        language (`str` or `list[str]`, *optional*): Codes of the languages of prompts and outputs, such as `"de"`.
        license (`str`, *optional*): Its licence. Default: that of LLM and SLM, if they have the same.
        datasets (`list[str]`, *optional*): Its training data. Default: the data that `training` names.
        tags (`list[str]`, *optional*): Further tags.
        pipeline_tag (`str`, *optional*, defaults to `"text-generation"`): The task, as the Hub calls it.
        training (`dict`, *optional*): The report of `llm2slm train` (`training.json`).
        evaluations (`list[dict]`, *optional*): Results of `llm2slm evaluate` for this model, for the model index.
        compared (`list[dict]`, *optional*): Results for other models, such as the LLM alone, for the table of times.
        adapter (`peft.PeftConfig`, *optional*): The card is that of an adapter for the model.
    """

    language: str | Sequence[str] | None = None
    license: str | None = None
    datasets: Sequence[str] | None = None
    tags: Iterable[str] | None = None
    pipeline_tag: str = "text-generation"
    training: Mapping[str, Any] | None = None
    evaluations: Sequence[Mapping[str, Any]] = ()
    compared: Sequence[Mapping[str, Any]] = ()
    adapter: Any = None


def model_card(model: Any, name: str, details: CardDetails | None = None) -> ModelCard:
    """
    Return the card of a model, ready to publish.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]): The model.
        name (`str`): Its repository or folder, which the snippet loads.
        details ([`CardDetails`], *optional*): Scores, training, licence and the like.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card, with metadata for the Hub.
    """
    details = details or CardDetails()
    recipe = dict((details.training or {}).get("recipe", {}))
    datasets, license, language = details.datasets, details.license, details.language
    if datasets is None:
        datasets = [recipe["train_data"]] if recipe.get("train_data") else []
    sources = {"LLM": model.config.llm_source, "SLM": model.config.slm_source}
    adapter = details.adapter
    origins = [{"name_or_path": adapter.base_model_name_or_path}] if adapter else sources.values()
    bases = [where for source in origins if (where := _repository(source))]
    licenses = {part: _license_of(source) for part, source in sources.items()}
    if license is None and licenses["LLM"] == licenses["SLM"]:
        license = licenses["LLM"]
    data = ModelCardData(
        language=[language] if isinstance(language, str) else list(language or []) or None,
        license=license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=details.pipeline_tag,
        tags=["llm2slm", "custom_code", *(details.tags or [])],
        base_model=bases or None,
        base_model_relation=("adapter" if adapter else "finetune") if bases else None,
        datasets=[dataset.partition(":")[0] for dataset in datasets if not Path(dataset).suffix] or None,
        model_name=name.rpartition("/")[2] or "llm2slm",
        eval_results=_results(details.evaluations, details.pipeline_tag) or None,
    )
    sections = [
        f"# {data.model_name}",
        _what_it_is(model),
        _snippet(name, getattr(model.config.decoder, "max_position_embeddings", None), adapter),
        "" if adapter else _parts(model, sources, licenses),
        _languages(data.language),
        _training(recipe, details.training, datasets),
        _scores(details.evaluations),
        _times([*details.evaluations, *details.compared]),
        f"The method is by [Bergner et al., arXiv 2402.16844]({PAPER}).",
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{MARK}\n\n{body}\n")


def eval_results(evaluations: Iterable[Mapping[str, Any]], metric: str) -> str:
    """
    Return the content of [`EVAL_RESULTS`]: the scores of one metric on data sets of the Hub.

    Args:
        evaluations: Results of `llm2slm evaluate`. Those of files are left out. The task of a data set is its
            configuration, or `default`.
        metric: The metric that the data sets' leaderboards show.

    Raises:
        ValueError: If no result has this metric on a data set of the Hub.
    """
    entries = []
    for evaluation in evaluations:
        if "split" not in evaluation or metric not in evaluation.get("scores", {}):
            continue
        dataset, _, configuration = str(evaluation["data"]).partition(":")
        notes = [_metric(metric).label, f"split {evaluation['split']}", evaluation.get("signatures", {}).get(metric)]
        entries.append(
            EvalResultEntry(
                dataset_id=dataset,
                task_id=configuration or "default",
                value=round(evaluation["scores"][metric], 2),
                notes=", ".join(filter(None, notes)),
            )
        )
    if not entries:
        raise ValueError(
            f"No result has the metric {metric!r} on a data set of the Hub, which a leaderboard needs. Evaluate on "
            "one: llm2slm evaluate MODEL user/name --split test --output metrics.json."
        )
    return yaml_dump(eval_result_entries_to_yaml(entries))


def extend_card(card: ModelCard, trainers: ModelCard) -> ModelCard:
    """Return a card of [`model_card`] with the metadata and the training procedure that the card of a Trainer has."""
    data = {**trainers.data.to_dict(), **card.data.to_dict()}
    data["tags"] = list(dict.fromkeys(tag for each in (card, trainers) for tag in each.data.get("tags") or ()))
    procedure = trainers.text.partition(TRAINING_HEADING)[2]
    text = f"{card.text.rstrip()}\n" + (f"\n{TRAINING_HEADING}{procedure}" if procedure else "")
    return ModelCard(f"---\n{yaml_dump(data).strip()}\n---\n{text.lstrip()}")


def write_model_card(model: Any, folder: Path, earlier: Path, name: str, **details: Any) -> None:
    """Write the card into `folder`, unless somebody wrote their own card into the `earlier` folder."""
    if has_file_by_hand(earlier / "README.md"):
        return
    (folder / "README.md").write_text(str(model_card(model, name, CardDetails(**details))), encoding="utf-8")


def has_file_by_hand(card: Path) -> bool:
    """Return whether somebody wrote the card in a file by hand."""
    return card.is_file() and is_by_hand(card.read_text(encoding="utf-8", errors="replace"))


def has_card_by_hand(repo_id: str, token: Any = None) -> bool:
    """Return whether somebody wrote the card of a repository by hand."""
    try:
        return is_by_hand(str(ModelCard.load(repo_id, token=token)))
    except EntryNotFoundError:
        return False


def is_by_hand(text: str) -> bool:
    """Return whether somebody wrote a card by hand, or deleted the mark of a generated one."""
    return bool(text.strip()) and not any(sign in text for sign in (MARK, *GENERIC))


def _repository(source: Mapping[str, Any] | None) -> str | None:
    name = (source or {}).get("name_or_path")
    return name if name and not name.startswith((".", "/")) and not name.endswith(".json") else None


def _license_of(source: Mapping[str, Any] | None) -> str | None:
    """Return the licence in the card of a part if the card is on this machine; saving uses no network."""
    if not source or not source.get("name_or_path"):
        return None
    repository = _repository(source)
    card = Path(source["name_or_path"], "README.md")
    if repository is not None:
        cached = try_to_load_from_cache(repository, "README.md", revision=source.get("revision"))
        card = Path(cached) if isinstance(cached, str) else Path("/nowhere")
    try:
        return ModelCard.load(card).data.license if card.is_file() else None
    except Exception:  # broken metadata, for which YAML has many errors
        return None


def _results(evaluations: Sequence[Mapping[str, Any]], task: str) -> list[EvalResult]:
    results = []
    for evaluation in evaluations:
        data = str(evaluation.get("data", "unknown"))
        dataset, _, configuration = data.partition(":") if "split" in evaluation else (data, "", "")
        signatures = evaluation.get("signatures", {})
        results += [
            EvalResult(
                task_type=task,
                dataset_type=dataset,
                dataset_name=data,
                dataset_config=configuration or None,
                dataset_split=evaluation.get("split"),
                metric_type=_metric(name).hub_type,
                metric_name=_metric(name).label,
                metric_value=round(value, 2),
                metric_args={"signature": signatures[name]} if name in signatures else None,
            )
            for name, value in evaluation.get("scores", {}).items()
        ]
    return results


def _metric(name: str) -> Metric:
    return METRICS.get(name, Metric(name, name))


def _what_it_is(model: Any) -> str:
    config = model.config
    layer = "" if config.encoder_layer is None else f", cut after layer {fusion_of(config).llm_layer},"
    return (
        f"An LLM-to-SLM model ([paper]({PAPER})). A large language model ({config.encoder.model_type}){layer} reads "
        f"the prompt once{' and is frozen' if config.freeze_llm else ''}; a small one ({config.decoder.model_type}) "
        f'{fusion_of(config).description} (fusion "{config.fusion}") and writes the output, token by token.'
    )


def _snippet(name: str, positions: int | None, adapter: Any) -> str:
    length = min(64, (positions or 128) // 2)  # prompt and output share the positions
    base, load_adapter, holds = f'name = "{name}"', "", "this repository"
    if adapter:
        base_name = adapter.base_model_name_or_path or "the model that it adapts"
        base = f'name = "{base_name if _repository({"name_or_path": base_name}) else Path(base_name).name}"'
        load_adapter, holds = f'model.load_adapter("{name}")\n', "the repository of the model"
    about = "This is an adapter for another model, which is loaded first; it needs the package `peft`.\n\n"
    return f"""## How to use

{about if adapter else ""}```python
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

{base}
model = AutoModelForSeq2SeqLM.from_pretrained(name, trust_remote_code=True)
{load_adapter}processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)

batch = processor(text=["A prompt."], return_tensors="pt")
tokens = model.generate(**batch, max_new_tokens={length})
print(processor.batch_decode(tokens, skip_special_tokens=True)[0])
```

`trust_remote_code=True` runs the `*_llm2slm.py` files in {holds}. It is not needed, and they are not run, if
the package `modeling-llm2slm` is installed and imported."""


def _parts(model: Any, sources: Mapping[str, Any], licenses: Mapping[str, str | None]) -> str:
    llm, slm = count_parameters(model.encoder.llm), count_parameters(model.decoder)
    decoding, between = count_parameters(*decoding_modules(model.decoder)), count_parameters(model.encoder) - llm
    rows = [
        ("LLM", _link(sources["LLM"]), "unchanged" if model.config.freeze_llm else "trained further", llm, "once"),
        ("fusion modules", "new", "trained", between, "once"),
        ("SLM", _link(sources["SLM"]), "trained" if _is_new(sources["SLM"]) else "trained further", slm, "per token"),
    ]
    lines = "\n".join(f"| {part} | {base} | {how} | {size:,} | {when} |" for part, base, how, size, when in rows)
    notes = "\n".join(
        f"- {part}: {'its card says `' + license + '`' if license else 'see the licence of its base model'}."
        for part, license in licenses.items()
        if license or not _is_new(sources[part])
    )
    apply = f"The licences of the parts apply to the whole:\n\n{notes}" if notes else ""
    held = "The LLM's weights are not in this repository. They are read from the LLM's repository and checked.\n\n"
    return (
        "## Parts\n\n| part | base model | relation | parameters | runs |\n| --- | --- | --- | --: | --- |\n"
        f"{lines}\n\nThe modules that run for each token have {decoding / llm:.3f} times the LLM's parameters.\n\n"
        f"{held if model.config.lean else ''}{apply}"
    ).rstrip()


def _is_new(source: Mapping[str, Any] | None) -> bool:
    """Return whether a part started with random weights, which a config file gives."""
    return not source or str(source.get("name_or_path")).endswith(".json")


def _link(source: Mapping[str, Any] | None) -> str:
    name = _repository(source)
    if name is None:
        return "new, trained from scratch" if _is_new(source) else "a local model"
    revision = (source or {}).get("revision")
    return f"[{name}](https://huggingface.co/{name})" + (f" at `{revision[:12]}`" if revision else "")


def _languages(languages: Any) -> str:
    return f"Languages: {', '.join(languages)}." if languages else "Languages: those of the training data."


def _training(recipe: Mapping[str, Any], training: Mapping[str, Any] | None, datasets: Sequence[str]) -> str:
    data = "" if not datasets else "Trained on " + ", ".join(f"`{Path(name).name}`" for name in datasets) + ".\n\n"
    if not training:
        return f"## Training\n\n{data}" if data else ""
    shown = without_folders(without_secrets(recipe))
    fields = "\n".join(f"{key}: {value}" for key, value in shown.items() if key != "output_dir")
    return (
        f"## Training\n\n{data}{training.get('steps')} steps in {training.get('seconds', 0):.0f} s, "
        f"{training.get('trained_parameters', 0):,} parameters trained. The recipe of `llm2slm train`:\n\n"
        f"```yaml\n{fields}\n```"
    )


def _scores(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return ""
    names = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.get("scores", {})))
    lines = [
        f"## Scores\n\n| data | {' | '.join(_metric(name).label for name in names)} |",
        f"| --- {'| --: ' * len(names)}|",
    ]
    for evaluation in evaluations:
        scores = [f"{evaluation['scores'][name]:.2f}" if name in evaluation["scores"] else "" for name in names]
        lines.append(f"| {evaluation.get('data')} ({evaluation.get('examples')} examples) | {' | '.join(scores)} |")
    signatures = {text for evaluation in evaluations for text in evaluation.get("signatures", {}).values()}
    return "\n".join([*lines, "", *(f"- `{text}`" for text in sorted(signatures))])


def _times(evaluations: Sequence[Mapping[str, Any]]) -> str:
    timed = [evaluation for evaluation in evaluations if evaluation.get("speed")]
    if not timed:
        return ""
    lines = ["## Times", "", "| model | ms per output | ms per token | tokens per output | device |"]
    lines.append("| --- | --: | --: | --: | --- |")
    for evaluation in timed:
        speed = evaluation["speed"]
        device = f"{evaluation.get('device')}, {_threads(evaluation.get('threads'))}, {evaluation.get('dtype')}"
        times = f"{speed['ms_per_output']:.1f} | {speed['ms_per_token']:.2f} | {speed['tokens_per_output']:.1f}"
        lines.append(f"| {Path(str(evaluation.get('model'))).name} | {times} | {device} |")
    return "\n".join([*lines, "", "Measured one prompt at a time, from text to text."])


def _threads(count: Any) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


__all__ = ["CardDetails", "model_card"]
