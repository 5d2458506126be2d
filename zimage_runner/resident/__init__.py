"""``executor=resident``: a process that stays between commands, with the model warm in it.

- client.py: what the command line does: find the process or start it, hand the run over, wait for the exit code
- process.py, desk.py: the process: one run after the other in its main thread, requests in threads
- caller.py: be the caller while its run is done: streams, folder, environment, signals
- likeness.py: what must be the same in both processes
- address.py, messages.py: the socket, who may use it, and what is said
- __main__.py: ``zimage_runner resident status`` and ``stop``
"""
