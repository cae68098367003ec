"""The mount daemon: an overlay of the source directory whose writers are guarded.

One module per theme: `nodes` (what the kernel knows), `source` (how the storage is reached), `work` (event loop or
thread, as whom), `policy` and `owners` (which images, whose), `guard` (locks), `handles` (open files), then the
operations by theme, and `daemon`, which puts them together.  So that its death is not noticed: `journal`, `survival`,
and `successor`, which goes on where another daemon has died (`doubt` is its last step).
"""
