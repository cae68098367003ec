"""Reads and writes of lease areas: past the page cache, each with a time limit that holds also when the storage hangs.

buffers     page-aligned memory, as O_DIRECT wants it
file        one open file or device, synchronous; the seam where tests put storage that stalls or fails
lane        a bounded number of threads, and the time limit
area        one area in a file, in the terms of `engine.actions`
"""
