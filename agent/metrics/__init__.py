"""Figures of the node and its containers, read from cgroup files and /proc: no subprocess."""
