"""Extract the SLM as a plain checkpoint of its family, and the fusion modules (the projector) as a file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from modeling_llm2slm.checkpoint_llm2slm import LLM_PREFIX
from modeling_llm2slm.files_llm2slm import open_weights, weight_files
from modeling_llm2slm.parts_llm2slm import slm_class
from modeling_llm2slm.states.loading import check_finite, load_model

from .output import composite_config, converts, output_folder, processor_of, size_of
from .parts import part_of_state
from .report import Report, probe, slm_logits


ENCODER, SLM = "encoder.", "decoder."  # without the LLM, the encoder holds the fusion modules


@converts
def split(
    checkpoint: str | Path, output: str | Path, *, overwrite: bool = False, revision: str | None = None
) -> Report:
    """
    Extract the SLM and the fusion modules of a full or lean checkpoint; its LLM is not read.

    Args:
        checkpoint: Folder of the LLM-to-SLM checkpoint, or its name on the Hub.
        output: The folder to write to: `slm/` with its tokenizer, and the fusion modules in `projector.safetensors`.
        overwrite: Replace an existing folder.
        revision: Revision of the checkpoint on the Hub.

    Raises:
        OSError: If something cannot be read or written.
    """
    hub = {"revision": revision} if revision else {}
    config = composite_config(checkpoint, **hub)
    on_hub = not Path(checkpoint).is_dir()
    weights = open_weights(weight_files(checkpoint, on_hub, **(hub if on_hub else {})))
    state = {name.removeprefix(SLM): tensor[...] for name, tensor in weights.items() if name.startswith(SLM)}
    slm = part_of_state(checkpoint, slm_class(config.decoder), config.decoder, state)
    fusion = {
        name.removeprefix("encoder."): tensor[...].clone()
        for name, tensor in weights.items()
        if name.startswith(ENCODER) and not name.startswith(LLM_PREFIX)
    }
    if not fusion:
        raise OSError(f"{checkpoint} is incomplete: it has no fusion modules.")
    check_finite({**slm.state_dict(), **fusion}, checkpoint)
    report = Report(f"{checkpoint} is split into {output}")
    with output_folder(output, (checkpoint,), size_of(slm.state_dict()) + size_of(fusion)) as folder:
        slm.save_pretrained(folder / "slm")
        save_file(fusion, folder / "projector.safetensors", metadata={"format": "pt"})
        report.add("tokenizer of the SLM", _write_tokenizer(checkpoint, folder / "slm"))
        written = load_model(type(slm), folder / "slm")
        probed = probe(config.vocab_size)
        report.compare("logits of the SLM", (slm_logits(written, probed), slm_logits(slm, probed)))
        same = open_weights([folder / "projector.safetensors"])
        if not all(torch.equal(same[name][...], tensor) for name, tensor in fusion.items()):
            raise ValueError("The fusion modules changed in the conversion; nothing was written.")
        report.add("SLM", f"{slm.config.model_type}, {slm.num_parameters():,} parameters, in slm/")
        report.add("fusion modules", f"{', '.join(fusion)}, in projector.safetensors")
    return report


def _write_tokenizer(checkpoint: str | Path, folder: Path) -> str:
    processor = processor_of(checkpoint)
    if processor is None:
        return "none in the source"
    processor.decoder_tokenizer.save_pretrained(folder)
    return "in slm/"
