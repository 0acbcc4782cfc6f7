"""A node's network: a managed bridge with DHCP, DNS names and NAT, or a bridge that the host has."""

from agent.network.network import Network

__all__ = ["Network"]
