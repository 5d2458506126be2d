"""Everything a run puts on disk: run directory, pictures, records, ledger, summary. Imports no torch."""
