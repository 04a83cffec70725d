"""Launchers, operators (``torch.ops.iib``) and autograd Functions over the kernels in ``_kernels``.

Nothing here checks arguments: the public functions, one file up, do so before they call.
"""
