"""All that handlers may ask."""

from __future__ import annotations

from dataclasses import dataclass

from controller.events import Events
from controller.fleet import Fleet
from controller.images.deposits import Deposits
from controller.relay import Relay
from controller.services.adoptions import Adoptions
from controller.services.aliases import Aliases
from controller.services.changes import Changes
from controller.services.containers import Containers
from controller.services.drains import Drains
from controller.services.enrolment import Enrolment
from controller.services.fencing import Fencing
from controller.services.identities import Identities
from controller.services.image_changes import ImageChanges
from controller.services.image_operations import ImageOperations
from controller.services.image_pulls import ImagePulls
from controller.services.images import Images
from controller.services.moves import Moves
from controller.services.nodes import Nodes
from controller.services.operations import Operations
from controller.services.promises import Promises
from controller.services.publications import Publications
from controller.services.reconciliation import Reconciliation
from controller.services.recovery import Recovery
from controller.services.refreshes import Refreshes
from controller.services.snapshots import Snapshots
from controller.services.states import States
from controller.services.witnesses import Witnesses


@dataclass(frozen=True)
class ServerFacts:
    """What the server object shows. `instance` differs with each start; `ca` is the CA certificate in PEM."""

    name: str
    version: str
    instance: str
    ca: str
    max_upload: int


@dataclass(frozen=True)
class Services:
    """What handlers may ask."""

    fleet: Fleet
    events: Events
    containers: Containers
    changes: Changes
    moves: Moves
    states: States
    snapshots: Snapshots
    refreshes: Refreshes
    recovery: Recovery
    adoptions: Adoptions
    drains: Drains
    fencing: Fencing
    images: Images
    aliases: Aliases
    image_changes: ImageChanges
    image_operations: ImageOperations
    image_pulls: ImagePulls
    publications: Publications
    deposits: Deposits
    nodes: Nodes
    enrolment: Enrolment
    operations: Operations
    promises: Promises
    reconciliation: Reconciliation
    witnesses: Witnesses
    identities: Identities
    relay: Relay
    server: ServerFacts
