"""The gallery: runs in a browser, live, and as one page that can be mailed. Imports no torch."""
