"""How containers travel between nodes, in rounds: `sending.py` and `receiving.py` speak to each other over a channel.

Two formats: streams of read-only btrfs snapshots (`btrfs.py`, `guard.py`), and files by rsync (`rsync.py`).
"""
