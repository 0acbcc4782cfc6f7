"""A container's data from one node to another, in rounds: each is one command to either node.

The nodes speak with each other directly; where they cannot, the round is repeated by the controller's relay, and the
later ones go there at once. What a command says depends on the operation and its rows alone, so that a controller that
was restarted says it again, and the nodes go on undisturbed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from common.commands import EndTransfer, ReceiveContainer, Route, SendContainer
from common.errors import Unavailable, Unreachable, VzfleetError
from common.messages import Outcome, Progress
from common.options import parse_config
from common.reports import ContainerSpec, NodeFacts
from controller.operations.kinds import Context
from controller.operations.rounds import Asked, first_word, last_words, raise_cause
from controller.relay import Tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Journey:
    """What travels, and where to: `source` on its node becomes `target` on another.

    `moving`: with its snapshots, and not to stay. `snapshot`: what a copy is made of. `refresh`: the target is there
    already. `rate`: bytes per second at most.
    """

    source_node: str
    source: ContainerSpec
    node: str
    target: ContainerSpec
    rate: int | None = None
    moving: bool = False
    snapshot: str | None = None
    refresh: bool = False


def travelled(context: Context) -> dict[str, Any]:
    """What the rounds before have led to: `via`, `format`, `rounds` (bytes and seconds of each), `bytes` of all."""
    told = [output for output in context.operation.outputs.values() if isinstance(output, dict) and "via" in output]
    return max(told, key=lambda output: len(output["rounds"]), default={})


async def travel(
    context: Context, journey: Journey, *, last: bool, stage: str, patience: float | None = None
) -> dict[str, Any]:
    """Carry out the next round; with the `last` one the target is there. Raises why one end failed.

    `patience`: seconds for which the target may be out of reach. Returns what `travelled` is to give from then on.
    """
    before = travelled(context)
    rounds: list[dict[str, Any]] = before.get("rounds", [])
    format = before.get("format") or _format(context, journey)
    this = _Round(context, journey, len(rounds), format, last, stage, patience)
    reason = before.get("via_reason") or _no_way(context, journey)
    context.report(stage, None)
    if reason is None:
        try:
            outcome = await this.run(relayed=False)
        except Unreachable as error:
            reason = error.text
    if reason is not None:
        outcome = await this.run(relayed=True)
    why = {} if reason is None else {"via_reason": reason}
    sent = outcome.bytes or 0
    return {
        "via": "direct" if reason is None else "relay",
        **why,
        "format": this.format,
        "rounds": [*rounds, {"bytes": sent, "seconds": round(outcome.seconds or 0.0, 3)}],
        "bytes": sum(one["bytes"] for one in rounds) + sent,
    }


async def end(context: Context, journey: Journey) -> None:
    """Have both nodes remove what they keep for further rounds. Both are asked, whatever becomes of one."""
    transfer = context.operation.id
    asked = await asyncio.gather(
        context.command(
            journey.source_node, EndTransfer(journey.source.id, transfer), journey.source.generation, "-end-source"
        ),
        context.command(journey.node, EndTransfer(journey.target.id, transfer), journey.target.generation, "-end"),
        return_exceptions=True,
    )
    raise_first(asked)


async def ended(context: Context, journey: Journey) -> str | None:
    """End the transfer of what is complete: a node that cannot be reached sweeps by itself later. Why it could not."""
    try:
        await end(context, journey)
    except VzfleetError as error:
        log.error("a transfer is not ended", extra={"operation": context.operation.id, "reason": error.text})
        return error.text
    return None


def raise_first(results: Sequence[object]) -> None:
    """Raise the first failure among what `gather` returned."""
    for result in results:
        if isinstance(result, BaseException):
            raise result


@dataclass(frozen=True)
class _Round:
    """One round, to be gone directly or by the relay."""

    context: Context
    journey: Journey
    number: int
    format: str
    last: bool
    stage: str
    patience: float | None

    async def run(self, relayed: bool) -> Outcome:
        """Have both ends carry it out; what the target says of it."""
        context, journey = self.context, self.journey
        way = f"{context.operation.id}-{self.number}" if relayed else None
        mark = "-relayed" if relayed else ""
        sends, receives = self._routes(way)
        receive = ReceiveContainer(journey.target, receives, self.format, self.last, journey.refresh)
        target = Asked(context, journey.node, f"-receive{mark}", receive, journey.target.generation, _unheard)
        send = SendContainer(
            journey.source.id,
            sends,
            self.format,
            self.last,
            journey.moving,
            journey.snapshot,
            with_snapshots=journey.moving,
        )
        source = Asked(context, journey.source_node, f"-send{mark}", send, journey.source.generation, self._heard)
        try:
            await first_word(source, target, self.patience)
            await last_words(source, target)
        finally:
            if way is not None:
                context.resources.relay.close(way)
            for one in (source, target):
                one.ending.cancel()
        if not target.succeeded:
            if not (target.ending.done() or target.reachable):
                raise Unavailable(f"node {journey.node} is out of reach")
            raise_cause((source.ending, target.ending))
        return target.ending.result()

    def _routes(self, way: str | None) -> tuple[Route, Route]:
        """The way as the source and as the target see it; `way` is its name at the relay."""
        context, journey = self.context, self.journey
        nodes = context.resources.fleet.nodes
        source, target = nodes[journey.source_node].record, nodes[journey.node].record
        sends = Route(
            transfer=context.operation.id,
            round=self.number,
            peer=target.name,
            peer_key=target.public_key,
            token=self._token(way),
            rate=journey.rate,
        )
        receives = msgspec.structs.replace(sends, peer=source.name, peer_key=source.public_key)
        if way is None:
            address = _facts(context, journey.node).transfer_address
            return msgspec.structs.replace(sends, address=address), msgspec.structs.replace(receives, address=address)
        opened = context.resources.relay.open(way)
        path = f"/1.0/internal/transfers/{context.operation.id}"
        return _relayed(sends, path, opened.source), _relayed(receives, path, opened.target)

    def _token(self, way: str | None) -> str:
        text = f"{self.context.operation.id}/{self.number}/{'relay' if way else 'direct'}"
        return hmac.new(self.context.resources.transfer_key, text.encode(), hashlib.sha256).hexdigest()

    def _heard(self, progress: Progress) -> None:
        """Show how far the sender is."""
        self.context.show({**progress_of(progress), "stage": self.stage})


def _relayed(route: Route, path: str, tokens: Tokens) -> Route:
    return msgspec.structs.replace(route, relay=path, relay_put=tokens.put, relay_get=tokens.get)


def progress_of(progress: Progress) -> dict[str, Any]:
    """How far a command is, as operations show it: what is not known is None."""
    fields = ("stage", "percent", "processed", "total", "speed", "remaining")
    return {name: getattr(progress, name) for name in fields}


def _unheard(_progress: Progress) -> None:
    """The sender knows how much there is."""


# ---------------------------------------------------------------- the way


def _facts(context: Context, node: str) -> NodeFacts:
    live = context.resources.fleet.nodes.get(node)
    if live is None or live.record.facts is None:
        raise Unavailable(f"nothing is known of node {node}")
    return live.record.facts


def _no_way(context: Context, journey: Journey) -> str | None:
    """Why the nodes cannot speak with each other, as far as that is known before they have tried."""
    if _facts(context, journey.node).transfer_address is None:
        return f"node {journey.node} accepts no connections of other nodes"
    return None


def _format(context: Context, journey: Journey) -> str:
    """`btrfs` where both nodes have it and ids mean the same on both; else `files`."""
    source, target = _facts(context, journey.source_node), _facts(context, journey.node)
    privileged = parse_config(journey.source.config).privileged
    same_ids = privileged or (source.id_map is not None and source.id_map == target.id_map)
    same_kind = privileged == parse_config(journey.target.config).privileged
    both = source.storage == target.storage == "btrfs"
    return "btrfs" if both and same_ids and same_kind and not journey.refresh else "files"
