"""What controller and agent both speak: messages, codec, errors, units, states. Imports neither side."""

VERSION = "0.1.0"
