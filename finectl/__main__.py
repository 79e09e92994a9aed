"""`python -m finectl` is `finectl`."""

from finectl.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
