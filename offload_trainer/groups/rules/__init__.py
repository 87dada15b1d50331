"""What each aten op does to axes: one rule per kind of op.

A rule gets a `Call` (the op's arguments by their schema names, and its output) and assigns axes to the output,
unifying or pinning those of the inputs on the way. Pointwise ops need no rule: their torch tag says what they do.
Add one with `@rule("name")`; the name is the op's, as the error for an op without a rule prints it.
"""

from offload_trainer.groups.rules import layers, shapes
from offload_trainer.groups.rules.call import RULES, Axes, Call, pin_all, rule
from offload_trainer.groups.rules.elementwise import pointwise
from offload_trainer.groups.rules.following import follow

__all__ = ["RULES", "Axes", "Call", "follow", "layers", "pin_all", "pointwise", "rule", "shapes"]
