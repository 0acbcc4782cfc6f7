"""Setting a fleet up on a machine, and taking it away again."""
