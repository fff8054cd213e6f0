"""A request for images as OpenAI's clients send it, checked against what this server allows."""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from davae.errors import SettingsError
from davae.serving.jobs import ImageSettings
from davae.serving.models import Model
from davae.serving.settings import Defaults, Limits

LARGEST_SEED = 2**53 - 1
"""JSON's numbers are exact up to here."""

Name = Annotated[str, StringConstraints(max_length=256)]


class RequestError(SettingsError):
    """A field of a request that is not allowed."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class UnknownModelError(RequestError):
    """A model that the server does not have."""


class ImageRequest(BaseModel):
    """The body of `POST /v1/images/generations`. None means that the client leaves the choice to the server."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    prompt: Annotated[str, StringConstraints(min_length=1)]
    model: Name | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: Annotated[str, StringConstraints(pattern=r"^(auto|[1-9][0-9]{0,5}x[1-9][0-9]{0,5})$")] | None = None
    """WIDTHxHEIGHT in pixels, or "auto"."""
    response_format: str | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    """Quality of jpeg and webp."""
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    """Previews, in a stream."""

    # Fields of OpenAI's own models: what is allowed here is what changes nothing.
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: Name | None = None

    # davae's own, which their client sends as `extra_body`.
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    progress: bool | None = None
    """Whether a stream has an event for each step."""

    @field_validator("response_format")
    @classmethod
    def _check_format(cls, value: str | None) -> str | None:
        if value not in (None, "b64_json"):
            raise ValueError("allowed is b64_json; this server keeps no images, so that there are no URLs of them")
        return value

    def choose_model(self, models: Mapping[str, Model]) -> Model:
        """The model of that name, or the first."""
        if self.model is None:
            return next(iter(models.values()))
        if self.model not in models:
            raise UnknownModelError("model", f"model={self.model!r}: this server has {', '.join(models)}")
        return models[self.model]

    def resolve(self, model: Model, limits: Limits, defaults: Defaults) -> ImageSettings:
        """The settings of the images, or a refusal that names the field."""
        steps = defaults.steps if self.steps is None else self.steps
        for name, value, limit in (
            ("steps", steps, limits.steps),
            ("n", self.count, limits.batch),
            ("prompt", len(self.prompt), limits.prompt),
        ):
            if value > limit:
                unit = " characters" if name == "prompt" else ""
                raise RequestError(name, f"{name}={value}{unit}: this server allows {limit} at most")
        if "\0" in self.prompt:
            raise RequestError("prompt", "prompt: it has a character of code 0, which is no text")

        # A stream, and what is for streams only.
        if self.stream and self.count > 1:
            raise RequestError("n", f"n={self.count}: a stream is of one image; send several requests at once")
        if not self.stream and (self.partial_images or self.progress):
            name = "partial_images" if self.partial_images else "progress"
            raise RequestError(name, f"{name}: only a stream has them; add stream=true")
        if self.partial_images and model.no_previews:
            raise RequestError("partial_images", f"partial_images: {model.name} has none ({model.no_previews})")
        if self.output_compression is not None and self.output_format in (None, "png"):
            raise RequestError("output_compression", "output_compression: PNG is lossless; choose jpeg or webp")

        width, height = self._choose_size(model, limits)
        guidance = defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale
        return ImageSettings(model.name, width, height, steps, guidance, self.partial_images or 0)

    @property
    def count(self) -> int:
        """Images."""
        return self.n or 1

    def choose_seed(self) -> int:
        """The request's seed, or one that nobody can foresee."""
        return secrets.randbelow(2**32) if self.seed is None else self.seed

    def _choose_size(self, model: Model, limits: Limits) -> tuple[int, int]:
        if self.size in (None, "auto"):
            return model.side, model.side
        width, height = (int(side) for side in str(self.size).split("x"))
        largest = limits.side or model.side
        if width * height > largest**2:
            raise RequestError("size", f"size={self.size}: this server allows {largest}x{largest}, or as many pixels")
        try:
            return model.check_size((width, height))
        except SettingsError as error:
            raise RequestError("size", f"size={self.size}: {error}") from error


def describe_mistake(error: Mapping[str, Any]) -> tuple[str, str]:
    """The field that pydantic refuses, and a sentence on it; what was given is shown, but never much of it."""
    place = [str(part) for part in error["loc"] if part != "body"]
    name = ".".join(place) or "body"
    if error["type"] == "extra_forbidden":
        return name, f"{name}: there is no such field; allowed are {', '.join(ImageRequest.model_fields)}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] in ("missing", "json_invalid") else f"={str(error.get('input'))[:80]!r}"
    return name, f"{name}{given}: {message}"
