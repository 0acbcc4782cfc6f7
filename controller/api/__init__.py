"""The REST API: Tornado handlers, one resource a file. They read, ask a service, and answer; they decide nothing."""
