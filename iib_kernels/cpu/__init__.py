"""The operations on a CPU: the same equations, with few calls and analytic gradients.

    step.py    a whole training step in one batched pass: heads, objective and prototypes

What may come in: torch, and the equations' constants from ``reference``.
"""

from iib_kernels.cpu.step import StepOutput, Weights, step, takes, unit, update

__all__ = ["StepOutput", "Weights", "step", "takes", "unit", "update"]
