"""What the lean import of torch (torch_import.py) leaves out, and what needs all of it."""

DEFERRED = (
    "torchgen.model",
    "torch.utils.data",
    "torch.distributions",
    "torch.optim",
    "torch.profiler",
    "torch.ao",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    "torch.nn.quantizable",
    "torch.nn.quantized",
    "torch.quantization",
    "torch.masked",
    "torch.export",
    "torch.func",
    "torch._higher_order_ops",
    "torch.distributed._meta_registrations",
    "torch._meta_registrations",
    "torch.compiler",
)
"""Modules that torch imports and nothing here uses, in torch's order."""

ALONE = ("unittest.mock", "pynvml")
"""Modules of other packages, pynvml if it is installed, that torch imports for functions hardly ever called. They are
deferred too, but each for itself: using one imports it and nothing else."""

TAKEN_FROM = {"torch.func": {"vmap"}, "torch._higher_order_ops": {"cond", "while_loop"}}
"""Names that torch's own ``__init__`` takes from them."""

NEEDS_ALL = (
    "functorch",
    "torch._decomp",
    "torch._dynamo",
    "torch._export",
    "torch._functorch.aot_autograd",
    "torch._inductor",
    "torch._prims",
    "torch._refs",
    "torch._subclasses",
    "torch.distributed.tensor",
    "torch.fx.experimental.proxy_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.onnx",
    "accelerate",
    "diffusers",
    "transformers",
)
"""Modules that rely on what the deferred ones register; importing one of these imports those first."""
