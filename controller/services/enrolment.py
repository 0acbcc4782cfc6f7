"""Hosts join the fleet by a one-time token, and leave it."""

from __future__ import annotations

from datetime import timedelta

import msgspec

from common.clock import Clock, timestamp
from common.errors import Conflict, Forbidden, InvalidRequest
from common.keys import check_public_key
from common.names import check_node_name
from controller.dispatch.dispatcher import Dispatcher
from controller.join_tokens import JoinToken as TokenText
from controller.join_tokens import encode, hash_secret, new_secret
from controller.records import JoinToken, Node, NodeMode
from controller.services.nodes import Nodes
from controller.services.requests import JoinBody
from controller.settings import ControllerSettings
from controller.store import containers as container_rows
from controller.store import nodes as rows
from controller.store.db import Database, Transaction

SHOWN = 10
"""How many containers a refusal names in its text; its metadata has all."""


class Enrolment:
    """Joining and leaving. `authority` is the fingerprint of the CA, `public_key` the link's CURVE key (Z85)."""

    def __init__(
        self,
        store: Database,
        nodes: Nodes,
        dispatcher: Dispatcher,
        settings: ControllerSettings,
        clock: Clock,
        *,
        authority: str,
        public_key: str,
    ) -> None:
        self._store = store
        self._nodes = nodes
        self._dispatcher = dispatcher
        self._settings = settings
        self._clock = clock
        self._authority = authority
        self._public_key = public_key

    async def invite(self, name: str | None) -> dict[str, str]:
        """A one-time token by which a host joins. Raises InvalidRequest, or Conflict when the name is taken."""
        secret = new_secret()
        expires = self._clock.now() + timedelta(seconds=self._settings.join_token_lifetime)
        record = JoinToken(hash_secret(secret), name, timestamp(expires))
        if name is not None:
            check_node_name(name, "name")

        def write(transaction: Transaction) -> None:
            if name is not None and rows.rows.get(transaction.connection, name) is not None:
                raise Conflict(f"node {name} exists already", field="name")
            rows.drop_expired_join_tokens(transaction, timestamp(self._clock.now()))
            rows.join_tokens.insert(transaction, record)

        await self._store.write(write)
        host = self._settings.advertised
        host = f"[{host}]" if ":" in host else host
        text = TokenText(
            api=f"https://{host}:{self._settings.port}",
            link=f"tcp://{host}:{self._settings.agent_port}",
            ca=self._authority,
            key=self._public_key,
            node=name,
            secret=secret,
            expires=expires,
        )
        return {"token": encode(text), "expires_at": timestamp(expires)}

    async def join(self, body: JoinBody) -> str:
        """Use a token up and enrol the host; returns the node's name.

        Raises Forbidden for a token that is unknown, used or expired, InvalidRequest or Conflict for a name or key.
        """
        check_public_key(body.public_key)
        node = await self._store.write(lambda transaction: self._use(transaction, body))
        self._dispatcher.enrol(node.name, node.public_key)
        return node.name

    def _use(self, transaction: Transaction, body: JoinBody) -> Node:
        now = timestamp(self._clock.now())
        token = rows.join_tokens.get(transaction.connection, hash_secret(body.secret))
        if token is None or token.expires_at < now or token.used_by not in (None, body.public_key):
            raise Forbidden("the join token is unknown, used or expired: ask for a new one", field="secret")
        joined = rows.by_key(transaction.connection, body.public_key)
        if token.used_by is not None and joined is not None:
            # Its first answer was lost: the same host gets it again.
            return joined
        if token.node is not None and body.node not in (None, token.node):
            raise InvalidRequest("the token is for another node", field="node", allowed=token.node)
        name = token.node or body.node
        if name is None:
            raise InvalidRequest("the host needs a name", field="node", allowed="--node NAME at the join")
        check_node_name(name)
        if rows.rows.get(transaction.connection, name) is not None:
            raise Conflict(f"node {name} exists already", field="node")
        if joined is not None:
            raise Conflict("a node with this key exists already", field="public_key")
        rows.join_tokens.replace(transaction, msgspec.structs.replace(token, used_by=body.public_key))
        return rows.rows.insert(transaction, Node(name, body.public_key, now))

    async def remove(self, name: str, force: bool) -> None:
        """Forget a node without containers; its key is worth nothing from now on. Raises NotFound or Conflict.

        With `force` a fenced node is forgotten with its containers; their files stay on its host.
        """
        self._nodes.require(name, "name")

        def write(transaction: Transaction) -> None:
            record = rows.require(transaction, name)
            if force and record.mode is NodeMode.FENCED:
                for container in container_rows.on_node(transaction.connection, name):
                    container_rows.require_idle(transaction, container.id)
                    container_rows.rows.delete(transaction, container.id)
            _refuse_used(transaction, name)
            rows.rows.delete(transaction, name)

        await self._store.write(write)
        self._dispatcher.remove(name)


def _refuse_used(transaction: Transaction, name: str) -> None:
    """Raise Conflict for a node that has containers, or on which an operation works."""
    owned = [container.id for container in container_rows.on_node(transaction.connection, name)]
    if owned:
        some = ", ".join(owned[:SHOWN]) + (f" and {len(owned) - SHOWN} more" if len(owned) > SHOWN else "")
        raise Conflict(
            f"node {name} has containers ({some}): drain it, or move or delete them first",
            field="name",
            allowed="force=1 once the node is fenced, which forgets them with it",
            details={"containers": [f"/1.0/vz/{container}" for container in owned]},
        )
    if rows.is_used(transaction.connection, name):
        raise Conflict(f"operations work on node {name}: wait for them, or cancel them", field="name")
