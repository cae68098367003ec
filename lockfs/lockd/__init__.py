"""lockd: the daemon that holds the locks of one host for all its mounts."""
