"""What happened in a call of a wrapped model and along a trajectory, as plain data.

Nothing here knows a model or a method. `calls` holds what a call did, block by block; `observation` what can be seen of
a call from outside: `comparison` of its input with the one before, and `conditioning`; `trajectory` which step of which
guidance branch of which image a call is.
"""

from tokdyn.trace.calls import BlockTrace, CallTrace

__all__ = ["BlockTrace", "CallTrace"]
