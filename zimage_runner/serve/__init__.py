"""The service: pictures and runs over HTTP, drawn by one model that is warm before the first request."""
