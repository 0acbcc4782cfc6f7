"""Builds and joins all parts of the controller; says in which order they start and stop."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import platform
import uuid
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import Connection
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from common import VERSION, keys
from common.clock import Clock, SteadyClock, SystemClock, timestamp
from common.errors import VzfleetError
from common.failpoints import from_environment
from common.tasks import Tasks
from controller import certificates
from controller.api.application import make_server
from controller.api.services import ServerFacts, Services
from controller.dispatch.dispatcher import Dispatcher
from controller.dispatch.router import Router
from controller.dispatch.sessions import LinkSettings
from controller.events import Events
from controller.fleet import Fleet
from controller.identifiers import operation_ids
from controller.images.busybox import BusyboxBuilder
from controller.images.debian import DebianBuilder
from controller.images.deposits import Deposits
from controller.images.download import Downloads
from controller.images.files import ImageFiles
from controller.images.https import HttpsClient, make_context
from controller.images.servers import ImageServers
from controller.operations.catalogue import KINDS
from controller.operations.engine import Engine
from controller.operations.kinds import Resources
from controller.records import Change, Event, Token
from controller.relay import Relay
from controller.services.adoptions import Adoptions
from controller.services.aliases import Aliases
from controller.services.changes import Changes
from controller.services.containers import Containers
from controller.services.drains import Drains
from controller.services.enrolment import Enrolment
from controller.services.fencing import Fencing
from controller.services.happenings import Happenings
from controller.services.identities import Identities
from controller.services.image_changes import ImageChanges
from controller.services.image_operations import ImageOperations
from controller.services.image_pulls import ImagePulls
from controller.services.image_sources import ImageSources
from controller.services.image_upkeep import ImageUpkeep
from controller.services.images import Images
from controller.services.moves import Moves
from controller.services.nodes import Nodes
from controller.services.notices import Notices
from controller.services.operations import Operations
from controller.services.promises import Promises
from controller.services.publications import Publications
from controller.services.reconciliation import Reconciliation
from controller.services.recovery import Recovery
from controller.services.refreshes import Refreshes
from controller.services.remotes import Remotes
from controller.services.schedules import Schedules
from controller.services.snapshots import Snapshots
from controller.services.states import States
from controller.services.witnesses import Witnesses
from controller.settings import ControllerSettings
from controller.spool import Spool
from controller.store import containers as container_rows
from controller.store import counters, health, schema
from controller.store import events as event_rows
from controller.store import images as image_rows
from controller.store import nodes as node_rows
from controller.store import operations as operation_rows
from controller.store.db import Database
from controller.store.mark import Mark
from controller.store.telling import draft

log = logging.getLogger(__name__)
SAVE_FIGURES_EVERY = 30.0
PRUNE_EVERY = 600.0


def prepare_state(settings: ControllerSettings) -> certificates.Certificates:
    """Make what the first run needs: directory, keys, CA and certificate. Idempotent."""
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    (settings.state / "tls").mkdir(mode=0o700, exist_ok=True)
    keys.load_or_create(settings.state / "link.key")
    return certificates.ensure(settings.state / "tls", *_names_and_addresses(settings))


def _names_and_addresses(settings: ControllerSettings) -> tuple[list[str], list[str]]:
    names: list[str] = [platform.node()]
    addresses: list[str] = []
    for address in settings.addresses:
        numeric = ":" in address or address.replace(".", "").isdigit()
        (addresses if numeric else names).append(address)
    return names, addresses


class App:
    """A running controller."""

    def __init__(self, settings: ControllerSettings, clock: Clock | None = None) -> None:
        self.settings = settings
        self._clock = clock or SystemClock()
        self._tasks = Tasks("controller")
        self.fleet = Fleet(self._clock)
        self._mark = Mark(settings.state / "store.mark")
        self.store = Database(settings.url, self._committed, self._mark, event_rows.EventLog(self._clock))
        self.events = Events(self.store)
        self.fleet.sampled = self.events.sampled
        self._notices = Notices(self.fleet, self.events)
        self.identities = Identities(self.store, Spool(settings.state), self._clock)
        self.nodes = Nodes(self.store, self.fleet, settings, self._clock)
        self._files = ImageFiles(settings.state / "images")
        self._server: HTTPServer | None = None
        self.port = settings.port

    async def start(self) -> None:
        """Open store, link and API, and go on with unfinished operations. Raises VzfleetError or OSError."""
        settings = self.settings
        lost = await asyncio.to_thread(health.examine, settings.url, self._mark)
        schema.check(settings.url)
        tls = prepare_state(settings)
        key = keys.load(settings.state / "link.key")
        (settings.state / "images").mkdir(mode=0o700, exist_ok=True)
        self._files.sweep()
        self.reconciliation = Reconciliation(settings.state, self.fleet, self.store, self.events, self._clock)
        if lost is not None:
            self.reconciliation.begin(lost)
        await self.store.open()
        await self.events.open()
        if lost is not None:
            restored = draft(event_rows.RESTORED, "/1.0", context={"reason": lost})
            await self.store.write(lambda transaction: event_rows.tell(transaction, restored))
        await self.store.read(self._load)
        self.fleet.watch = self._notices
        await self._go_on_in_time()
        if self.reconciliation.kept:
            await self.reconciliation.end_unfinished()
        await self.identities.open()
        epoch = await self.store.write(lambda transaction: counters.advance(transaction, "epoch"))
        self._make_link(key, epoch)
        services = self._services(tls, key)
        await self.nodes.restore_figures()
        for name, node in self.fleet.nodes.items():
            self.dispatcher.enrol(name, node.record.public_key)
        self.fencing.begin(self.dispatcher)
        self.dispatcher.start()
        if not self.reconciliation.kept:
            await services.images.sweep()
        await self.engine.resume()
        self._serve(services, tls)
        self._tasks.start(self._save_figures(), "figures")
        self._tasks.start(self._prune(), "prune")
        self._tasks.start(self.image_upkeep.run(), "image upkeep")
        self.schedules.start()
        log.info("controller started", extra={"port": self.port, "epoch": epoch, "nodes": len(self.fleet.nodes)})

    def _make_link(self, key: keys.KeyPair, epoch: int) -> None:
        """The dispatcher; witnesses, fencing, happenings and nodes, one around the other, hear what nodes report."""
        settings = self.settings
        happenings = Happenings(self.nodes, self.fleet, self.events)
        self.fencing = Fencing(happenings, self.store, self.fleet, self._clock)
        self.witnesses = Witnesses(
            self.fencing,
            self.reconciliation,
            self.store,
            self.fleet,
            self.events,
            epoch,
            raised=lambda higher: self.dispatcher.raise_epoch(higher),
        )
        self.dispatcher = Dispatcher(
            router=Router(f"tcp://{settings.host}:{settings.agent_port}", key, self._clock),
            clock=self._clock,
            epoch=epoch,
            settings=LinkSettings(settings.heartbeat_interval, settings.heartbeat_timeout, settings.sample_interval),
            listener=self.witnesses,
            over=self._over,
            witness=self.witnesses,
        )

    def _services(self, tls: certificates.Certificates, key: keys.KeyPair) -> Services:
        relay = Relay(hashlib.sha256(f"relay tokens {key.secret}".encode()).digest())
        ticket_key = hashlib.sha256(f"image tickets {key.secret}".encode()).digest()
        builders = (BusyboxBuilder(), DebianBuilder())
        images = Images(self.store, self.fleet, self._files, builders, self._clock, ticket_key)
        sources, remotes = self._remotes(images)
        drains = Drains(self._clock)
        transfer_key = hashlib.sha256(f"transfer tokens {key.secret}".encode()).digest()
        deposit_key = hashlib.sha256(f"deposit tokens {key.secret}".encode()).digest()
        deposits = Deposits(self._files, deposit_key, self.settings.max_upload)
        resources = Resources(
            self.fleet, self.dispatcher, images, relay, self._clock, drains, transfer_key, remotes, deposits
        )
        self.engine = Engine(
            self.store,
            KINDS,
            resources,
            self.dispatcher.acknowledge,
            from_environment(),
            self.events.progressed,
        )
        self.promises = Promises(self.store, self._clock, self.settings.idempotency_lifetime)
        operations = Operations(self.store, self.engine, self.promises, self._clock)
        containers = Containers(self.store, self.fleet, self.nodes, sources, operations, self._clock)
        enrolment = Enrolment(
            self.store,
            self.nodes,
            self.dispatcher,
            self.settings,
            SteadyClock(self._clock),
            authority=tls.fingerprint,
            public_key=key.public,
        )
        changes = Changes(containers)
        pulls = self._image_pulls(images, sources, remotes, operations)
        moves = Moves(containers, changes)
        states = States(containers)
        snapshots = Snapshots(containers, self._clock)
        self.schedules = Schedules(
            containers, snapshots, self.events, self._clock, lambda: self.reconciliation.begun is None
        )
        drains.use(containers, moves, states)
        server = ServerFacts(
            name=platform.node(),
            version=VERSION,
            instance=uuid.uuid4().hex[:12],
            ca=tls.ca.read_text(encoding="ascii"),
            max_upload=self.settings.max_upload,
        )
        return Services(
            fleet=self.fleet,
            events=self.events,
            containers=containers,
            changes=changes,
            moves=moves,
            states=states,
            snapshots=snapshots,
            refreshes=Refreshes(containers),
            recovery=Recovery(containers, sources),
            adoptions=Adoptions(containers, self._clock),
            drains=drains,
            fencing=self.fencing,
            images=images,
            aliases=Aliases(self.store, self.fleet, images),
            image_changes=ImageChanges(self.store, images, self._clock),
            image_operations=ImageOperations(images, operations),
            image_pulls=pulls,
            publications=Publications(containers, pulls),
            deposits=deposits,
            nodes=self.nodes,
            enrolment=enrolment,
            operations=operations,
            promises=self.promises,
            reconciliation=self.reconciliation,
            witnesses=self.witnesses,
            identities=self.identities,
            relay=relay,
            server=server,
        )

    def _remotes(self, images: Images) -> tuple[ImageSources, Remotes]:
        """Which image is meant, and those of other servers."""
        settings = self.settings
        downloads = Downloads(HttpsClient(make_context(settings.image_ca)))
        servers = ImageServers(downloads, self._clock, settings.image_index_lifetime)
        sources = ImageSources(self.fleet, images, servers, settings.image_servers)
        limit = settings.max_upload
        remotes = Remotes(self.store, self.fleet, self._files, images, downloads, self._clock, servers, sources, limit)
        return sources, remotes

    def _image_pulls(
        self, images: Images, sources: ImageSources, remotes: Remotes, operations: Operations
    ) -> ImagePulls:
        pulls = ImagePulls(images, sources, remotes, operations)
        self.image_upkeep = ImageUpkeep(
            self.fleet,
            remotes,
            pulls,
            SteadyClock(self._clock),
            lambda: self.reconciliation.begun is None,
            cache_expiry=self.settings.image_cache_expiry,
            update_interval=self.settings.image_update_interval,
        )
        return pulls

    def _over(self, command: str) -> bool:
        over = self.engine.over(command)
        if over:
            self.witnesses.stray(command)
        return over

    def _serve(self, services: Services, tls: certificates.Certificates) -> None:
        self._server = make_server(services, tls.server_context())
        sockets = bind_sockets(self.settings.port, self.settings.host, backlog=1024)
        self.port = sockets[0].getsockname()[1]
        self._server.add_sockets(sockets)

    def _load(self, connection: Connection) -> None:
        self.fleet.load(
            node_rows.rows.all(connection),
            container_rows.rows.all(connection),
            container_rows.all_snapshots(connection),
            image_rows.rows.all(connection),
        )

    async def _go_on_in_time(self) -> None:
        """Whatever the clock shows now: order goes on from the last operation, and history is not older by far."""
        latest = await self.store.read(operation_rows.latest)
        at_most = None
        if latest is not None:
            operation_ids.follow(latest.id)
            # However late it seems to be, half of the history is kept until that time has really passed.
            at_most = datetime.fromisoformat(latest.updated_at) + timedelta(seconds=self.settings.operation_history / 2)
        self._history_clock = SteadyClock(self._clock, at_most)

    def _committed(self, changes: Sequence[Change]) -> None:
        self.fleet.apply(changes)
        for change in changes:
            if change.kind is Token:
                self.identities.apply(change)
        self.events.publish([change.record for change in changes if isinstance(change.record, Event)])

    async def stop(self) -> None:
        """Answer nobody any more, leave operations where they stand, keep the last figures, close the store."""
        if self._server is not None:
            self._server.stop()
        await self._tasks.close()
        await self.schedules.close()
        await self.engine.close()
        await self.dispatcher.close()
        await self.witnesses.close()
        await self.fencing.close()
        self._notices.close()
        await self.events.close()
        if self._server is not None:
            await self._server.close_all_connections()
        try:
            await self.nodes.save_figures()
        except VzfleetError as error:
            log.error("the last figures could not be kept", extra={"reason": error.text})
        await self.store.close()
        log.info("controller stopped")

    async def _save_figures(self) -> None:
        while True:
            await asyncio.sleep(SAVE_FIGURES_EVERY)
            try:
                await self.nodes.save_figures()
            except VzfleetError as error:
                log.error("the last figures could not be kept", extra={"reason": error.text})

    async def _prune(self) -> None:
        while True:
            try:
                while await self._prune_batch() + await self.promises.prune():
                    pass
            except VzfleetError as error:
                log.error("old rows could not be pruned", extra={"reason": error.text})
            await asyncio.sleep(PRUNE_EVERY)

    async def _prune_batch(self) -> int:
        before = timestamp(self._history_clock.now() - timedelta(seconds=self.settings.operation_history))
        keep = self.settings.event_history
        return await self.store.write(
            lambda transaction: operation_rows.prune(transaction, before) + event_rows.prune(transaction, before, keep)
        )
