"""Model and processor of the installed package: the uploaded classes, with methods that need the package."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from .. import processing_llm2slm
from ..checks import CheckedModel
from ..data.atomic import atomic_write
from . import assistant, factory, saving
from .mixed_adapters import mixed_adapters
from .processor import TextProcessor


class LLM2SLMForConditionalGeneration(CheckedModel):
    r"""
    A large frozen LLM that reads the prompt and a small language model that writes the output (arXiv 2402.16844). It
    trains, generates, saves and loads like every sequence-to-sequence model of transformers. Token ids of the prompt
    are the LLM's, those of the output the SLM's.

    An upload carries the base class, which loads, trains and generates. This class adds what needs the installed
    package: building a model from two pretrained ones, assisting the LLM, and saving lean checkpoints and model cards
    in one atomic write.

    Args:
        config ([`LLM2SLMConfig`]): The configuration.
        encoder (`PreTrainedModel`, *optional*): An LLM to use instead of one with random weights.
        decoder (`PreTrainedModel`, *optional*): An SLM to use instead of one with random weights.
    """

    include_llm: bool = True  # default of `save_pretrained`, for `Trainer`, which does not pass it
    uploaded: tuple[Path, str] | None = None  # a folder that a `Trainer` uploads, and the repository

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder_pretrained_model_name_or_path: str | None = None,
        decoder_pretrained_model_name_or_path: str | None = None,
        **kwargs: Any,
    ) -> LLM2SLMForConditionalGeneration:
        r"""
        Build a model from a pretrained LLM and a pretrained SLM; the projector is new and has to be trained.

        Args:
            encoder_pretrained_model_name_or_path (`str`): Repository id or folder of the LLM.
            decoder_pretrained_model_name_or_path (`str`): Repository id or folder of the SLM.
            kwargs:
                Values of [`LLM2SLMConfig`] (`fusion`, `shared_tokenizer`, `encoder_layer`, ...), and arguments of
                `from_pretrained` with the prefix `encoder_` for the LLM or `decoder_` for the SLM: `encoder_dtype`,
                `decoder_revision`, `encoder_attn_implementation`, `decoder_trust_remote_code`, ... `encoder_model` and
                `decoder_model` take loaded models. `shared_tokenizer` defaults to whether the two tokenizers are the
                same, or to `False` if one of them does not load.

        Raises:
            ValueError: If a model is missing, or an argument has neither prefix nor meaning in the configuration.
        """
        paths = (encoder_pretrained_model_name_or_path, decoder_pretrained_model_name_or_path)
        return factory.build_from_pretrained(cls, *paths, **kwargs)

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate, see [`~transformers.GenerationMixin.generate`]; also with peft's `adapter_names`."""
        with mixed_adapters(self, inputs, kwargs):
            return super().generate(inputs, *args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # peft looks this up here for methods that cannot mix adapters, and would ignore the names.
        if kwargs.get("adapter_names") is not None:
            raise ValueError("Only LoRA and DoRA adapters can be mixed in a batch. Leave out `adapter_names`.")
        yield

    def as_assistant_of(self, llm: PreTrainedModel) -> PreTrainedModel:
        """
        Return this model as `assistant_model` of the whole LLM that it was built on: `llm.generate(...,
        assistant_model=...)` gives the LLM's own output, faster. The two share the encoder and the hidden states that
        `llm` has just computed.

        Args:
            llm (`PreTrainedModel`):
                An encoder-decoder with its decoder, such as a `T5ForConditionalGeneration`; with `fusion="cache"` the
                decoder-only LLM, which then reads the prompt twice.

        Returns:
            `PreTrainedModel`: A model over the same SLM and projector; with `fusion="cache"` one of the SLM's class.
            Its `generation_config` sets how far it drafts ahead (`num_assistant_tokens`,
            `assistant_confidence_threshold`).

        Raises:
            ValueError: If tokenizer, vocabulary size or start id are not the LLM's, or it is another LLM.
        """
        return assistant.as_assistant_of(self, llm)

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Set the attention implementation of both models; a `dict` names those of `"encoder"` and `"decoder"`."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        if isinstance(attn_implementation, dict):
            # T5's stacks have copies of its config, and would follow the whole model's implementation.
            for name, part in (("encoder", self.encoder.llm), ("decoder", self.decoder)):
                part.set_attn_implementation(attn_implementation.get(name, part.config._attn_implementation))

    def _validate_generation_mode(self, mode: Any, generation_config: GenerationConfig, *args: Any) -> None:
        super()._validate_generation_mode(mode, generation_config, *args)
        if mode == GenerationMode.ASSISTED_GENERATION:
            assistant.check_drafts(self.encoder.fusion, generation_config)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        include_llm: bool | None = None,
        push_to_hub: bool = False,
        card: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        r"""
        Save a checkpoint with a model card, see [`PreTrainedModel.save_pretrained`]. The write is atomic: a crash
        leaves an earlier checkpoint in `save_directory` as it was.

        Args:
            save_directory (`str` or `os.PathLike`): The folder to write to.
            include_llm (`bool`, *optional*):
                `False` writes a lean checkpoint: the projector and the SLM, and in the config the LLM's source with
                the fingerprint of its weights. Defaults to `model.include_llm`, which is `True` unless set.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Upload the checkpoint, with `repo_id` and the other arguments of `push_to_hub`.
            card (`dict`, *optional*): Contents of the model card, see [`model_card`].
            kwargs: Arguments of [`PreTrainedModel.save_pretrained`].

        Raises:
            ValueError: If a lean checkpoint could not be loaded again: the LLM has no known source, or has changed.
        """
        saving.save_pretrained(self, save_directory, include_llm, push_to_hub, card, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        r"""
        Upload the model with its code and card in one commit; repeating an interrupted upload sends the rest only.

        Args:
            repo_id (`str`): The repository; it is created if it does not exist.
            kwargs:
                `include_llm` and `max_shard_size` as in `save_pretrained`; `tags`, further tags of the model card;
                `token`, by default the one of `hf auth login`; `commit_message`, `commit_description`, `private`,
                `revision` (a branch) and `create_pr`.

        Returns:
            `str`: The address of the commit. Of several processes only the first uploads; the others return `""`.
        """
        return saving.push_to_hub(self, repo_id, **kwargs)


class LLM2SLMProcessor(TextProcessor):
    r"""
    Turns prompts into token ids of the LLM and targets into token ids of the SLM, and decodes outputs of the SLM.

    A tokenizer without a pad token (GPT-2's) pads with its end token: padding is never found by comparing ids.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The LLM's, for prompts.
        decoder_tokenizer (`PreTrainedTokenizerBase`): The SLM's, for targets and outputs.
        prompt_max_length (`int`, *optional*):
            Truncate longer prompts to this many tokens, with a warning that counts them. Default: never.
        target_max_length (`int`, *optional*): The same for targets, end token included.
        chat_template (`str`, *optional*): A chat template to use instead of the tokenizer's.
        answer_max_length (`int`, *optional*): The former name of `target_max_length`.

    Example:

    ```python
    >>> processor = LLM2SLMProcessor.from_encoder_decoder_pretrained("google-t5/t5-large", "openai-community/gpt2")
    >>> batch = processor(text=["translate: Hello"], text_target=["Hallo"], padding=True, return_tensors="pt")
    >>> sorted(batch)
    ['attention_mask', 'input_ids', 'labels']
    ```
    """

    @classmethod
    def from_encoder_decoder_pretrained(
        cls, encoder_pretrained_model_name_or_path: str, decoder_pretrained_model_name_or_path: str, **kwargs: Any
    ) -> LLM2SLMProcessor:
        """
        Build a processor from the tokenizers of an LLM and an SLM.

        Args:
            encoder_pretrained_model_name_or_path (`str`): Repository id or folder of the LLM.
            decoder_pretrained_model_name_or_path (`str`): Repository id or folder of the SLM.
            kwargs:
                Arguments of the class, and arguments of `AutoTokenizer.from_pretrained` with the prefix `encoder_` or
                `decoder_` (`encoder_revision`, ...).
        """
        paths = (encoder_pretrained_model_name_or_path, decoder_pretrained_model_name_or_path)
        tokenizers = [
            AutoTokenizer.from_pretrained(path, **factory.pop_prefixed(kwargs, prefix))
            for path, prefix in zip(paths, ("encoder_", "decoder_"), strict=True)
        ]
        return cls(*tokenizers, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save tokenizers and settings, see [`ProcessorMixin.save_pretrained`]; an error changes no file."""
        with atomic_write(save_directory) as folder, saving.as_uploaded(self):
            written = processing_llm2slm.LLM2SLMProcessor.save_pretrained(self, folder, **kwargs)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return [str(Path(save_directory, Path(file).relative_to(folder))) for file in written]
