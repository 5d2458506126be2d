"""Pictures of finished runs brought together: a flat folder with a table, or a contact sheet. Imports no torch."""
