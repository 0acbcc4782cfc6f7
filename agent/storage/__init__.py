"""Where the containers' file systems live."""
