"""The bodies of POST /1.0/images, typed: LXD's clients send all of these fields, empty where they mean nothing."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from controller.services.requests import Body, Moment, Name, Text


class AliasBody(Body, frozen=True):
    """An alias of the image."""

    name: Name
    description: Text = ""


class ImageOriginBody(Body, frozen=True):
    """Where an image comes from. `type` is `url`, `image` (of a server) or a container's; empty means not given."""

    type: Name
    mode: Name = ""
    protocol: Name = ""
    server: Annotated[str, Meta(max_length=2048)] = ""
    url: Annotated[str, Meta(max_length=2048)] = ""
    alias: Name = ""
    fingerprint: Annotated[str, Meta(max_length=64)] = ""
    name: Annotated[str, Meta(max_length=129)] = ""
    secret: Text = ""
    certificate: Annotated[str, Meta(max_length=65536)] = ""
    image_type: Name = ""
    project: Name = ""


class ImageBody(Body, frozen=True):
    """POST /1.0/images: an image made of something that the controller can get.

    `force`: a running container is published as it is at one moment.
    """

    source: ImageOriginBody
    aliases: Annotated[list[AliasBody], Meta(max_length=64)] | None = None
    alias: Name | None = None
    properties: dict[Name, Annotated[str, Meta(max_length=1024)]] | None = None
    public: bool = False
    auto_update: bool = False
    expires_at: Moment | None = None
    filename: Text = ""
    compression_algorithm: Name = ""
    force: bool = False
    profiles: Any = None
