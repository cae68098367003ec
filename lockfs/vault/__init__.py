"""The vault: a process beside lockd that does nothing but keep descriptors.

It has copies of what lockd keeps of each mount, and of what locks live in.  So when lockd and a mount daemon die at
once the kernel does not end the connection, no lock is gone, and the next lockd goes on as if only the mount daemon had
died.  A lockd that nobody else starts is started from here.

Invariants:
* Nothing is done with what is kept: no call here can wait for a storage or a mount, but close(2), which has threads.
* The vault decides nothing: the lockd that is connected says what is kept; one lockd is served at a time, to its last
  word.
* It is killed without harm: lockd has all that is here, and fills another one.

Only the standard library, and what needs no more, is imported here: the process is small, and starts at once.
"""
