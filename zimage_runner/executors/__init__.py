"""Where the loop runs: in this process, or in a supervised child process."""
