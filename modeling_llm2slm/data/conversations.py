"""
Conversations in data: lists of messages, in the formats of TRL, from which prompts and targets are read.

A prompt that is a conversation travels as one text, so that columns, tables and caches hold prompts of one type:
[`as_prompt`] writes it and [`conversation_in`] reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from ..files_llm2slm import first_line
from .bad_rows import is_text
from .formats import ROW_ERROR


Result = TypeVar("Result")

MARK = "\x1e"  # ASCII's record separator, which begins no text
ASSISTANT, MESSAGES = "assistant", "messages"
# Names of TRL, which replace the default names where a data set has no column of these.
REPLACEMENTS = {"prompt": (MESSAGES,), "target": ("completion", MESSAGES)}


def as_prompt(prompt: Any) -> str:
    """Return a prompt, a text or a conversation (a list of messages), as one text. Raise `ValueError` for others."""
    if isinstance(prompt, str):
        return prompt
    problem = _problem(prompt) if is_conversation(prompt) else "it is neither a text nor a list of messages"
    if problem is not None:
        raise ValueError(f"{prompt!r:.60} is not a prompt: {problem}.")
    return MARK + json.dumps(prompt)


def conversation_in(prompt: Any) -> list[dict[str, Any]] | None:
    """Return the conversation that [`as_prompt`] wrote; `None` for any other value."""
    if not isinstance(prompt, str) or not prompt.startswith(f"{MARK}["):
        return None
    try:
        messages = json.loads(prompt[1:])
    except ValueError:
        return None
    return messages if is_conversation(messages) else None


def encode_prompts(
    processor: Any, prompts: Sequence[str], encode: Callable[[list[Any]], Sequence[Result]]
) -> list[Result]:
    """
    Apply `encode` to the texts and to the conversations among prompts, and return the results in their order.

    Raises:
        ValueError: If there are conversations, and the processor (or tokenizer) has no chat template or its template
            refuses one of them.
    """
    given = [conversation_in(prompt) or prompt for prompt in prompts]
    results: dict[int, Result] = {}
    for kind in (str, list):
        indices = [index for index, prompt in enumerate(given) if isinstance(prompt, kind)]
        if not indices:
            continue
        if kind is list:
            _check_chat_template(processor)
        try:
            results.update(zip(indices, encode([given[index] for index in indices]), strict=True))
        except Exception as error:
            if type(error).__module__ != "jinja2.exceptions":  # transformers brings it
                raise
            if len(indices) > 1:  # find the conversation
                return [encode_prompts(processor, [prompt], encode)[0] for prompt in prompts]
            raise ValueError(
                f"The chat template of the LLM's tokenizer refuses {given[indices[0]]!r:.80}: {first_line(error)}. "
                "Correct the roles of the messages."
            ) from error
    return [results[index] for index in range(len(given))]


def write_conversations(tokenizer: Any, prompts: Sequence[Any]) -> tuple[list[str], dict[str, bool]]:
    """
    Return prompts of one kind as texts, conversations with the chat template, and the arguments of the tokenizer that
    they need: a template writes the special tokens itself.
    """
    if isinstance(prompts[0], str):
        return list(prompts), {}
    texts = tokenizer.apply_chat_template(list(prompts), tokenize=False, add_generation_prompt=True)
    return texts, {"add_special_tokens": False}


def _check_chat_template(processor: Any) -> None:
    holders = (processor, getattr(processor, "tokenizer", None))
    if not any(getattr(holder, "chat_template", None) for holder in holders):
        raise ValueError(
            "The data holds conversations, but the tokenizer of the LLM has no chat template. Put a "
            "`chat_template.jinja` into the model's folder, or write the prompts as texts."
        )


def is_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages, valid or not."""
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)


def sources_of(columns: Sequence[str], existing: Collection[str]) -> dict[str, str]:
    """Return the existing column that each of the needed columns is read from; a missing one stands for itself."""
    sources = {
        column: next((name for name in (column, *REPLACEMENTS.get(column, ())) if name in existing), column)
        for column in columns
    }
    if sources.get("target") == MESSAGES and "prompt" in sources:  # the same conversation holds both
        sources["prompt"] = MESSAGES
    return sources


def read_conversations(
    row: Mapping[str, Any], sources: Mapping[str, str], number: int
) -> tuple[dict[str, Any], str | None]:
    """
    Turn the conversations of a row into texts.

    Args:
        row: The row.
        sources: See [`sources_of`]. The first column holds the prompt, all others hold targets.
        number: The row's number in its source, for the message.

    Returns:
        The row with a text in place of each conversation, and why a conversation cannot be used, or `None`.
    """
    values = {**row, **{column: _as_list(row.get(source)) for column, source in sources.items()}}
    if row.get(ROW_ERROR):
        return values, row[ROW_ERROR]
    prompt_column, problem = next(iter(sources)), None
    for column, source in sources.items():
        if is_conversation(values[column]):
            messages = [{key: value for key, value in each.items() if value is not None} for each in values[column]]
            problem = _problem(messages)
            if problem is None and column == prompt_column:
                values[column], problem = _prompt(messages)
            elif problem is None:
                values[column], problem = _target(messages, source == sources[prompt_column])
        elif source == MESSAGES != column:
            problem = f"{values[column]!r:.60} is not a list of messages"
        if problem is not None:
            return values, f"the {source} of row {number} cannot be used: {problem}"
    return values, None


def _prompt(messages: list[dict[str, Any]]) -> tuple[str, str | None]:
    if messages[-1]["role"] == ASSISTANT:  # a target, also where another column replaces it
        messages = messages[:-1]
    problem = None if messages else f"no message comes before that of the role {ASSISTANT!r}"
    return as_prompt(messages) if messages else "", problem


def _target(messages: list[dict[str, Any]], with_prompt: bool) -> tuple[str, str | None]:
    """Return the target in a conversation, which holds the prompt too or is a completion."""
    if messages[-1]["role"] != ASSISTANT:
        return "", f"its last message, the target, must have the role {ASSISTANT!r}"
    problem = None if with_prompt or len(messages) == 1 else "a target is one message"
    return messages[-1]["content"], problem


def _as_list(value: Any) -> Any:
    """Return messages that a data set stores column by column, one list for each key, as a list of messages."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, message, strict=True)) for message in zip(*value.values(), strict=False)]
    return value


def _problem(messages: list[dict[str, Any]]) -> str | None:
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not is_text(message.get(key)):
                return f"message {index} has the {key} {message.get(key)!r:.60}, which is not text"
    return None
