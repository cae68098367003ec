"""lockfs: a FUSE overlay that lets one writer at a time open each disk image on shared storage."""

__version__ = "0.1.0"
