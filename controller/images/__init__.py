"""Image files on the controller: receiving and keeping them, reading what they are, building the built-in ones."""
