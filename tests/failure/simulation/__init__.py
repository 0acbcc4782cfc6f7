"""A controller and its agents in virtual time: real decisions, simulated time, network, disks and hosts, one seed."""
