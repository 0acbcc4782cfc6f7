"""A container's cgroups: reading its figures, setting its limits while it runs, sweeping what is left of it.

The same interface over cgroup v1 (also where v2 is mounted beside it, "hybrid") and v2. The limits stand in the
OUTER directory of a container (`vzfleet/101`); its processes live in an inner one below, beyond which they cannot
see (`lxc.cgroup.dir.container.inner`, lxc.container.conf(5)).
"""

from agent.cgroups.base import INNER, ContainerCgroup, Figures, Limits
from agent.cgroups.detect import Cgroups
from agent.cgroups.moves import Moves

__all__ = ["INNER", "Cgroups", "ContainerCgroup", "Figures", "Limits", "Moves"]
