"""The controller: one REST endpoint, the fleet's state, and the operations on it."""
