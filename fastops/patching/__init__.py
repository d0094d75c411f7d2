"""Putting fastops into a model that is already built. `fastops.patch` is the function; the parts:

api        patch, unpatch, patched: plans first, then changes
report     what was replaced, what was left, and what to try next
modules    one module's forward, replaced on the instance so that no tool sees another class
calls      torch's functions that a forward calls, replaced by ours
tracing    what a forward means, read from its source and by torch.fx
joins      batch norm, add and relu of a traced forward, made one kernel
norms      batch norm and activation, in a Sequential and for joins
"""
