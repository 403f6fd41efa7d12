"""The operations as Triton kernels, for GPUs, and for CPUs in Triton's interpreter, where tests run
them. Import this only where Triton is installed; `TRITON_INTERPRET=1` counts when it is imported.
"""
