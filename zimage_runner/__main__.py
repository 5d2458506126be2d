"""``python -m zimage_runner``."""

from zimage_runner.cli import entry_point

if __name__ == "__main__":
    entry_point()
