"""One run from start to end: plan, session, loop, report. No Hydra, no torch."""
