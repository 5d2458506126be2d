"""What prepares the process so that the first picture comes soon."""
