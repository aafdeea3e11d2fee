"""The requests that clients send. If a field is not supported and would change the answer, the request is an error."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ApiError, bad

Finite = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Ids = Annotated[list[int], Field(min_length=1)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(_Fields):
    include_usage: bool | None = None


class Generation(_Fields):
    """The fields of both kinds of requests. null is the same as no field."""

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[Finite, Field(ge=0)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Count | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted only with values that change nothing.
    frequency_penalty: Annotated[Finite, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # Without an effect on the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class TextPart(_Fields):
    type: Literal["text"]
    text: str


class Message(_Fields):
    role: str
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


class TextFormat(_Fields):
    type: Literal["text"]


class Chat(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def answer(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def told(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class Text(Generation):
    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @property
    def answer(self) -> int | None:
        return self.max_tokens

    @property
    def told(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt


class Load(_Fields):
    lora_name: str
    lora_path: str
    load_inplace: bool = False


class Unload(_Fields):
    lora_name: str
    lora_int_id: int | None = None


Body = TypeVar("Body", bound=BaseModel)


def read(kind: type[Body], body: bytes) -> Body:
    """The request in a body.

    Raises:
        ApiError: the body is not a valid request; the sentence names the field and the rule, without words of the
            prompt.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise bad("the body is no JSON object", "invalid_json") from None
        place = first["loc"]
        field = str(place[0]) if place else None
        if first["type"] == "extra_forbidden" and len(place) == 1:
            known = field if len(field) <= 64 and field.isidentifier() else "one of its fields"
            raise bad(f"the server does not know the field {known}", "unknown_parameter", known) from None
        if first["type"] == "missing" and len(place) == 1:
            raise bad(f"the request lacks {field}", "missing_required_parameter", field) from None
        rule = first["msg"]
        raise bad(f"{field or 'the body'}: {rule[0].lower()}{rule[1:]}", "invalid_value", field) from None


__all__ = ["ApiError", "Chat", "Generation", "Load", "Message", "Text", "Unload", "read"]
