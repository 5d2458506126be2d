"""The prepared copy's way to the GPU, begun before torch is imported, through the CUDA driver."""
