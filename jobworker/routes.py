"""A route of the HTTP API: how its parameters are read and refused, and how it is described.

It knows nothing of jobs: which routes there are stands in api.py.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from jobworker.message import ApiError, Request, Response

ALWAYS = {400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 413: "BodyTooLarge", 431: "HeadTooLarge"}
ALWAYS |= {500: "InternalError", 507: "NotStored"}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a route. read: gives the value of a text, or raises ValueError with a sentence for the caller."""

    name: str
    sentence: str
    read: Callable[[str], Any]
    schema: Mapping[str, Any]
    default: Any = None
    place: str = "query"  # or "path", or "header"
    argument: str = ""  # the handler's, where it is not the name
    example: Any = None


def integer(name: str, sentence: str, low: int, high: int, default: int | None = None) -> Parameter:
    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,19}", text) or not low <= int(text) <= high:
            raise ValueError(f"{name} must be an integer from {low} to {high}")
        return int(text)

    schema = {"type": "integer", "minimum": low, "maximum": high}
    return Parameter(name, sentence, read, schema, default)


def flag(name: str, sentence: str) -> Parameter:
    def read(text: str) -> bool:
        if text not in ("0", "1"):
            raise ValueError(f"{name} must be 0 or 1")
        return text == "1"

    return Parameter(name, sentence, read, {"type": "string", "enum": ["1", "0"]}, False)


@dataclass(frozen=True)
class Route:
    """A request and its answer. The handler's docstring describes it.

    gives: the schema of its JSON, `Job[]` for a list, `|` between alternatives; or another media type. refuses: the
    errors beyond ALWAYS, by status, as components/responses names them; None takes one of ALWAYS away. body: the
    request's schema, in the same form, with `?` where it may be left out.
    """

    method: str
    path: str
    handler: Callable[..., Response]
    parameters: tuple[Parameter, ...] = ()
    gives: str = "Job"
    tag: str = "jobs"
    refuses: Mapping[int, str | None] = field(default_factory=dict)
    body: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", re.compile(re.sub(r"\{\w+\}", "([^/]+)", self.path)))

    pattern: re.Pattern[str] = field(init=False)

    def answer(self, api: object, request: Request, in_path: tuple[str, ...]) -> Response:
        """Read the request's parameters and answer it. Raises ApiError for a parameter that is unknown or wrong."""
        if not self.body:
            request.drop_body()  # it may take long
        texts = {"query": self._query(request), "header": request.headers}
        values = {}
        path_texts = iter(in_path)
        for parameter in self.parameters:
            if parameter.place == "path":
                text: str | None = unquote_strictly(next(path_texts))
            else:
                name = parameter.name
                text = texts[parameter.place].get(name.lower() if parameter.place == "header" else name)
            try:
                value = parameter.default if text is None else parameter.read(text)
            except ValueError as error:
                raise ApiError(HTTPStatus.BAD_REQUEST, str(error)) from error
            values[parameter.argument or parameter.name] = value
        return self.handler(api, request, **values)

    def _query(self, request: Request) -> Mapping[str, str]:
        if "?" not in request.target or self.gives.startswith(
            "text/html"
        ):  # anyone may link to the page, with whatever they append
            return {}
        return request.query(*(each.name for each in self.parameters if each.place == "query"))

    def describe(self, components: dict[str, Any]) -> dict[str, Any]:
        """Give the operation as OpenAPI has it."""
        summary, _, text = (self.handler.__doc__ or "").partition("\n")
        first, *rest = self.handler.__name__.split("_")
        refuses = {code: name for code, name in (ALWAYS | dict(self.refuses)).items() if name}
        responses: dict[str, Any] = {"200": {"description": summary, "content": content(self.gives, components)}}
        if self.method == "POST" and self.gives.startswith("Job") and not self.gives.startswith("Job["):
            links = components["links"]
            responses["200"]["links"] = {name: {"$ref": f"#/components/links/{name}"} for name in links}
        responses |= {str(code): {"$ref": f"#/components/responses/{name}"} for code, name in sorted(refuses.items())}
        operation = {
            "operationId": first + "".join(map(str.title, rest)),
            "tags": [self.tag],
            "summary": summary.rstrip("."),
            "description": inspect.cleandoc(text),
            "parameters": [describe_parameter(parameter) for parameter in self.parameters],
            "responses": responses,
        }
        if self.body:
            body = content(self.body.rstrip("?"), components)
            operation["requestBody"] = {"required": not self.body.endswith("?"), "content": body}
        if 401 not in refuses:
            operation["security"] = []
        return {key: value for key, value in operation.items() if value or key == "security"}


def describe_parameter(parameter: Parameter) -> dict[str, Any]:
    schema = dict(parameter.schema)
    if parameter.place == "query" and parameter.default not in (None, ()):
        schema["default"] = "0" if parameter.default is False else parameter.default
    described: dict[str, Any] = {
        "name": parameter.name,
        "in": parameter.place,
        "description": parameter.sentence,
        "schema": schema,
    }
    if parameter.place == "path":
        described["required"] = True
    if parameter.example is not None:
        described["example"] = parameter.example
    if schema.get("type") == "array":
        described |= {"style": "form", "explode": False}
    return described


def content(gives: str, components: dict[str, Any]) -> dict[str, Any]:
    """Give OpenAPI's content of a Route's `gives` or `body`."""
    if "/" in gives:
        return {gives: {"schema": {"type": "string"}}}
    schemas = [
        {"type": "array", "items": {"$ref": f"#/components/schemas/{name.removesuffix('[]')}"}}
        if name.endswith("[]")
        else {"$ref": f"#/components/schemas/{name}"}
        for name in gives.split("|")
    ]
    media: dict[str, Any] = {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}
    if gives in components["examples"]:
        media["example"] = components["examples"][gives]["value"]
    return {"application/json": media}


def unquote_strictly(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, "the path is not UTF-8") from error
