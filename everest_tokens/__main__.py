"""`python -m everest_tokens`."""

from everest_tokens.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
