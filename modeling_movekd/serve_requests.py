"""The fields of a chat completion that are served, and a parser that no request keeps busy for long."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


MAX_PARTS = 1000  # messages of a request, and parts of a message
MAX_VALUES = 20_000  # objects, lists, keys and values of a request
MAX_DEPTH = 10


class _Fields(BaseModel):
    """Refuses unknown fields unless they are null, because an ignored option would mislead the client."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class TextPart(_Fields):
    type: Literal["text"]
    text: str


class ImageURL(_Fields):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # has no effect


class ImagePart(_Fields):
    type: Literal["image_url"]
    image_url: ImageURL


class Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(max_length=MAX_PARTS)
    name: str | None = None  # has no effect: chat templates have no names
    tool_calls: list[Any] = Field([], max_length=0)
    annotations: list[Any] = Field([], max_length=0)

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ResponseFormat(_Fields):
    type: Literal["text"]


class ChatRequest(_Fields):
    """
    The supported fields of a chat completion.

    Clients send some fields by themselves with values that ask for nothing, such as an empty list of tools. These
    values are accepted, and others of the same fields are refused.
    """

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_PARTS)
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field([], max_length=16)
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    top_logprobs: Literal[0] = 0
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    repetition_penalty: float = Field(1, ge=1, le=1)
    min_p: float = Field(0, ge=0, le=0)
    top_k: Literal[-1, 0] = -1
    logit_bias: dict[str, float] = Field({}, max_length=0)
    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] = "none"
    parallel_tool_calls: bool = False  # has no effect without tools
    functions: list[Any] = Field([], max_length=0)
    function_call: Literal["none", "auto"] = "none"
    modalities: list[Literal["text"]] = ["text"]
    reasoning_effort: Literal["none"] = "none"
    verbosity: Literal["medium"] = "medium"
    service_tier: Literal["auto", "default"] = "auto"
    store: Literal[False] = False
    metadata: dict[str, Any] = Field({}, max_length=0)
    stream_options: dict[str, Any] | None = None  # has no effect: a stream always ends with the usage
    user: str | None = None
    safety_identifier: str | None = None  # has no effect, like the next
    prompt_cache_key: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _strings(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop


def parse_request(body: bytes, text_characters: int) -> ChatRequest:
    """
    Parse the body of a request.

    The work is bounded before it begins: validating a million unknown keys takes a minute.

    Args:
        body (`bytes`): The body.
        text_characters (`int`): How many characters the texts may have. Each of them may be a comma.

    Raises:
        ValueError: With a sentence for the client.
    """
    if sum(body.count(character) for character in (b",", b":", b"[", b"{")) > MAX_VALUES + text_characters:
        raise ValueError(f"There was an error parsing the body: it has more than {MAX_VALUES} fields and parts.")
    try:
        fields = json.loads(body)
        values = _count_values(fields)
    except RecursionError:
        raise ValueError(
            f"There was an error parsing the body: it is nested deeper than {MAX_DEPTH} levels."
        ) from None
    except ValueError as error:
        raise ValueError(f"JSON decode error: {str(error)[:200]}.") from error
    if values > MAX_VALUES:
        raise ValueError(f"There was an error parsing the body: it has more than {MAX_VALUES} fields and parts.")
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        problems = []
        for problem in error.errors(include_url=False, include_context=False, include_input=False)[:3]:
            place = ".".join(str(step) for step in problem["loc"])[:100] or "The request"
            unknown = problem["type"] == "extra_forbidden"
            problems.append(f"{place}: {'not a field that is served here' if unknown else problem['msg']}")
        raise ValueError("; ".join(problems) + ".") from error


def _count_values(value: Any, depth: int = 0) -> int:
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, dict):
        return 1 + len(value) + sum(_count_values(item, depth + 1) for item in value.values())
    if isinstance(value, list):
        return 1 + sum(_count_values(item, depth + 1) for item in value)
    return 1
