"""The way of a container's data between two nodes: encrypted, authenticated, and whole after a cut."""
