"""What `deploy/quickstart` is made of. Only the standard library: it runs before anything is installed."""
