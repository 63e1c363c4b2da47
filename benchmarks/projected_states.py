"""
Measure how projected hidden states of a pretrained LLM are best handed to an SLM: instructions at 4,000 prompts.

    python -m benchmarks.projected_states --llm gemma3-270m --data /path/to/data --runs runs/pretrained

It shares tasks, recipes and the folder of results with `benchmarks.pretrained`, whose LLM it needs. Finished jobs are
skipped: repeat the command until it prints the table. The variants differ in the start of the projector only:

- folded: mean and scale of the hidden states are in its first weights, in place of buffers
- sampled: its last weights are sampled, so that both terms of `fusion="add"` begin with the same variance
- layers: it reads several layers of the LLM
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.pretrained import Experiment, main
from benchmarks.pretrained_report import OUTPUT, scores_of
from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.fusion_llm2slm import embedding_rms


TASK, LLM = "instructions", "llm-4000"
SLMS: dict[str, dict[str, Any]] = {
    "four": {"cut": LLM, "layers": [0, 5, 11, 17], "recipe": "alone"},
    "gpt2": {"start": "gpt2", "recipe": "gpt2"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "add": {},
    "add-folded-sampled": {"folded": True, "sampled": True},
    "add-sampled": {"sampled": True},
    "add-layers": {"build": {"encoder_layer": [6, 12, 18]}},
}


class ProjectedStates(Experiment):
    """The experiment behind a pretrained LLM, with the rows of this ablation."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        rows = self.settings["rows"][TASK]
        kept = {name: rows[name] for name in rows if name == LLM or name in {f"{slm}-alone-4000" for slm in SLMS}}
        behind = {"behind": LLM, "fusion": "add", "outputs_of": LLM, "prompts": rows[LLM]["prompts"]}
        ablation = {
            f"{slm}-{name}-states": {**start, **behind, **variant}
            for slm, start in SLMS.items()
            for name, variant in VARIANTS.items()
        }
        self.settings["rows"] = {TASK: kept | ablation}

    def change_start(self, row: dict[str, Any], model: Any) -> None:
        """Change the new projector of a row."""
        projector = model.encoder.projector
        if row.get("sampled"):
            scale = embedding_rms(model.decoder) / 2**0.5
            nn.init.normal_(projector.linears[-1].weight, std=scale * (2 / projector.linears[-1].in_features) ** 0.5)
        if row.get("folded"):
            fold(projector)


@torch.no_grad()
def fold(projector: Any) -> None:
    """Move mean and scale of the hidden states into the first linear layer: the function stays the same."""
    first = projector.linears[0]
    first.weight.div_(projector.scale)
    first.bias.sub_(first.weight @ projector.mean)
    nn.init.zeros_(projector.mean)
    nn.init.ones_(projector.scale)


def report(experiment: ProjectedStates, folder: Path = OUTPUT, only: Sequence[str] | None = None, **_: Any) -> None:
    """Score the rows that are done, or `only` those of these names; write `projected-states.json`, print a table."""
    settings = experiment.settings["rows"][TASK]
    done = [name for name in settings if (experiment.folder(TASK, name) / "outputs.json").is_file()]
    done = [name for name in done if only is None or name in only]
    rows: dict[str, Any] = {name: {"settings": settings[name]} for name in done}
    for split in ("validation", "test") if done else ():
        for name, scores in scores_of(experiment, TASK, done, split).items():
            rows[name][split] = scores
    write_json(folder / "projected-states.json", {"task": TASK, "versions": versions(), "rows": rows})
    print("| row | validation | test |\n| --- | --: | --: |")
    for name, row in rows.items():
        print(f"| {name} | {row['validation']['all']['score']:.1f} | {row['test']['all']['score']:.1f} |")


if __name__ == "__main__":
    main(ProjectedStates, report, __doc__ or "")
