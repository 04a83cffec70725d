"""The operations on a CPU: the same equations, with few calls and analytic gradients.

    fusion, alignment, objective    the operations' autograd Functions
    fusion_rows, alignment_rows     the arithmetic of one chunk of rows
    shared                          chunks, softmaxes, labels; which calls are taken
    step                            a whole training step in one batched pass: heads, objective and
                                    prototypes

What may come in: torch, and ``reference`` for constants and second derivatives.
"""

from iib_kernels.cpu.step import StepOutput, Weights, step, takes, unit, update

__all__ = ["StepOutput", "Weights", "step", "takes", "unit", "update"]
