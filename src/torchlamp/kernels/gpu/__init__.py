"""The kernels of the simulation for CUDA devices, in Triton: an extra, `pip install "torchlamp[gpu]"`.

Scores are equal bit for bit to those of the references in torch (`torchlamp.kernels.reference`) and so to the CPU's.
Nothing here is imported before a call on tensors of such a device. Triton's interpreter runs the kernels on a CPU,
slowly, where TRITON_INTERPRET=1 and TORCHLAMP_KERNELS=triton are set: so they are tested without a GPU.
"""
