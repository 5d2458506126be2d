"""What makes a process start sooner. Process entries open this room; nothing else imports it or relies on it.

- process.py: the one call of every process entry, and the switch ``ZIMAGE_RUNNER_PLAIN_START`` that turns all of it off
- bytecode.py: keep compiled Python where the installation has none
- lean_torch.py: import torch without the parts that drawing does not use
- fork.py, imports.py: import torch and create the CUDA context while a forked child composes the config
"""
