"""The journal of a mount daemon: what its successor on the same connection has to know.

`records` is the format and `state` what a series of records amounts to, both pure; `file` is the file, `effects` the
requests whose effect must not happen twice.

Two rules make any moment a good one to die:

- what is taken is taken first and written then, what is given back is written first and given back then: so the
  journal never claims a lock, a descriptor or a number that is not there.  What is left over is found by comparing;
- a record is in the file before the reply that it belongs to.
"""
