"""/1.0/images/aliases and /1.0/images/aliases/<name>; a slash in a name may be written as it is."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from common.errors import InvalidRequest
from controller.api.base import Handler
from controller.api.identity import Right
from controller.services.aliases import Alias, etag_of
from controller.services.requests import AliasBody, AliasChangeBody, AliasNameBody
from controller.store.telling_images import alias_url


def alias_view(alias: Alias) -> dict[str, Any]:
    """An alias, as LXD shows it."""
    return {"name": alias.name, "target": alias.target, "description": alias.description, "type": "container"}


class Aliases(Handler):
    """GET and POST."""

    rights = {"GET": Right.READ, "POST": Right.OPERATE}
    parameters = ("recursion",)

    def get(self) -> None:
        aliases = self.services.aliases.all()
        if self.recursion() == 0:
            self.answer([alias_url(alias.name) for alias in aliases])
        else:
            self.answer([alias_view(alias) for alias in aliases])

    async def post(self) -> None:
        body = self.body(AliasBody)
        await self.services.aliases.create(body)
        await self.answer_write({}, status=201, location=alias_url(body.name))


class AliasHandler(Handler):
    """GET, PUT, PATCH, POST (another name) and DELETE."""

    rights = {
        "GET": Right.READ,
        "PUT": Right.OPERATE,
        "PATCH": Right.OPERATE,
        "POST": Right.OPERATE,
        "DELETE": Right.OPERATE,
    }

    def get(self, name: str) -> None:
        alias = self.services.aliases.get(name)
        self.set_header("ETag", f'"{etag_of(alias)}"')
        self.answer(alias_view(alias))

    async def put(self, name: str) -> None:
        body = self._change(name)
        if body.target is UNSET:
            raise InvalidRequest("the field 'target' is missing", field="target", allowed="an image's fingerprint")
        whole = AliasChangeBody(body.target, "" if body.description is UNSET else body.description)
        await self._write(name, whole)

    async def patch(self, name: str) -> None:
        await self._write(name, self._change(name))

    def _change(self, name: str) -> AliasChangeBody:
        body = self.body(AliasChangeBody)
        for field, given, shown in (("name", body.name, name), ("type", body.type, "container")):
            if given not in (UNSET, shown):
                raise InvalidRequest(f"{field} cannot be changed so", field=field, allowed=repr(shown))
        return body

    async def _write(self, name: str, body: AliasChangeBody) -> None:
        await self.services.aliases.change(name, body, self.request.headers.get("If-Match"))
        await self.answer_write({})

    async def post(self, name: str) -> None:
        new = self.body(AliasNameBody).name
        await self.services.aliases.rename(name, new)
        await self.answer_write({}, status=201, location=alias_url(new))

    async def delete(self, name: str) -> None:
        await self.services.aliases.delete(name)
        await self.answer_write({})


routes = [(r"/1\.0/images/aliases", Aliases), (r"/1\.0/images/aliases/(.+)", AliasHandler)]
