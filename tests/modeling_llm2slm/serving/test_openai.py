"""The official client of OpenAI and lm-eval, against a running server."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from modeling_llm2slm.inference.text_to_text import TextToText
from tests.support.common import PROMPTS
from tests.support.serving import OUTPUTS, Client, serving


# The conversation of a prompt gives its token ids: the tokenizer adds the end token, if the text has no special tokens
# (that of the first prompt has one).
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'developer' %}{{ raise_exception('no') }}{% endif %}"
    "{% if loop.last %}{{ message.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def server(model: TextToText) -> Iterator[Client]:
    tokenizer = model.processor.tokenizer
    tokenizer.chat_template = TEMPLATE
    with serving(model, max_wait=1, allow_origin=["https://example.org"]) as client:
        yield client
    tokenizer.chat_template = None


@pytest.fixture(scope="module")
def client(server: Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def ask(client: openai.OpenAI) -> Any:
    """Send a conversation that ends with a prompt."""

    def send(prompt: str, **fields: Any) -> Any:
        before = [{"role": "system", "content": "Translate."}, {"role": "user", "content": "Hello"}]
        messages: Any = [*before, {"role": "user", "content": prompt}]
        return client.chat.completions.create(model="tiny", messages=messages, **fields)

    return send


def expected_logprobs(model: TextToText, prompt: str) -> torch.Tensor:
    """The log-probabilities `(tokens, vocabulary)` of the greedy output."""
    found = model.model.generate(
        **model.read(model.features([prompt])), do_sample=False, max_new_tokens=50, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.cat(found.logits).log_softmax(-1)


class TestChat:
    def test_response(self, ask: Any, prompts: list[str]) -> None:
        for prompt, ids, text in list(zip(prompts, PROMPTS, OUTPUTS, strict=True))[1:]:
            found = ask(prompt)
            assert found.object == "chat.completion"
            assert found.id.startswith("chatcmpl-")
            (choice,) = found.choices
            assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, "stop")
            assert found.usage.prompt_tokens == len(ids)
            assert found.usage.completion_tokens == len(text.encode()) + 1
        assert ask(prompts[2], max_completion_tokens=2).choices[0].finish_reason == "length"

    def test_stream(self, ask: Any, prompts: list[str]) -> None:
        *chunks, usage = ask(prompts[2], stream=True, stream_options={"include_usage": True}, n=2)
        assert usage.choices == []
        assert usage.usage.completion_tokens == 2 * (len(OUTPUTS[2].encode()) + 1)
        for index in range(2):
            first, *middle, last = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
            assert first.delta.role == "assistant"
            assert all(choice.delta.role is None and choice.finish_reason is None for choice in middle)
            assert "".join(choice.delta.content for choice in middle) == OUTPUTS[2]
            assert (last.delta.content, last.finish_reason) == (None, "stop")

    def test_message_can_be_sent_back(self, client: openai.OpenAI, ask: Any, prompts: list[str]) -> None:
        message = ask(prompts[2]).choices[0].message
        messages: Any = [message, message.model_dump(), {"role": "user", "content": prompts[1]}]
        found = client.chat.completions.create(model="tiny", messages=messages, store=False, metadata={}, tools=[])
        assert found.choices[0].message.content == OUTPUTS[1]

    def test_logprobs(self, ask: Any, model: TextToText, prompts: list[str]) -> None:
        expected = expected_logprobs(model, prompts[0])
        chunks = list(ask(prompts[0], logprobs=True, top_logprobs=3, stream=True))
        tokens = [
            token
            for chunk in chunks
            for choice in chunk.choices
            if choice.logprobs
            for token in choice.logprobs.content
        ]
        (choice,) = ask(prompts[0], logprobs=True, top_logprobs=3).choices
        assert choice.logprobs.content == tokens
        assert [token.logprob for token in tokens] == pytest.approx(expected.amax(-1).tolist(), abs=1e-4)
        for token, row in zip(tokens, expected, strict=True):
            assert [each.logprob for each in token.top_logprobs] == pytest.approx(
                row.topk(3).values.tolist(), abs=1e-4
            )
            assert token.top_logprobs[0].token == token.token
            assert bytes(token.bytes).decode() == token.token

    def test_errors_name_their_field(self, ask: Any, client: openai.OpenAI, server: Client) -> None:
        wrong: Any = {"tools": [{"type": "function", "function": {"name": "f"}}], "top_logprobs": 2, "messages": []}
        for name, value in wrong.items():
            with pytest.raises(openai.BadRequestError) as error:
                client.chat.completions.create(
                    model="tiny", **{"messages": [{"role": "user", "content": "src1"}], name: value}
                )
            assert error.value.param == name
        with pytest.raises(openai.BadRequestError, match="chat template of the LLM's tokenizer refuses") as error:
            client.chat.completions.create(model="tiny", messages=[{"role": "developer", "content": "src1"}])
        assert error.value.param == "messages"
        with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
            client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "src1"}])

    def test_model_without_a_chat_template_is_named(
        self, ask: Any, model: TextToText, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model.processor.tokenizer, "chat_template", None)
        with pytest.raises(openai.BadRequestError, match="has no chat template. Use /v1/completions"):
            ask("src1")


class TestCompletions:
    def test_models(self, client: openai.OpenAI) -> None:
        assert [found.id for found in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by == "modeling-llm2slm"
        with pytest.raises(openai.NotFoundError, match="no model 'a/b'"):
            client.models.retrieve("a/b")

    def test_samples_of_each_prompt_repeat_with_a_seed(self, client: openai.OpenAI, prompts: list[str]) -> None:
        fields: Any = {"model": "tiny", "temperature": 2, "seed": 3, "max_tokens": 12}
        found = client.completions.create(prompt=prompts[1:], n=3, **fields)
        assert [choice.index for choice in found.choices] == list(range(6))
        texts = [choice.text for choice in found.choices]
        assert texts == [
            choice.text for choice in client.completions.create(prompt=prompts[1:], n=3, **fields).choices
        ]
        assert len(set(texts)) > 3
        for row in range(2):
            alone = client.completions.create(prompt=prompts[1 + row], **fields)
            assert alone.choices[0].text == texts[3 * row]
        assert found.usage is not None
        assert found.usage.prompt_tokens == sum(map(len, PROMPTS[1:]))
        greedy = client.completions.create(model="tiny", prompt=prompts[1], n=2)
        assert [choice.text for choice in greedy.choices] == [OUTPUTS[1]] * 2

    def test_token_ids_and_echo(self, client: openai.OpenAI, prompts: list[str]) -> None:
        for prompt in (PROMPTS[1:], prompts[1:]):
            found = client.completions.create(model="tiny", prompt=prompt)
            assert [choice.text for choice in found.choices] == OUTPUTS[1:]
        for prompt, before in ((PROMPTS[1], f"{prompts[1]} </s>"), (prompts[1], prompts[1])):
            found = client.completions.create(model="tiny", prompt=prompt, echo=True)
            assert found.choices[0].text == before + OUTPUTS[1]
            stream = client.completions.create(model="tiny", prompt=prompt, echo=True, stream=True)
            assert "".join(event.choices[0].text for event in stream) == before + OUTPUTS[1]

    def test_logprobs(self, client: openai.OpenAI, model: TextToText, prompts: list[str]) -> None:
        expected = expected_logprobs(model, prompts[1])
        (choice,) = client.completions.create(model="tiny", prompt=prompts[1], logprobs=2, temperature=0.001).choices
        found = choice.logprobs
        assert found is not None
        assert found.tokens == ["n", "\ufffd", "\ufffd", "<end>"]
        assert found.text_offset == [0, 1, 2, 3]
        assert found.token_logprobs == pytest.approx(expected.amax(-1).tolist(), abs=1e-4)
        assert found.top_logprobs is not None
        assert [max(top.values()) for top in found.top_logprobs] == found.token_logprobs
        (choice,) = client.completions.create(model="tiny", prompt=prompts[1], logprobs=0).choices
        assert choice.logprobs is not None
        assert choice.logprobs.top_logprobs is not None
        assert [len(top) for top in choice.logprobs.top_logprobs] == [1] * 4


class TestDescription:
    def test_document_is_complete(self, server: Client) -> None:
        document = json.loads(server.get("/openapi.json"))
        names = set(document["components"]["schemas"])
        used = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
        assert {"CompletionRequest", "ChatRequest", "Completion", "ErrorResponse"} <= used <= names
        properties = document["components"]["schemas"]["ChatRequest"]["properties"]
        assert properties["max_tokens"]["description"] == "A whole number from 1 to 1024."
        assert properties["top_k"]["enum"] == [None, -1, 0]

    def test_page_shows_it_without_a_network(self, server: Client) -> None:
        page = server.get("/docs")
        assert "<code>POST /v1/chat/completions</code>" in page
        assert "<code>max_completion_tokens</code>" in page
        assert "src=" not in page
        assert "http" not in page

    @pytest.mark.parametrize(("origin", "allowed"), [("https://example.org", True), ("https://example.com", False)])
    def test_pages_of_allowed_origins_may_send_requests(self, server: Client, origin: str, allowed: bool) -> None:
        connection = server.send(b"", "/v1/models", "GET")
        connection.getresponse().read()
        connection.request("GET", "/v1/models", headers={"Origin": origin})
        response = connection.getresponse()
        assert (response.headers.get("Access-Control-Allow-Origin") == origin) == allowed
        response.read()
        connection.request("OPTIONS", "/v1/completions", headers={
            "Origin": origin, "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        })  # fmt: skip
        assert connection.getresponse().status == (200 if allowed else 400)
        connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_lm_eval_scores_outputs(kind: str, server: Client, prompts: list[str], tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    data = tmp_path / "data.jsonl"
    rows = [
        {"prompt": prompts[row], "target": target} for row, target in ((1, OUTPUTS[1]), (2, OUTPUTS[2]), (2, "no"))
    ]
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    task = {
        "task": "tiny", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{target}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 50},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    path = "chat/completions" if "chat" in kind else "completions"
    url = f"base_url=http://127.0.0.1:{server.port}/v1/{path}"
    found = lm_eval.simple_evaluate(
        model=kind, model_args=f"model=tiny,{url},tokenizer_backend=None,tokenized_requests=False", tasks=[task],
        apply_chat_template="chat" in kind, bootstrap_iters=0, task_manager=tasks.TaskManager(include_defaults=False),
    )  # fmt: skip
    assert math.isclose(found["results"]["tiny"]["exact_match,none"], 2 / 3)
