"""Requests become [`Decoding`], and refused ones name their field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modeling_llm2slm.data.conversations import conversation_in
from modeling_llm2slm.serving.jobs import Decoding
from modeling_llm2slm.serving.schema import ChatRequest, CompletionRequest, Limits, RequestError, parse_request


LIMITS = Limits("tiny", max_tokens=70, max_prompts=64)


def parse(limits: Limits = LIMITS, **fields: Any) -> CompletionRequest:
    return parse_request(json.dumps({"prompt": "src1", **fields}).encode(), limits, CompletionRequest)


class TestParseRequest:
    @pytest.mark.parametrize("fields", [{}, {"temperature": None, "top_p": None, "stop": None, "stream": None}])
    def test_fields_left_out_or_null_have_their_defaults(self, fields: dict[str, Any]) -> None:
        request = parse(**fields)
        assert request.prompt == ["src1"]
        assert request.decoding(20) == Decoding(max_tokens=20, temperature=0, top_p=1, seed=None, stop=())
        assert not request.stream
        assert not request.include_usage

    def test_every_field_becomes_its_setting(self) -> None:
        request = parse(
            prompt=["a", "b"], max_tokens=70, temperature=2, top_p=0.5, seed=-(2**63), stop="end", stream=True,
            stream_options={"include_usage": True}, model="tiny", user=3,
        )  # fmt: skip
        assert request.prompt == ["a", "b"]
        assert request.decoding(20) == Decoding(max_tokens=70, temperature=2, top_p=0.5, seed=-(2**63), stop=("end",))
        assert request.stream
        assert request.include_usage

    def test_defaults_of_unsupported_fields_are_accepted(self) -> None:
        request = parse(
            n=1, best_of=1, echo=False, logprobs=None, suffix="", presence_penalty=0.0, frequency_penalty=0,
            logit_bias={}, stream_options={}, top_k=-1, store=False, metadata={"run": "3"}, repetition_penalty=1.0,
            response_format={"type": "text"}, min_p=None,
        )  # fmt: skip
        assert request.prompt == ["src1"]
        assert request.decoding(20) == parse().decoding(20)
        assert not request.include_usage

    @pytest.mark.parametrize(
        "fields",
        [
            {"best_of": 2}, {"suffix": "x"}, {"presence_penalty": 0.5}, {"frequency_penalty": -1},
            {"logit_bias": {"3": 1}}, {"top_k": 5}, {"store": True}, {"repetition_penalty": True},
            {"response_format": {"type": "json_object"}}, {"min_p": 0.1},
        ],
    )  # fmt: skip
    def test_other_values_of_unsupported_fields_are_refused(self, fields: dict[str, Any]) -> None:
        with pytest.raises(RequestError, match="not supported. Leave it out") as error:
            parse(**fields)
        assert error.value.param == next(iter(fields))

    @pytest.mark.parametrize(
        ("fields", "param"),
        [({"max_tokens": 71}, "max_tokens"), ({"stop": ["a", 1]}, "stop"), ({"best_off": 1}, "best_off")],
    )
    def test_error_names_its_field(self, fields: dict[str, Any], param: str) -> None:
        with pytest.raises(RequestError) as error:
            parse(**fields)
        assert error.value.status_code == 400
        assert error.value.param == param

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (b"[" * 100_000, "nested more than 100 levels deep"),
            (b'{"prompt": ' + b'{"a": ' * 500 + b"1" + b"}" * 501, "nested more than 100 levels deep"),
            (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "a number with thousands of digits"),
            (b"\xff\xfe\xfd", "The request is not JSON: "),
            (b"", "The request is not JSON: "),
            (b"7", "must be a JSON object"),
        ],
    )
    def test_body_of_any_depth_and_content_is_refused(self, body: bytes, message: str) -> None:
        with pytest.raises(RequestError, match=message) as error:
            parse_request(body, LIMITS, CompletionRequest)
        assert error.value.status_code == 400

    @pytest.mark.parametrize(("name", "value"), [("temperature", 1), ("logprobs", 0), ("n", 2)])
    def test_beam_search_refuses_to_sample(self, name: str, value: int) -> None:
        with pytest.raises(RequestError, match=f"Leave {name} out") as error:
            parse(Limits("tiny", 70, 64, num_beams=2), **{name: value})
        assert error.value.param == name

    def test_each_sample_has_a_seed_of_its_own(self) -> None:
        request = parse(prompt=["a", "b"], seed=-7, n=3)
        assert request.outputs == 6
        seeds = [request.decoding(20, sample).seed for sample in range(3)]
        assert seeds[0] == -7
        assert len(set(seeds)) == 3
        assert seeds == [request.decoding(20, sample).seed for sample in range(3)]
        assert parse(n=3).decoding(20, 2).seed is None

    def test_conversation_becomes_a_prompt(self) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        fields = {
            "messages": [
                {"role": "user", "content": parts, "type": "text"},
                {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [], "name": "me"},
            ],
            "max_completion_tokens": 5, "logprobs": True, "tools": [],
        }  # fmt: skip
        request = parse_request(json.dumps(fields).encode(), LIMITS, ChatRequest)
        (prompt,) = request.prompts
        assert conversation_in(prompt) == [
            {"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c", "name": "me"}
        ]  # fmt: skip
        assert request.decoding(20) == Decoding(max_tokens=5, logprobs=0)

    def test_long_value_is_shortened_in_its_error(self) -> None:
        with pytest.raises(RequestError) as error:
            parse(temperature="x" * 1000)
        assert len(error.value.detail) < 100
