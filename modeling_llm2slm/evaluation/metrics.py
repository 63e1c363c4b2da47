"""
Metrics of outputs against one reference each, from 0 to 100, computed by the libraries that papers report.

To add a metric, name it in `METRICS` of `modeling_llm2slm.settings`, which recipes, commands and model cards read, and
add what computes it to `SCORERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ..data.records import versions
from ..inference.engine import is_installed
from ..settings import METRICS


PACKAGES = {"sacrebleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge-score"}
Scorer = Callable[[Sequence[str], Sequence[str]], tuple[float, str]]


def score(outputs: Sequence[str], references: Sequence[str], metrics: Sequence[str] | None = None) -> dict[str, float]:
    """
    Score outputs against one reference each.

    Args:
        outputs: What the model generated.
        references: The reference of each output, in the same order.
        metrics: Names in [`METRICS`]. Default: all.

    Returns:
        The scores, from 0 to 100, by metric.
    """
    return score_with_signatures(outputs, references, metrics)[0]


def score_with_signatures(
    outputs: Sequence[str], references: Sequence[str], metrics: Sequence[str] | None = None
) -> tuple[dict[str, float], dict[str, str]]:
    """Like [`score`], and return the signature of each metric too, which says how it was computed."""
    wanted = tuple(METRICS) if metrics is None else metrics
    results = {name: scorer(outputs, references) for name, scorer in SCORERS.items() if name in wanted}
    return {name: value for name, (value, _) in results.items()}, {name: text for name, (_, text) in results.items()}


def check_installed(metrics: Sequence[str] = tuple(METRICS)) -> None:
    """Raise `ImportError`, before anything is generated, if a package that computes one of the metrics is missing."""
    for name in metrics:
        package = PACKAGES.get(METRICS[name].hub_type)
        if package is not None and not is_installed(package):
            raise ImportError(f"{package} is not installed. Try: pip install 'modeling-llm2slm[train]'")


def _sacrebleu(name: str, outputs: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    from sacrebleu import metrics

    metric = getattr(metrics, name)()
    return metric.corpus_score(outputs, [references]).score, str(metric.get_signature())


def _rouge(name: str, outputs: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Return the mean F-measure, without stemming; the tokenizer of rouge-score knows only the letters a to z."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name])
    values = [
        scorer.score(reference, output)[name].fmeasure for output, reference in zip(outputs, references, strict=True)
    ]
    return 100 * sum(values) / len(values), f"rouge-score {versions()['rouge-score']}"


def _exact_match(outputs: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    equal = [output.strip() == reference.strip() for output, reference in zip(outputs, references, strict=True)]
    return 100 * sum(equal) / len(equal), "equal without surrounding white space"


SCORERS: dict[str, Scorer] = {
    "bleu": partial(_sacrebleu, "BLEU"),
    "chrf": partial(_sacrebleu, "CHRF"),
    "rouge1": partial(_rouge, "rouge1"),
    "rouge2": partial(_rouge, "rouge2"),
    "rougeL": partial(_rouge, "rougeL"),
    "exact_match": _exact_match,
}
