"""The backend ``paxos-lease``: leases on shared storage, in sanlock's format and by its rules."""
